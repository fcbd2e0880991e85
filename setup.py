"""Metadata and dependencies of fedrot. The tested versions are in constraints.txt, the tools' settings in pyproject.toml."""

import re
import runpy
from pathlib import Path

from setuptools import Extension, find_packages, setup

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

FLOWER = ["flwr[simulation]>=1.41,<2", "numpy>=2.1"]
NVFLARE = ["nvflare>=2.9,<3", "numpy>=1.26"]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6", "mkdocstrings[python]>=0.30"]

LIBRARY = runpy.run_path("fedrot_kernels/native_backend/library.py")

# A plain library without Python's or PyTorch's ABI, loaded by ctypes. Where it cannot be built, PyTorch does its work.
NATIVE = Extension(
    "fedrot_kernels.native_backend._native",
    sources=["fedrot_kernels/native_backend/native.cpp"],
    depends=sorted(map(str, Path("fedrot_kernels/native_backend").glob("*.inc"))),
    language="c++",
    define_macros=[("FEDROT_SOURCES", f"{LIBRARY['hash_sources']()}ULL")],
    extra_compile_args=["-O3", "-std=c++17", "-pthread"],
    extra_link_args=["-pthread"],
    optional=True,
)

setup(
    name="fedrot",
    version=re.search(r'__version__ = "(.+)"', Path(__file__).with_name("fedrot").joinpath("version.py").read_text())[1],
    description="Federated averaging of LoRA adapters in a common basis (FedRot-LoRA)",
    long_description=Path(__file__).with_name("README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    project_urls={"Paper": "https://arxiv.org/abs/2602.23638"},
    keywords=["federated learning", "LoRA", "PEFT", "adapter merging", "model merging", "Procrustes", "PyTorch", "Triton"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    # Said, so that an editable install puts the clone on the path. Otherwise setuptools makes a finder that comes last, and
    # the modules of fedrot that NVFlare copies into a job, without the __init__.py of their packages, come first.
    package_dir={"": "."},
    packages=find_packages(include=["fedrot", "fedrot.*", "fedrot_kernels", "fedrot_kernels.*"]),
    package_data={"": ["py.typed", "*.yaml"], "fedrot_kernels.native_backend": ["native.cpp", "*.inc"]},
    ext_modules=[NATIVE],
    include_package_data=False,
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "safetensors[torch]>=0.4.3",
        "google-re2>=1.1",  # clients' regular expressions, in linear time
    ],
    extras_require={
        "simulate": SIMULATE,
        "flower": FLOWER,
        "nvflare": NVFLARE,
        "docs": DOCS,
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
            # What the wheel is built and checked with.
            "setuptools>=77",
            "build>=1.2",
            "twine>=6.1,<7",  # 7 needs a packaging that Flower does not take yet
        ],
    },
    entry_points={"console_scripts": ["fedrot = fedrot.cli:main"]},
)
