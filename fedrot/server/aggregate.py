"""Aggregating the updates of one round."""

from collections.abc import Sequence
from typing import Any

from ..adapters.update import UpdateLike
from ..options import shows_options
from ..report.result import AggregationResult
from .aggregator import FedRotAggregator


@shows_options()
def aggregate(
    updates: Sequence[UpdateLike],
    weights: Sequence[float] | None = None,
    reference: UpdateLike | None = None,
    *,
    round: int = 0,
    configs: Any = None,
    **options: Any,
) -> AggregationResult:
    """Merge the LoRA adapters of several clients into one.

    Ā = Σ wᵢ RᵢᵀAᵢ and B̄ = Σ wᵢ BᵢRᵢ with rotations Rᵢ towards the reference (FedRot-LoRA, arXiv 2602.23638), Rᵢ = I
    (FedIT), or what another of ``fedrot.METHODS`` makes of them; every other tensor is averaged. Deterministic: the same
    inputs give the same bits.

    Variants of LoRA that a rotation would break, and clients whose factors mean different things, are refused as far as
    keys, shapes and configurations show them. A bare state dict does not tell block-diagonal factors, nor how many experts a
    factor of ``target_parameters`` holds: pass those as folders, or with ``configs``.

    Args:
        updates: for every client a PEFT state dict (as from ``peft.get_peft_model_state_dict`` or with the adapter's name
            in the keys), a PEFT folder, or a pair of a state dict and its LoRA configuration. float16, bfloat16, float32 or
            float64. All clients must be alike, but for ranks and scalings in the "fedrot" methods and those that combine all
            factors ("flexlora", "glora", "flora", "fedex-lora", "fedmomentum", "flora-na"), which then need
            the clients' configurations.
        weights: a non-negative number per update, such as the client's example count; None for equal weights.
        reference: the global adapter that the clients started from, in either form. None is for clients without a common
            start: "fedrot" then takes their consensus, as "fedrot-consensus" does, and in other methods that rotate the
            update of the largest weight stands in for it (the first of several; of the largest ranks, where they differ).
        round: the round's index, from 0, which no call can know by itself. It decides what ``align_on="alternate"`` aligns,
            what RoLoRA trained and what is drawn at random.
        configs: the LoRA configuration of state dicts, a ``peft.LoraConfig`` for all or one each: needed where s of
            ΔW = s·B·A plays a part (FLoRA, FedEx-LoRA, FedMomentum, unequal ranks or scalings), and for experts. Folders
            have theirs.
        **options: fields of ``AggregationOptions``: ``method``, ``strength``, ``align_on`` and others.

    Returns:
        The merged adapter with a report.

    Raises:
        UpdateError: updates that cannot be averaged, by client, key and shapes.
        ValueError: an unknown method, or a value that an option does not take.
        TypeError: a keyword that is no option.
    """
    return FedRotAggregator(reference, round=round, configs=configs, **options).aggregate(updates, weights)
