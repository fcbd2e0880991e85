"""Every kernel compiles for every architecture in every configuration, in a process and a cache of its own.

The whole matrix takes eight minutes of one core. Its committed table holds a hash of the code that it is of, so that a
change of a kernel without a new table fails at once; a few configurations are compiled to see that the table is of this
machine's Triton too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
RECORDED = json.loads((RESULTS / "compile_matrix.json").read_text("utf-8"))
SAMPLE = """
from benchmarks.compile_configurations import configurations
from benchmarks.compile_matrix import compile_all, record
of_sm_90 = {c.kernel: c for c in configurations() if c.architecture == "sm_90" and "RP 128" not in c.case}
print(record(compile_all(list(of_sm_90.values())), None))
"""


def run(tmp_path, *command):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=RESULTS.parent.parent,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )


def test_the_committed_table_is_of_these_kernels(tmp_path):
    found = run(tmp_path, "-c", "from benchmarks.compile_matrix import sources_digest; print(sources_digest())")
    assert found.stdout.strip() == RECORDED["sources"], "run python -m benchmarks.compile_matrix, and mend its failures"


def test_one_configuration_of_every_kernel_compiles_as_the_table_says(tmp_path):
    found = run(tmp_path, "-c", SAMPLE)
    assert found.returncode == 0, found.stderr
    compiled = json.loads(found.stdout)
    assert len(compiled["compiled"]) == 5 and not any("error" in row for row in compiled["compiled"])
    if compiled["triton"] == RECORDED["triton"]:
        assert all(row in RECORDED["compiled"] for row in compiled["compiled"])


@pytest.mark.exhaustive
def test_every_configuration_compiles_within_its_limits_and_as_the_committed_table_says(tmp_path):
    said = run(tmp_path, "-m", "benchmarks.compile_matrix", "--output", tmp_path)
    now = tmp_path / "compile_matrix.json"
    assert now.exists(), said.stderr
    here = json.loads(now.read_text())
    assert [row for row in here["compiled"] if "error" in row or row["traps"]] == [], said.stdout + said.stderr
    if here["triton"] != RECORDED["triton"]:
        pytest.skip(f"all compile; the limits hold for Triton {RECORDED['triton']}, here is {here['triton']}: {said.stderr}")
    assert said.returncode == 0, said.stdout + said.stderr
    for path in (now, now.with_suffix(".md")):
        assert path.read_text() == (RESULTS / path.name).read_text(), f"{path.name}: run python -m benchmarks.compile_matrix"
