"""Every kernel compiles for every architecture in every configuration. In a process of its own: kernels that were made for
Triton's interpreter cannot be compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_every_configuration_compiles_within_its_limits_and_as_the_committed_table_says(tmp_path):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_matrix", "--output", tmp_path],
        cwd=RESULTS.parent.parent,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    said = run.stdout + run.stderr
    now, committed = tmp_path / "compile_matrix.json", RESULTS / "compile_matrix.json"
    assert now.exists(), said
    here, recorded = json.loads(now.read_text()), json.loads(committed.read_text())
    assert [row for row in here["compiled"] if "error" in row or row["traps"]] == [], said
    if here["triton"] != recorded["triton"]:
        pytest.skip(f"all compile; the limits hold for Triton {recorded['triton']}, here is {here['triton']}: {said}")
    assert run.returncode == 0, said
    for path in (now, now.with_suffix(".md")):
        assert path.read_text() == (RESULTS / path.name).read_text(), f"{path.name}: run python -m benchmarks.compile_matrix"
