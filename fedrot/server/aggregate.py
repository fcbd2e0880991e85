"""Aggregating the updates of one round."""

from collections.abc import Sequence
from typing import Any, Literal

from fedrot_kernels import Backend

from ..adapters.update import UpdateLike
from ..options import AlignOn, RotationGroup, Strength
from ..report.result import AggregationResult
from .aggregator import FedRotAggregator
from .validation import OnInvalid


def aggregate(
    updates: Sequence[UpdateLike],
    weights: Sequence[float] | None = None,
    reference: UpdateLike | Literal["consensus"] | None = None,
    *,
    previous: UpdateLike | None = None,
    method: str = "fedrot",
    align_on: AlignOn = "alternate",
    round: int = 0,
    strength: Strength | None = None,
    group: RotationGroup = "SO",
    on_invalid: OnInvalid = "raise",
    backend: Backend = "auto",
    report_error: bool = True,
    configs: Any = None,
    seed: int = 0,
) -> AggregationResult:
    """Merge the LoRA adapters of several clients into one.

    Ā = Σ wᵢ RᵢᵀAᵢ and B̄ = Σ wᵢ BᵢRᵢ with rotations Rᵢ towards the reference (FedRot-LoRA, arXiv 2602.23638), Rᵢ = I
    (FedIT), or what another of ``fedrot.METHODS`` makes of them; every other tensor is averaged. Deterministic: the same
    inputs give the same bits.

    Variants of LoRA that a rotation would break are refused as far as keys, shapes and a folder's configuration show
    them. A bare state dict does not tell block-diagonal factors, nor ``target_parameters`` of a module that is not
    called "experts": pass those as folders.

    Args:
        updates: for every client a PEFT state dict (as from ``peft.get_peft_model_state_dict`` or with the adapter's name
            in the keys), a PEFT folder, or a pair of a state dict and its LoRA configuration. float16, bfloat16, float32 or
            float64; all clients alike, but for their ranks and scalings in "fedrot" (see ``padding``), "flexlora", "flora"
            and "fedex-lora", which then need their configurations.
        weights: a non-negative number per update, such as its example count; None for equal weights.
        reference: the global adapter that the clients started from, in either form. None takes the update of the largest
            weight (the first of several; of the largest ranks, where they differ), for clients without a common start. The
            word "consensus" rotates the clients towards each other instead (generalised Procrustes), by both factors unless
            ``align_on`` is one of them.
        previous: with the reference "consensus", the global adapter that the clients started from, if there is one: the
            result is finally rotated towards it, so that its basis stays from round to round. None takes the update of the
            largest weight.
        method: a name in ``fedrot.METHODS``.
        align_on: the factor to align: "A", "B", "alternate" (odd rounds A, even rounds B) or "joint". "error": no distance
            to the reference, but the aggregation error itself is made least; the reference, or ``previous``, fixes the basis
            of the result.
        round: the round's number, from 0: decides what "alternate" aligns, what RoLoRA trained and what is drawn at random.
        strength: λ; 0 is FedIT, bit for bit, 1 the full Procrustes rotation. "auto" chooses one for every adapter, of
            those whose aggregation error is within 1 % of the least the λ nearest the last round's (0.5 in the first). None
            is the paper's 0.5, and 1 with "consensus" and "error".
        group: "SO" (rotations) or "O" (reflections too); with "error" also "GL", invertible matrices (experimental).
        on_invalid: "raise" on NaN or Inf in an update, or "drop" that client and report it.
        backend: "triton", "torch", or "auto": Triton for tensors on a GPU, as far as it takes their dtype and rank.
        report_error: False leaves the aggregation error out of the report, which then costs next to nothing.
        configs: the LoRA configuration of state dicts, a ``peft.LoraConfig`` for all or one each: needed where s of
            ΔW = s·B·A plays a part (FLoRA, FedEx-LoRA, and FedRot and FlexLoRA of unequal ranks or scalings). Folders have
            theirs.
        seed: of the random rotations, and of what FLoRA draws anew.

    Returns:
        The merged adapter with a report.

    Raises:
        UpdateError: updates that cannot be averaged, by client, key and shapes.
        ValueError: an unknown method or option.
    """
    aggregator = FedRotAggregator(
        reference,
        previous=previous,
        method=method,
        align_on=align_on,
        round=round,
        strength=strength,
        group=group,
        on_invalid=on_invalid,
        backend=backend,
        report_error=report_error,
        configs=configs,
        seed=seed,
    )
    return aggregator.aggregate(updates, weights)
