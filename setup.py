"""Packaging of fedrot; the tested versions are in constraints.txt."""

from pathlib import Path

from setuptools import setup

SIMULATE = [
    "transformers>=5.0",
    "peft>=0.21",
    "datasets>=4.0",
    "numpy>=1.26",
    "pandas>=2.2",
    "pyyaml>=6.0.2",
    "scikit-learn>=1.5",
    "matplotlib>=3.9",
    "tqdm>=4.66",
    "psutil>=6",
    "jsonargparse[signatures]>=4.40",
]

FLOWER = ["flwr[simulation]>=1.41,<2", "numpy>=1.26"]
NVFLARE = ["nvflare>=2.9,<3", "numpy>=1.26"]

setup(
    name="fedrot",
    version="0.1.0",
    description="Federated averaging of LoRA adapters in a common basis (FedRot-LoRA)",
    long_description=Path(__file__).with_name("README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=[
        "fedrot",
        "fedrot.flower",
        "fedrot.methods",
        "fedrot.simulation",
        "fedrot.simulation.presets",
        "fedrot.simulation.tasks",
        "fedrot_kernels",
    ],
    package_data={"fedrot": ["py.typed", "simulation/presets/*.yaml"], "fedrot_kernels": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=["torch>=2.11", "triton>=3.6; platform_system == 'Linux'", "safetensors[torch]>=0.4.3"],
    extras_require={
        "simulate": SIMULATE,
        "flower": FLOWER,
        "nvflare": NVFLARE,
        "test": [
            *SIMULATE,
            *FLOWER,
            "flwr[dp]>=1.41,<2",  # its privacy accountant
            *NVFLARE,
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-xdist>=3.6",
            "scipy>=1.13",
            "ruff>=0.14",
            "mypy>=1.15",
        ],
    },
    entry_points={"console_scripts": ["fedrot = fedrot.cli:main"]},
)
