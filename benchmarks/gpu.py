"""Everything to be known of the kernels on a GPU, in under ten minutes: ``python -m benchmarks.gpu``.

Correctness compiled for real, memory and race checks, timings beside the targets and the roofline's bounds; one JSON record.
Needs the checkout, PyTorch with Triton, pytest, tqdm and matplotlib. Every part is a process with a time limit, so that one
that fails costs no other.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from .bounds import BOUNDS, lines
from .parts import Finished, portable, run_part, say
from .record import RESULTS, environment, record_path, write
from .targets import summary, targets

TOTAL = 570.0  # seconds; what is left of it limits every part
# Timings before the sanitizer, which is the first to go without when time runs out.
LIMITS = {"correctness": 220.0, "kernels": 90.0, "roofline": 60.0, "aggregation": 230.0, "memcheck": 70.0, "racecheck": 70.0}
LONGEST_MESSAGE, MOST_FAILURES = 2000, 50


def correctness(limit: float, scratch: Path) -> dict[str, Any]:
    """tests/kernels/triton on this card: counts, and the messages of what failed."""
    xml = scratch / "tests.xml"
    # The settings of the other tests need packages that are not needed here.
    options = ["-q", "-p", "no:cacheprovider", "--confcutdir=tests/kernels/triton", f"--junitxml={xml}"]
    finished = run_part("correctness", [sys.executable, "-m", "pytest", "tests/kernels/triton", *options], limit)
    return {**asdict(finished), **(counts(xml) if xml.exists() else {})}


def counts(xml: Path) -> dict[str, Any]:
    """Passed, failed, skipped and errors of a junit file, with the first failures' messages."""
    suite = next(ElementTree.parse(xml).iter("testsuite"))
    total, failed, errors, skipped = (int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped"))
    failures = {}
    for case in suite.iter("testcase"):
        for found in case:
            if found.tag in ("failure", "error"):
                message = portable(f"{found.get('message')}\n{found.text or ''}")
                failures[f"{case.get('classname')}::{case.get('name')}"] = message[:LONGEST_MESSAGE]
    return {
        "passed": total - failed - errors - skipped,
        "failed": failed,
        "errors": errors,
        "skipped": skipped,
        "failures": dict(list(failures.items())[:MOST_FAILURES]),
    }


def sanitizer(tool: str, limit: float) -> dict[str, Any]:
    """compute-sanitizer's tool around small launches."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        say(f"{tool}: skipped, compute-sanitizer is not on PATH")
        return {"skipped": "compute-sanitizer is not on PATH"}
    command = [program, "--tool", tool, "--error-exitcode", "86", sys.executable, "-m", "benchmarks.sanitize"]
    # With PyTorch's cache every tensor lies inside a larger allocation, and a read beyond its end is no error.
    finished = run_part(tool, command, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return {**asdict(finished), "clean": finished.status == 0}


def kernels(limit: float, scratch: Path) -> tuple[Finished, dict[str, Any]]:
    """Timings of the operations one by one, as far as they came."""
    path = scratch / "kernels.json"
    finished = run_part("kernels", [sys.executable, "-m", "benchmarks.gpu_kernels", str(path)], limit)
    return finished, json.loads(path.read_text()) if path.exists() else {}


def roofline(limit: float, scratch: Path) -> tuple[Finished, dict[str, Any]]:
    """Each kernel's time beside its bound, as far as they came."""
    path = scratch / "roofline.json"
    finished = run_part("roofline", [sys.executable, "-m", "benchmarks.gpu_roofline", str(path)], limit)
    return finished, json.loads(path.read_text()) if path.exists() else {}


def aggregation(limit: float, scratch: Path, output: Path) -> tuple[Finished, dict[str, Any]]:
    """The tables of all workloads, as far as they came; their plot is put beside the record."""
    command = [sys.executable, "-m", "benchmarks.aggregation", "--device", "cuda", "--dtype", "float32", "bfloat16"]
    finished = run_part("aggregation", [*command, "--output", str(scratch)], limit)
    found = next(scratch.glob("aggregation-*.json"), None)
    for picture in scratch.glob("*.png"):
        shutil.copy(picture, output)
    return finished, json.loads(found.read_text()) if found else {}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the record and the plot")
    output = parser.parse_args().output
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a GPU that PyTorch can use; on a CPU: python -m benchmarks.aggregation")
    end = time.monotonic() + TOTAL
    where = environment(torch.device("cuda"))
    say(", ".join(f"{key} {value}" for key, value in where.items()))
    path = record_path("gpu", where, output)
    record: dict[str, Any] = {"environment": where, "targets": [], "parts": {}}

    def limit(part: str) -> float:
        return max(1.0, min(LIMITS[part], end - time.monotonic()))

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        record["correctness"] = correctness(limit("correctness"), scratch)
        write(path, record)
        finished, record["kernels"] = kernels(limit("kernels"), scratch)
        record["parts"]["kernels"] = asdict(finished)
        write(path, record)
        if BOUNDS.exists():
            finished, record["roofline"] = roofline(limit("roofline"), scratch)
            record["parts"]["roofline"] = asdict(finished)
            write(path, record)
        finished, tables = aggregation(limit("aggregation"), scratch, output)
        record["parts"]["aggregation"] = asdict(finished)
        record["skipped"], record["comparisons"] = tables.get("skipped", []), tables.get("comparisons", [])
        record["targets"] = targets(record["kernels"], record["comparisons"])
        write(path, record)
        for tool in ("memcheck", "racecheck"):
            record[tool] = sanitizer(tool, limit(tool))
            write(path, record)
    print_summary(record)
    say(f"record: {path}")


def print_summary(record: dict[str, Any]) -> None:
    print(f"\n{record['environment']['device']}, commit {record['environment']['commit']}")
    tests = record["correctness"]
    if "passed" in tests:
        print("tests: " + ", ".join(f"{tests[name]} {name}" for name in ("passed", "failed", "errors", "skipped")))
    else:
        print("tests: timed out" if tests["timed_out"] else f"tests: did not run, exit status {tests['status']}")
    for tool in ("memcheck", "racecheck"):
        checked = record[tool]
        clean = "clean" if checked.get("clean") else f"not clean, exit status {checked.get('status')}"
        print(f"{tool}: {'skipped' if 'skipped' in checked else 'timed out' if checked['timed_out'] else clean}")
    for name, part in record["parts"].items():
        if part["status"]:
            print(f"{name}: incomplete, {'timed out' if part['timed_out'] else 'exit status ' + str(part['status'])}")
    rows = record.get("roofline", {}).get("rows", [])
    print(
        "\n".join(["kernels beside their bounds:", *lines(rows)] if rows else ["kernels beside their bounds: not measured"])
    )
    print(summary(record["targets"]), flush=True)


if __name__ == "__main__":
    main()
