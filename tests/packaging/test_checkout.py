"""A checkout that is not installed, as on a GPU machine on which nothing can be installed."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import fedrot

ROOT = Path(__file__).parents[2]

UNINSTALLED = """
from importlib import metadata

find = metadata.Distribution.from_name

def from_name(name):
    if name == "fedrot":
        raise metadata.PackageNotFoundError(name)
    return find(name)

metadata.Distribution.from_name = from_name
import benchmarks.aggregation, benchmarks.gpu, benchmarks.gpu_kernels, fedrot, fedrot.cli
print(fedrot.__version__)
"""


def test_packages_and_benchmarks_can_be_imported_from_a_checkout():
    run = subprocess.run([sys.executable, "-c", UNINSTALLED], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == f"{fedrot.__version__}\n", run.stderr


def test_the_installed_version_is_the_codes():
    assert version("fedrot") == fedrot.__version__
