"""Compile every kernel as the launchers may, for GPUs that need not be there, and check it: ``python -m
benchmarks.compile_matrix``. Writes a table of registers, shared memory and stack, which depends on nothing but Triton."""

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import triton
from tqdm import tqdm

import fedrot_kernels
from fedrot_kernels.triton_backend.launch import interpreted

from .compile_checks import failures
from .compile_configurations import ARCHITECTURES, Configuration, configurations
from .compiled import Compiled, compile_configuration
from .record import RESULTS

_LEGEND = """\
Triton {version}. Registers per thread / bytes of shared memory per program / bytes of stack per thread. On AMD, +n: n scalar
registers kept in lanes of vector registers. RP: the padded rank. Written by `python -m benchmarks.compile_matrix`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_matrix", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the results (default: %(default)s)")
    output = parser.parse_args().output
    if interpreted():
        parser.error("TRITON_INTERPRET is set: kernels made for the interpreter cannot be compiled; unset it")
    results = compile_all(configurations())
    output.mkdir(parents=True, exist_ok=True)
    output.joinpath("compile_matrix.md").write_text(table(results), "utf-8")
    found = failures(results)
    output.joinpath("compile_matrix.json").write_text(record(results, None if found else sources_digest()), "utf-8")
    slowest = sorted(results, key=lambda result: result.seconds, reverse=True)[:3]
    print(f"{len(results)} compilations, {sum(result.seconds for result in results):.0f} s of one core; the slowest:")
    for result in slowest:
        c = result.configuration
        print(f"  {result.seconds:.1f} s: {c.kernel}, {c.title}, {c.architecture}")
    sys.exit("\n".join([f"{len(found)} failures:", *found]) if found else 0)


def compile_all(wanted: Sequence[Configuration]) -> list[Compiled]:
    """Compile on all cores; the results are in the order of ``wanted``."""
    # What takes longest goes first, so that no core is left with it at the end.
    order = sorted(range(len(wanted)), key=lambda i: not wanted[i].kernel.startswith("polar"))
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads, which PyTorch has, may hang
    results: dict[int, Compiled] = {}
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), spawn) as pool:
        futures = {pool.submit(compile_configuration, wanted[i]): i for i in order}
        for future in tqdm(as_completed(futures), total=len(futures), desc="compiling", disable=None):
            i = futures[future]
            crash = future.exception()  # of the process itself: the compiler's errors are results
            results[i] = Compiled(wanted[i], None, f"{type(crash).__name__}: {crash}", 0.0) if crash else future.result()
    return [results[i] for i in range(len(wanted))]


def table(results: Sequence[Compiled]) -> str:
    """Markdown: a line per kernel and configuration, a column per architecture."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for result in results:
        c = result.configuration
        cells.setdefault((c.kernel, c.title), {})[c.architecture] = _cell(result)
    lines = [("kernel", "configuration", *ARCHITECTURES)]
    lines += [(*key, *(of_key.get(name, "") for name in ARCHITECTURES)) for key, of_key in cells.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines]
    rule = f"| {' | '.join('-' * width for width in widths)} |"
    return "\n".join(["# Compile matrix", "", _LEGEND.format(version=triton.__version__), text[0], rule, *text[1:], ""])


def record(results: Sequence[Compiled], digest: str | None) -> str:
    """The same as JSON, with all that was read, one compilation per line.

    Args:
        results: the compilations.
        digest: of the sources, if everything is within its limits.
    """
    rows = []
    for result in results:
        c = result.configuration
        row = {"kernel": c.kernel, "case": c.case, "aligned": c.aligned, "architecture": c.architecture}
        row |= {"num_warps": c.options.num_warps, "num_stages": c.options.num_stages}
        row |= asdict(result.resources) if result.resources else {"error": result.error}
        rows.append("  " + json.dumps(row))
    head = f' "triton": {json.dumps(triton.__version__)},\n "sources": {json.dumps(digest)},\n'
    return "{\n" + head + ' "compiled": [\n' + ",\n".join(rows) + "\n ]\n}\n"


def sources_digest() -> str:
    """A hash of the code that determines the matrix and its limits; comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    kernels, here = Path(fedrot_kernels.__file__).parent, Path(__file__).parent
    paths = [kernels / "schedule.py", kernels / "tolerances.py", *kernels.joinpath("triton_backend").glob("*.py")]
    for path in sorted([*paths, *here.glob("compile*.py")], key=lambda path: path.name):
        code = re.sub(r'""".*?"""|^\s*#.*?$|\s', "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
        digest.update(f"{path.name}: {code}\n".encode())
    return digest.hexdigest()


def _cell(result: Compiled) -> str:
    resources = result.resources
    if resources is None:
        return "does not compile"
    scalars = f"+{resources.scalar_spills}" if resources.scalar_spills else ""
    return f"{resources.registers}{scalars} / {resources.shared} / {resources.stack}"


if __name__ == "__main__":
    main()
