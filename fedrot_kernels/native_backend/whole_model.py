"""Alignment and averaging of a whole model in one call, adapter by adapter while its factors are in the cache."""

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import normalize_weights
from ..schedule import SHORT
from ..tolerances import CONVERGED
from ..torch_backend.exact import ExactProducts
from ..torch_backend.procrustes import rotations
from ..types import Aligned, Clients
from .library import INSTRUCTION_SETS, Careful, Problem, load

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def align_average(
    A: Sequence[Clients],
    B: Sequence[Clients],
    weights: Sequence[float] | Tensor,
    *,
    A_ref: Sequence[Tensor] | None,
    B_ref: Sequence[Tensor] | None,
    strength: float,
    reflections: bool,
    instructions: str | None = None,
) -> Aligned:
    """Align and average checked factors on a CPU; see ``dispatch.align_average``.

    Args:
        A, B, weights, A_ref, B_ref, strength, reflections: as there.
        instructions: the instruction set, at most what the machine has; by default that.
    """
    library, L, n = load(), len(A), len(A[0])
    assert library is not None
    level = library.fedrot_level() if instructions is None else INSTRUCTION_SETS.index(instructions)
    shares = normalize_weights(weights, n, torch.device("cpu")).float()
    exact = ExactProducts(A, B, A_ref, B_ref)
    ranks = [clients[0].shape[0] for clients in A]
    R = [torch.empty(n, r, r) for r in ranks]
    mean_A, mean_B = ([torch.empty(clients[0].shape, dtype=clients[0].dtype) for clients in x] for x in (A, B))
    residual, undetermined = torch.empty(L, n), torch.empty(L, n, dtype=torch.int64)
    doubtful, finite = torch.empty(L, n, dtype=torch.uint8), torch.empty(L, dtype=torch.uint8)
    failures: list[BaseException] = []

    @torch.no_grad()
    def careful(adapter: int) -> int:
        """Find the rotations of an adapter that Newton–Schulz does not."""
        try:
            clients = doubtful[adapter].nonzero().squeeze(-1)
            M = torch.stack([exact(adapter, i) for i in clients.tolist()])
            found = rotations(M, strength=strength, reflections=reflections, floor=exact.floors[adapter])
            R[adapter][clients] = found.R.float()
            residual[adapter, clients] = found.residual.float()
            undetermined[adapter, clients] = found.undetermined
        except BaseException as error:  # raised again below: it cannot pass through C++
            failures.append(error)
            return 1
        return 0

    kept: list[object] = []  # copies and tables live until the call is over
    shapes = [size for a, b in zip(A, B, strict=True) for size in (*a[0].shape, b[0].shape[0])]
    problem = Problem(
        L,
        n,
        reflections,
        torch.get_num_threads(),
        len(SHORT),
        strength,
        CONVERGED[torch.float32],
        _table("q", shapes, kept),
        _table("i", [DTYPES[clients[0].dtype] for clients in A], kept),
        _addresses([x for clients in A for x in clients], kept),
        _addresses([x for clients in B for x in clients], kept),
        None if A_ref is None else _addresses([x.detach().to("cpu", torch.float32) for x in A_ref], kept),
        None if B_ref is None else _addresses([x.detach().to("cpu", torch.float32) for x in B_ref], kept),
        shares.data_ptr(),
        _table("f", [c for step in SHORT for c in step], kept),
        _addresses(R, kept),
        residual.data_ptr(),
        undetermined.data_ptr(),
        doubtful.data_ptr(),
        _addresses(mean_A, kept),
        _addresses(mean_B, kept),
        finite.data_ptr(),
        Careful(careful),
        None,
    )
    if library.fedrot_align_average(ctypes.byref(problem), level):
        raise failures[0]
    return Aligned(mean_A, mean_B, R, residual, undetermined, finite.all())


def _table(kind: str, values: Sequence[float], kept: list[object]) -> int:
    """The address of an array of these values."""
    table = array(kind, values)
    kept.append(table)
    return table.buffer_info()[0]


def _addresses(tensors: Sequence[Tensor], kept: list[object]) -> int:
    """The address of a table of the tensors' addresses; tensors that are not contiguous are copied."""
    contiguous = [x if x.is_contiguous() else x.contiguous() for x in tensors]
    kept.append(contiguous)
    return _table("Q", [x.data_ptr() for x in contiguous], kept)
