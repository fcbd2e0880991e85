#!/usr/bin/env bash
# PyTorch 2.13.0, NumPy 2.4.6: through DLPack the imaginary part of a conjugate changes its sign, and nobody says so.
#
# z.conj() and z.conj().imag copy nothing: the second is a float view of z's memory with a flag that its entries count negative.
# A good engineer's guess: what exports tensors resolves such a view or refuses it, as Tensor.numpy() does. Seen: numpy() raises
# a RuntimeError that names resolve_neg(). np.from_dlpack and torch.from_dlpack take the same tensor and return the memory as it
# lies, with the opposite sign. With resolve_neg() before it both are right.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > sign.py <<'PY'
import numpy as np
import torch

z = torch.tensor([1 + 2j, 3 + 4j])
view = z.conj().imag
assert view.tolist() == [-2.0, -4.0] and view.is_neg()
try:
    view.numpy()
except RuntimeError as error:
    print("numpy():", str(error).splitlines()[0])
    assert "resolve_neg" in str(error)
else:
    raise SystemExit("numpy() took the view: no longer as described")
for name, read in (("np.from_dlpack", np.from_dlpack), ("torch.from_dlpack", torch.from_dlpack)):
    found = read(view).tolist()
    print(f"{name}: {found}, resolved first: {read(view.resolve_neg()).tolist()}")
    if found != [2.0, 4.0]:
        raise SystemExit(f"{name} keeps the sign or refuses: no longer as described")
    assert read(view.resolve_neg()).tolist() == [-2.0, -4.0]
PY
venv/bin/python sign.py
echo "as described: DLPack exports the memory of a negative view without its sign"
