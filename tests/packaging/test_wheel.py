"""What is published: the distributions hold every file of the packages, and an installed wheel runs without the clone."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("fedrot", "fedrot_kernels")
# What tools leave in a clone; asked only where git cannot say which files are the clone's.
LEFTOVERS = {"__pycache__", "build", "dist", "runs", "site"}


def run(*command, **options):
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert finished.returncode == 0, f"{' '.join(map(str, command))}\n{finished.stdout}\n{finished.stderr}"
    return finished.stdout


def files_of_the_clone():
    """Paths that git tracks, or in an unpacked source distribution those that are no tool's leftovers."""
    if ROOT.joinpath(".git").exists():
        listed = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
        return {Path(name) for name in listed if name and ROOT.joinpath(name).exists()}
    walked = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    return {
        path
        for path in walked
        if not any(part in LEFTOVERS or part.startswith(".") or part.endswith(".egg-info") for part in path.parts)
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A source distribution, and a wheel made from it, of the clone's own files: what earlier builds left does not count."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for path in files_of_the_clone():
        source.joinpath(path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, source / path)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", output, source, cwd=output)
    (sdist,), (wheel,) = output.glob("*.tar.gz"), output.glob("*.whl")
    return sdist, wheel


def of_the_packages(paths):
    return {path.as_posix() for path in paths if path.parts[0] in PACKAGES}


def test_the_wheel_holds_every_file_of_the_packages_and_no_other(built):
    _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        held = {Path(name) for name in archive.namelist() if not name.endswith("/")}
    compiled = {path for path in held if path.suffix == ".so"}
    assert [path.name.partition(".")[0] for path in compiled] == ["_native"] * (shutil.which("g++") is not None)
    assert of_the_packages(held - compiled) == of_the_packages(files_of_the_clone())
    name, version, *_ = wheel.name.split("-")
    assert {path.parts[0] for path in held} == {*PACKAGES, f"{name}-{version}.dist-info"}


def test_the_source_distribution_holds_every_file_but_hidden_ones(built):
    sdist, _ = built
    with tarfile.open(sdist) as archive:
        held = {Path(*Path(member.name).parts[1:]) for member in archive if member.isfile()}
    assert {path for path in files_of_the_clone() if not path.parts[0].startswith(".")} - held == set()


def test_a_package_index_accepts_both(built):
    run(sys.executable, "-m", "twine", "check", "--strict", *built)


def test_every_backend_runs_from_the_wheel_in_an_empty_environment_outside_the_clone(built, tmp_path):
    _, wheel = built
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    # Before the dependencies can be seen: pip takes the clone that is installed among them for an older version.
    install = ["-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    run(sys.executable, *install, env=environment)
    (site,) = tmp_path.glob("venv/lib/python*/site-packages")
    # The .pth files of a folder that is itself named in one are not read, so an editable clone cannot be imported.
    site.joinpath("dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))

    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("calls_every_backend.py")
    # -P: the script's folder is the clone's, and is not searched for modules.
    said = run(python, "-P", script, cwd=tmp_path, env=environment)
    names = "auto, native, torch, triton" if shutil.which("g++") else "auto, torch, triton"
    assert said.endswith(f"results agree between {names}\n") or sys.platform != "linux"
    assert "fedit" in run(python.with_name("fedrot"), "methods", cwd=tmp_path, env=environment)
