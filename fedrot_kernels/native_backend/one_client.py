"""One client of a stream: its rotations, and its share of the sums."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..sketch import SKETCH_SIZE
from ..types import Rotations
from .call import Call, floats
from .whole_model import Search


def find_rotations(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    *,
    A_ref: Sequence[Tensor] | None,
    B_ref: Sequence[Tensor] | None,
    strength: float,
    reflections: bool,
) -> Rotations:
    """The rotations of adapters of one rank; see ``streams.find_rotations``."""
    of_A, of_B = [[x] for x in A], [[x] for x in B]
    search = Search(Call(of_A, of_B), of_A, of_B, A_ref, B_ref, strength, reflections)
    search.run()
    return Rotations(torch.cat(search.R), search.residual[:, 0], search.undetermined[:, 0])


def add_client(
    sum_A: Sequence[Tensor],
    sum_B: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    R: Tensor | None,
    weight: float,
    seed: int | None,
) -> tuple[Tensor, Tensor] | None:
    """Add a client's factors to sums; see ``streams.add_client_``."""
    call = Call([[x] for x in A], [[x] for x in B])
    finite = torch.empty(len(A), dtype=torch.uint8, device="cpu")
    own = torch.tensor([weight], dtype=torch.float32, device="cpu")
    call.set(A_out=sum_A, B_out=sum_B, adds=1, shares=own, weights=own, finite=finite)
    if R is not None:
        call.set(R=list(R.float().contiguous()))
    sketches = None
    if seed is not None:
        sketches = floats(len(A), 2, call.ranks[0], SKETCH_SIZE)
        call.sketch(seed)
        call.set(sketches=list(sketches))
    call.run()
    return None if sketches is None else (sketches[:, 0], sketches[:, 1])
