"""Alignment on the client: one update, rotated before it is sent."""

from typing import Any

import torch
from torch import Tensor

from fedrot_kernels import full_precision, rotate_add_

from ..adapters.checks import open_reference
from ..adapters.layout import Layout
from ..adapters.update import UpdateLike, open_update
from ..adapters.values import check_range, not_finite
from ..errors import UpdateError
from ..options import OF_ALIGNMENT, AggregationOptions, shows_options, whole_number
from .fedrot import FedRot
from .rotation import aligned_factors, rotations


@shows_options(*OF_ALIGNMENT)
@full_precision
def align(update: UpdateLike, reference: UpdateLike, *, round: int = 0, **options: Any) -> dict[str, Tensor]:
    """Rotate one client's update towards the reference: for clients that rotate before they send.

    The plain average of aligned updates is what ``aggregate`` returns with the same options, to the rounding of the dtype.
    Every B·A stays what it was, to the rounding of the dtype.

    Args:
        update: the client's PEFT state dict or folder.
        reference: the global adapter that the client started from, likewise.
        round: the round's index, from 0.
        **options: ``align_on``, ``strength`` and ``reflections`` of ``AggregationOptions``.

    Returns:
        A state dict of the update's keys, shapes and dtypes; tensors that are no factors (heads, biases, magnitudes) as they
        came.

    Raises:
        UpdateError: NaN or Inf in a factor, or a reference with other adapters.
        ValueError: a value that an option does not take.
        TypeError: another option, which plays no part on a client.
    """
    chosen = AggregationOptions.of_alignment(options)
    strength = FedRot.default_strength if chosen.strength is None else chosen.strength
    client = open_update(update, "the update")
    layout = Layout(client.specs, client.name)
    target = open_reference(reference, client, layout)
    if found := not_finite(client):
        raise UpdateError(f"{client.name}, {found}")
    aligned = {key: client[key].detach() for key in client}
    on = aligned_factors(chosen.align_on, whole_number("round", round))
    if strength == 0:
        return client.as_given(aligned)
    for group in layout.groups:
        R = rotations(group, client, target, on, strength, reflections=chosen.reflections).R
        A, B = group.A(client), group.B(client)
        A_aligned = rotate_add_(torch.zeros_like(A, dtype=R.dtype), A, R, 1.0)
        B_aligned = rotate_add_(torch.zeros_like(B, dtype=R.dtype).mT, B.mT, R, 1.0).mT
        for i, a in enumerate(group.adapters):
            for key, factor in ((a.key_A, A_aligned[i]), (a.key_B, B_aligned[i])):
                spec = layout.specs[key]
                aligned[key] = factor.to(spec.dtype).reshape(spec.shape).clone()
    result = client.as_given(aligned)
    check_range(result, f"{client.name}, aligned,")
    return result
