"""A job from an editable install: NVFlare copies modules of fedrot into it, which must not shadow the clone's."""

import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]

JOB = """
import sys
from pathlib import Path

import torch
from nvflare.app_opt.pt.file_model_persistor import PTFileModelPersistor
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe.sim_env import SimEnv

from fedrot.nvflare import FedRotModelAggregator

folder = Path(sys.argv[1])
torch.save({"x.lora_A.weight": torch.ones(2, 4), "x.lora_B.weight": torch.ones(3, 2)}, folder / "start.pt")
recipe = FedAvgRecipe(
    min_clients=2,
    num_rounds=1,
    train_script=str(folder / "client.py"),
    model_persistor=PTFileModelPersistor(source_ckpt_file_full_name=str(folder / "start.pt")),
    aggregator=FedRotModelAggregator(),
)
recipe.execute(SimEnv(num_clients=2, workspace_root=str(folder / "workspace")))
"""

CLIENT = """
import nvflare.client as flare
from nvflare.app_common.abstract.fl_model import FLModel

flare.init()
while flare.is_running():
    received = flare.receive()
    params = {key: x + 1 for key, x in received.params.items()}
    flare.send(FLModel(params=params, meta={"NUM_STEPS_CURRENT_ROUND": 1}))
"""


def run(*command, **options):
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def install_editable(clone, venv):
    """Make an environment with what is installed here, and an editable install of a clone; return its Python."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, clone / name)
    for package in ("fedrot", "fedrot_kernels"):
        shutil.copytree(ROOT / package, clone / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    build = "import setuptools.build_meta as backend; backend.build_editable('dist')"
    # Without the compiled library, which plays no part here and takes long to compile.
    run(sys.executable, "-c", build, cwd=clone, env=os.environ | {"CC": "false", "CXX": "false"})
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    (packages,) = venv.glob("lib/python*/site-packages")
    # Python does not read the .pth files of these folders, and so does not find the fedrot that is installed here.
    (packages / "base.pth").write_text("\n".join(site.getsitepackages()))
    (wheel,) = clone.glob("dist/*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    return venv / "bin" / "python"


def test_a_recipe_runs_from_an_editable_install(tmp_path):
    (tmp_path / "clone").mkdir()
    python = install_editable(tmp_path / "clone", tmp_path / "venv")
    environment = {k: x for k, x in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    found = run(python, "-c", "import fedrot; print(fedrot.__file__)", cwd=tmp_path, env=environment)
    assert Path(found.strip()) == tmp_path / "clone" / "fedrot" / "__init__.py"
    (tmp_path / "job.py").write_text(JOB)
    (tmp_path / "client.py").write_text(CLIENT)
    run(python, "job.py", tmp_path, cwd=tmp_path, env=environment)
    (log,) = (tmp_path / "workspace").rglob("server/log.txt")
    assert "round 1 (current_round 0): aggregation_error 0" in log.read_text()
    assert [*(tmp_path / "workspace").rglob("custom/fedrot/nvflare.py")]  # what NVFlare copied
