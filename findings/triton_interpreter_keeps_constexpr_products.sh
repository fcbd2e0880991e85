#!/usr/bin/env bash
# Triton 3.7.1, TRITON_INTERPRET=1: a global constexpr times a tensor is a constexpr again, and tl.store refuses it.
#
# A kernel reads a global only if it is a tl.constexpr. A good engineer's guess: SCALE * x and x * SCALE are one thing, and what
# compiles is what the interpreter runs. Seen: both orders compile for sm_90. Interpreted, x * SCALE is a tensor, but SCALE * x is
# a constexpr that holds a tensor. Arithmetic takes it for a tensor, so kernels that add it to something work; stored or returned
# as it is, it ends in an InterpreterError, "cannot convert … of type <class 'triton.language.core.tensor'> to tensor", whose text
# names the type that it asks for. Writing the tensor first runs both ways.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 triton==3.7.1 numpy==2.4.6
cat > kernels.py <<'PY'
import triton
import triton.language as tl

SCALE = tl.constexpr(0.5)


@triton.jit
def constexpr_first(p_out):
    i = tl.arange(0, 4)
    tl.store(p_out + i, SCALE * i.to(tl.float32))


@triton.jit
def tensor_first(p_out):
    i = tl.arange(0, 4)
    tl.store(p_out + i, i.to(tl.float32) * SCALE)


@triton.jit
def constexpr_first_then_added(p_out):
    i = tl.arange(0, 4)
    tl.store(p_out + i, tl.zeros((4,), tl.float32) + SCALE * i.to(tl.float32))
PY
cat > compiled.py <<'PY'
import triton
from kernels import constexpr_first, constexpr_first_then_added, tensor_first
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

for kernel in (constexpr_first, tensor_first, constexpr_first_then_added):
    source = ASTSource(fn=kernel, signature={"p_out": "*fp32"}, constexprs={})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    print("compiled:", kernel.fn.__name__)
PY
cat > interpreted.py <<'PY'
import torch
from kernels import constexpr_first, constexpr_first_then_added, tensor_first
from triton.runtime.errors import InterpreterError

for kernel in (tensor_first, constexpr_first_then_added):
    out = torch.empty(4)
    kernel[(1,)](out)
    assert out.tolist() == [0.0, 0.5, 1.0, 1.5], out
try:
    constexpr_first[(1,)](torch.empty(4))
except InterpreterError as error:
    said = str(error).replace("\\n", " ")
    print("interpreted:", said)
    assert "cannot convert" in said and "triton.language.core.tensor" in said, said
else:
    raise SystemExit("the interpreter stored SCALE * x: no longer as described")
PY
venv/bin/python compiled.py
TRITON_INTERPRET=1 venv/bin/python interpreted.py
echo "as described: both orders compile; interpreted, the constexpr has to stand last"
