#!/usr/bin/env bash
# PyTorch 2.13.0 (x86-64, with MKL): the root, exponential or logarithm of 1,000 numbers starts every thread of the pool.
#
# Elementwise operations are parallel from 32,768 elements on (at::internal::GRAIN_SIZE). A good engineer's guess: below it an
# operation stays in the thread that calls it. Seen: additions of 1,000 numbers and of 20,000 do. torch.sqrt, exp, log, sin,
# erf and tanh of 1,000 numbers, of float32 and of float64, start the OpenMP threads, because they are computed by MKL's vector
# mathematics, which has threads of its own measure (64 numbers start none). Threads that have been started wait actively for a
# while for more work. Other native threads that begin then, as many as there are cores, share the cores with them: a library's
# two threads took 1.3 to 1.8 times as long.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > started.py <<'PY'
import os
import sys

import torch


def started(name, dtype, size):
    """How many threads one operation starts, in a process of its own."""
    read, write = os.pipe()
    if not (child := os.fork()):
        x = torch.full((size,), 0.5, dtype=dtype)
        before = len(os.listdir("/proc/self/task"))
        torch.add(x, x) if name == "add" else getattr(torch, name)(x)
        os.write(write, str(len(os.listdir("/proc/self/task")) - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return int(os.read(read, 16))


if "mkl" not in torch.__config__.show().lower():
    sys.exit("this build of PyTorch has no MKL: not what is described")
torch.set_num_threads(4)
for dtype in (torch.float32, torch.float64):
    found = {name: [started(name, dtype, size) for size in (64, 1000, 20_000)] for name in ("add", "sqrt", "exp", "log", "tanh")}
    print(dtype, "threads started by 64, 1,000 and 20,000 numbers:", found)
    if found.pop("add") != [0, 0, 0]:
        sys.exit("additions start threads: no longer as described")
    if any(few or not many for few, many, _ in found.values()):
        sys.exit("roots of 1,000 numbers start no thread, or of 64 do: no longer as described")
PY
venv/bin/python started.py
echo "as described: small roots, exponentials and logarithms start the whole pool, additions do not"
