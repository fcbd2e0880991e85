"""The commands as processes of their own: how they start and end, and what they load."""

import os
import subprocess
import sys

import pytest

import fedrot
import fedrot_kernels

from .adapters import assert_written


def test_the_module_is_the_command():
    run = subprocess.run([sys.executable, "-m", "fedrot.cli", "--version"], capture_output=True, text=True, check=True)
    states = ", ".join(f"{name} {state}" for name, state in fedrot_kernels.backends().items())
    assert run.stdout == f"fedrot {fedrot.__version__} ({states})\n"
    run = subprocess.run([sys.executable, "-m", "fedrot.cli", "inspect", "nowhere"], capture_output=True, text=True)
    said = "fedrot: error: client 0 (nowhere): there is no folder nowhere; pass a folder that save_pretrained wrote\n"
    assert (run.returncode, run.stderr) == (1, said)


def run_for_nobody(*arguments, unbuffered):
    """Run a command whose output nobody reads, as after ``| head``, written in one piece or as it is printed."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"PYTHONUNBUFFERED": "1" if unbuffered else ""}
    with os.fdopen(writing, "wb") as output:
        command = [sys.executable, "-m", "fedrot.cli", *arguments]
        return subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize(
    ("command", "unbuffered"), [("methods", True), ("methods", False), ("inspect", True), ("--help", False)]
)
def test_a_reader_that_ends_early_ends_the_command_quietly(folders, command, unbuffered):
    run = run_for_nobody(command, *(folders if command == "inspect" else []), unbuffered=unbuffered)
    # argparse itself passes over an error in writing its help.
    assert run.stderr == "" and run.returncode in ((0, 141) if command == "--help" else (141,))


@pytest.mark.parametrize("command", ["aggregate", "merge"])
def test_a_result_is_written_whoever_reads_the_report(folders, tmp_path, command):
    run = run_for_nobody(command, *folders, "--output", str(tmp_path / "merged"), unbuffered=True)
    assert (run.returncode, run.stderr) == (141, "")
    assert_written(tmp_path / "merged", getattr(fedrot, command)(folders))


def test_the_core_needs_neither_transformers_nor_peft():
    script = (
        "import sys, fedrot, fedrot_kernels, fedrot.cli\n"
        "loaded = {'transformers', 'peft', 'datasets', 'matplotlib', 'pandas'} & sys.modules.keys()\n"
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
