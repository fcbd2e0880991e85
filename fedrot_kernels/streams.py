"""The clients of a stream, one by one: their rotations towards a reference, and their shares of sums that are kept."""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import check_adapters
from .dispatch import are_compiled, use_native
from .native_backend.library import instruction_set
from .native_backend.stream import ClientTensors, Stream
from .precision import full_precision
from .rotations import frame_rotations
from .sketch import sketch
from .tolerances import FACTOR_FLOOR
from .types import Backend, Rotations


@full_precision
def find_rotations(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    *,
    A_ref: Sequence[Tensor] | None,
    B_ref: Sequence[Tensor] | None,
    strength: float = 1.0,
    reflections: bool = False,
    rank_mask: Tensor | None = None,
    backend: Backend = "auto",
) -> Rotations:
    """Find one client's rotations towards a reference, of G adapters of one shape.

    Args:
        A: G tensors (r, d_in).
        B: G tensors (d_out, r).
        A_ref, B_ref: G tensors each, or None for a factor that does not count; at least one. See ``align_average``.
        strength: λ of ``soften``.
        reflections: False for SO(r), True for O(r).
        rank_mask: (G, r, 1), as in ``frame_rotations``.
        backend: as in ``align_average``.

    Raises:
        ValueError, TypeError: as for ``align_average``.

    Returns:
        R (G, r, r), residuals and undetermined directions (G,); see ``Rotations``.
    """
    check_adapters([[x] for x in A], [[x] for x in B], A_ref, B_ref)
    if rank_mask is None and use_native(backend, A, A[0].shape[0]):
        from .native_backend.one_client import find_rotations as native  # not at the top: it imports the torch backend

        return native(A, B, A_ref=A_ref, B_ref=B_ref, strength=strength, reflections=reflections)
    pairs = [] if A_ref is None else [(A, A_ref)]
    frames = [(torch.stack([*F]), torch.stack([*F_ref])) for F, F_ref in pairs]
    if B_ref is not None:
        frames.append((torch.stack([*B]).mT, torch.stack([*B_ref]).mT))
    counted = [x for x in ((A, A_ref), (B, B_ref)) if x[1] is not None]
    floors = [max(FACTOR_FLOOR[x[g].dtype] for pair in counted for x in pair if x is not None) for g in range(len(A))]
    floor = torch.tensor(floors, dtype=torch.float64, device="cpu")
    return frame_rotations(frames, strength=strength, reflections=reflections, rank_mask=rank_mask, floor=floor)


@full_precision
def add_client_(
    sum_A: Sequence[Tensor] | Tensor,
    sum_B: Sequence[Tensor] | Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    R: Tensor | None,
    weight: float,
    *,
    sketch_seed: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor] | None:
    """Add weight · RᵀA to sum_A and weight · B R to sum_B, in place, of G adapters of one shape.

    Args:
        sum_A: G tensors (r, d_in), float32 or float64.
        sum_B: G tensors (d_out, r), likewise.
        A: G tensors (r, d_in).
        B: G tensors (d_out, r).
        R: (G, r, r), or None for no rotation.
        weight: the client's weight.
        sketch_seed: the seed of the sketches to return, or None.
        backend: as in ``align_average``. Sums that are not contiguous float32 are added to by PyTorch.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.

    Returns:
        The sketches of Bᵀ and of A as they came, (G, r, 32) each; None without a seed.
    """
    check_adapters([[x] for x in A], [[x] for x in B], None, None)
    (r, d_in), G, sums_A, sums_B = A[0].shape, len(A), list(sum_A), list(sum_B)
    given = {"sum_A": (sums_A, (r, d_in)), "sum_B": (sums_B, (B[0].shape[0], r))}
    given |= {} if R is None else {"R": (list(R), (r, r))}
    for name, (tensors, shape) in given.items():
        if len(tensors) != G or any(x.shape != shape for x in tensors):
            found = " and ".join(str(shape) for shape in {tuple(x.shape) for x in tensors})
            raise ValueError(f"{name} is {len(tensors)} of {found}, but {G} adapters of these shapes have {shape}")
    direct = all(x.dtype == torch.float32 and x.is_contiguous() for x in (*sums_A, *sums_B))
    if direct and use_native(backend, A, r):
        from .native_backend.one_client import add_client

        return add_client(sums_A, sums_B, A, B, R, weight, sketch_seed)
    stacked_A, stacked_B = torch.stack([*A]), torch.stack([*B])
    turned_A, turned_B = stacked_A, stacked_B
    if R is not None:
        turned_A = R.mT.to(sums_A[0].dtype) @ stacked_A.to(sums_A[0].dtype)
        turned_B = stacked_B.to(sums_B[0].dtype) @ R.to(sums_B[0].dtype)
    torch._foreach_add_(sums_A, list(turned_A), alpha=weight)
    torch._foreach_add_(sums_B, list(turned_B), alpha=weight)
    if sketch_seed is None:
        return None
    return sketch(stacked_B.mT, "B", sketch_seed), sketch(stacked_A, "A", sketch_seed)


def open_stream(
    clients: ClientTensors,
    sums: Sequence[Tensor],
    undetermined: "array[int]",
    directions: "array[int]",
) -> Stream | None:
    """A stream by the compiled library, which looks at a client in one call and adds it in another.

    Args:
        clients, sums, undetermined, directions: see ``Stream``.

    Returns:
        None if the library is not there, or does not take such tensors.
    """
    ranks = [r for r, _, _ in clients.shapes]
    if (
        instruction_set() is None
        or any(x.device.type != "cpu" for x in sums)
        or not are_compiled(clients.dtypes, max(ranks))
    ):
        return None
    return Stream(clients, sums, undetermined, directions)
