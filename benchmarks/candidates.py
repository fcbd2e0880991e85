"""The ways of merging one workload that a table compares, each ready to be called."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import fedrot_kernels as fk
from fedrot_kernels.native_backend.library import INSTRUCTION_SETS

from . import baselines
from .frameworks import others
from .workloads import Inputs

try:
    import fedrot
except ImportError as missing:
    # A machine with PyTorch and nothing else still runs the kernels; ``candidates`` prints what it leaves out.
    WITHOUT_FEDROT: str | None = f"fedrot from state dicts: skipped, {missing}"
else:
    WITHOUT_FEDROT = None

PUBLISHED, DICTIONARY_LOOP, COPY = "published procedure", "dictionary loop", "copy of the same bytes"


@dataclass(frozen=True)
class Candidate:
    """One row of a table.

    Attributes:
        call: does the work once.
        moved: the bytes that this work must move at least.
        aligns: whether it rotates before it averages.
        captures: whether the call can be captured in a CUDA graph.
    """

    call: Callable[[], object]
    moved: int
    aligns: bool
    captures: bool = False


def candidates(inputs: Inputs, strength: float) -> dict[str, Candidate]:
    """Name → candidate: aligning on A with one strength in SO(r), aligning all clients together, or averaging plainly."""
    workload, weights, reference = inputs.workload, inputs.weights, inputs.reference
    example = next(iter(reference.values()))
    aligned, averaged = workload.aligned_bytes(example.dtype), workload.averaged_bytes(example.dtype)
    together = workload.together_bytes(example.dtype)
    stacked, slabs, separate = inputs.stacked_factors, inputs.factors(inputs.slabs), inputs.factors(inputs.separate)
    A_ref = inputs.reference_A
    source, target = baselines.copy_of_bytes(aligned, example.device)
    # On the device from the start: a capture in a CUDA graph allows no copy from the host.
    shares = torch.tensor(weights, device=example.device)

    def align_average(layout, backend: fk.Backend = "auto") -> Candidate:
        A, B = layout
        call = partial(fk.align_average, A, B, shares, A_ref=A_ref, strength=strength, backend=backend)
        return Candidate(call, aligned, True, True)

    def average(layout) -> Candidate:
        tensors = [*layout[0], *layout[1]]
        return Candidate(lambda: fk.average(tensors, shares), averaged, False, True)

    B_ref = [reference[a.keys[1]] for a in workload.adapters]

    def align_together(**options) -> Candidate:
        A, B = separate
        call = partial(fk.align_together, A, B, weights, A_ref=A_ref, B_ref=B_ref, **options)
        return Candidate(call, together, aligns=True)

    def aggregate(method: str, moved: int, report_error: object = False, **robust: object) -> Candidate:
        options = {"method": method, "align_on": "A", "strength": strength, "report_error": report_error} | robust
        call = partial(fedrot.aggregate, inputs.separate, weights, reference, **options)
        return Candidate(call, moved, method != "fedit")

    def stream(**options: object) -> None:
        aggregator = fedrot.FedRotAggregator(reference, align_on="A", strength=strength, **options)
        for update, weight in zip(inputs.separate, weights, strict=True):
            aggregator.add(update, weight)
        aggregator.finish()

    rows = {
        PUBLISHED: Candidate(
            lambda: baselines.published(inputs.separate, weights, reference, strength), aligned, aligns=True
        ),
        DICTIONARY_LOOP: Candidate(lambda: baselines.dictionary_loop(inputs.separate, weights), averaged, aligns=False),
    }
    if WITHOUT_FEDROT is None:
        rows["fedrot, state dicts"] = aggregate("fedrot", aligned)
        rows["fedrot, default report"] = aggregate("fedrot", aligned, "estimate")
        rows["fedrot, exact report"] = aggregate("fedrot", aligned, True)
        rows["fedrot, geometric median"] = aggregate("fedrot", aligned, robust="geometric-median")
        rows["fedrot, one by one"] = Candidate(partial(stream, report_error=False), aligned, aligns=True)
        rows["fedrot, one by one, default report"] = Candidate(stream, aligned, aligns=True)
        rows["fedrot-consensus, state dicts"] = aggregate("fedrot-consensus", together)
        rows["fedrot-least-error, state dicts"] = aggregate("fedrot-least-error", together)
        rows["fedit, state dicts"] = aggregate("fedit", averaged)
        rows["fedit, default report"] = aggregate("fedit", averaged, "estimate")
    rows |= {name: Candidate(call, averaged, aligns=False) for name, call in others(inputs.separate, weights).items()}
    rows |= {
        f"align_average, separate, {backend}": align_average(separate, backend)
        for backend in ("native", "torch")
        if example.device.type == "cpu" and (backend == "torch" or fk.backends()["native"] in INSTRUCTION_SETS)
    }
    return rows | {
        "align_average, separate": align_average(separate),
        "align_average, slabs": align_average(slabs),
        "align_average, stacked": align_average(stacked),
        "adaptive strength, separate": align_together(target="reference", on="A", strength=None),
        "consensus, separate": align_together(target="consensus"),
        "least error, separate": align_together(target="error"),
        "average, separate": average(separate),
        "average, slabs": average(slabs),
        "average, stacked": average(stacked),
        "batched SVD + bmm, stacked": Candidate(
            lambda: baselines.batched_svd(*stacked, weights, A_ref, strength), aligned, aligns=True
        ),
        "_foreach average, slabs": Candidate(
            lambda: baselines.foreach_average(inputs.slabs, weights), averaged, aligns=False
        ),
        "shares @ stacked": Candidate(lambda: baselines.stacked_average(inputs.stacked, weights), averaged, aligns=False),
        COPY: Candidate(lambda: target.copy_(source), aligned, aligns=False),
    }
