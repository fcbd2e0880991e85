"""Merging adapters that were trained independently, of unequal ranks, scalings and modules, into one."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fedrot_kernels import full_precision, product_norm, working_dtype

from ..adapters.checks import own_scalings
from ..adapters.config import rank_fields
from ..adapters.keys import TensorSpec
from ..adapters.layout import Adapter, Layout
from ..adapters.update import StateDict, Update, UpdateLike
from ..adapters.values import check_range
from ..options import AggregationOptions, refuse_old_spellings, whole_number
from ..ranks.padding import pad
from ..ranks.truncation import truncate_update
from ..report.report import AdapterReport, Report
from ..report.result import AggregationResult
from ..server.aggregator import FedRotAggregator
from .plan import MergePlan, plan_merge
from .saved import ModulesToSave

MergeMethod = Literal["flexlora", "fedrot-least-error"]


def merge(
    adapters: Sequence[UpdateLike],
    weights: Sequence[float] | None = None,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    method: MergeMethod = "flexlora",
    reflections: bool = False,
    normalize: bool = True,
    modules_to_save: ModulesToSave = "mean",
    base: str | os.PathLike[str] | None = None,
    rename: Mapping[str, str] | None = None,
    names: Sequence[str] | None = None,
    **unknown: Any,
) -> AggregationResult:
    """Merge adapters of one base model that were trained independently: Σ wᵢsᵢBᵢAᵢ, as nearly as one adapter has it.

    Either the best approximation of the sum is computed (FlexLoRA), or the factors are rotated so that averaging them loses
    least (fedrot-least-error) and averaged, module by module those of the adapters that have it. A module that an adapter
    lacks is an update of zero there. Whether the base models are the same shows in shapes only; unlike names of them are
    warned of.

    Args:
        adapters: PEFT folders, or pairs of a state dict and its LoRA configuration.
        weights: a number per adapter, negative to subtract it; None for equal weights.
        rank: of every module of the result. Larger than the adapters' it is padded with zeros, smaller it is the best
            approximation of the merged adapter (``truncate``). None: in every module the largest of the adapters.
        alpha: the result's lora_alpha, one for all modules; B absorbs the rest of each s. None takes the most frequent of
            the adapters'. What the result does to the model does not depend on it.
        method: "flexlora", which loses least of all adapters of this rank, and nothing if the rank is as large as the sum of
            theirs, but keeps no adapter's basis; or "fedrot-least-error", which ends in the basis of one.
        reflections: whether fedrot-least-error may use reflections too.
        normalize: whether weights are divided by their sum. False adds s·B·A as they are weighted (task arithmetic).
        modules_to_save: what becomes of tensors that are no LoRA factors (heads, saved modules, biases, trained tokens):
            "mean", by the weights divided by their sum; "first", those of the first adapter that has them; or "drop".
        base: the base model's folder, whose tensors stand for those that an adapter lacks in a mean.
        rename: what names of modules begin with → what they are to begin with, for adapters of unlike versions of one
            model's code; {} if unlike names are of unlike modules.
        names: one per adapter, for errors and the report.

    Returns:
        The merged adapter, with its configuration and a report, whose errors are those of s·B·A and include what a smaller
        rank loses.

    Raises:
        TypeError: another keyword.
        ValueError: a value that a keyword does not take, or an option of fedrot 0.1, with what to write instead.
        UpdateError: adapters that do not fit each other, or whose update is not a plain s·B·A (DoRA, PiSSA, …).
    """
    refuse_old_spellings(unknown)
    if unknown:
        raise TypeError(
            f"merge() takes no option {next(iter(unknown))!r}; it takes rank, alpha, method, reflections, normalize, "
            "modules_to_save, base, rename and names"
        )
    if rank is not None and not (rank := whole_number("rank", rank)):
        raise ValueError(f"rank must be a whole number from 1, got {rank!r}")
    if alpha is not None and (not isinstance(alpha, Real) or not 0 < alpha < float("inf")):
        raise ValueError(f"alpha must be a positive number, got {alpha!r}")
    if str(method) == "fedrot":
        raise ValueError('method="fedrot" is a spelling of fedrot 0.1; write method="fedrot-least-error"')
    if method not in get_args(MergeMethod):
        raise ValueError(f"method must be one of {', '.join(get_args(MergeMethod))}, got {method!r}")
    if modules_to_save not in get_args(ModulesToSave):
        raise ValueError(f"modules_to_save must be one of {', '.join(get_args(ModulesToSave))}, got {modules_to_save!r}")
    plan = plan_merge(
        adapters,
        weights,
        names,
        rank=rank or 0,
        normalize=normalize,
        modules_to_save=modules_to_save,
        base=base,
        renaming=rename,
    )
    return merge_planned(plan, AggregationOptions(method=method, reflections=reflections), rank, alpha)


def merge_planned(plan: MergePlan, options: AggregationOptions, rank: int | None, alpha: float | None) -> AggregationResult:
    """Merge adapters that have been opened and checked; see ``merge``."""
    layout, s = plan.layout, plan.scalings
    merged: dict[str, Tensor] = {}
    clients: dict[str, list[Update]] = {}
    angles: dict[str, dict[str, float]] = {}
    for some, part in _by_adapters(plan.adapters, layout):
        factors = [pad(adapter, part, _signed(adapter, part, plan), s) for adapter in some]
        sizes = [abs(plan.weights[adapter.name]) for adapter in some]
        aggregator = FedRotAggregator(method=options.method, reflections=options.reflections, report_error=False)
        result = aggregator.aggregate(factors, sizes)
        without_A = {*part.specs} - {a.key_A for a in part.adapters}
        merged |= {key: sum(sizes) * x if key in without_A else x for key, x in result.state_dict.items()}
        for a, measured in zip(part.adapters, result.report.adapters, strict=True):
            clients[a.module] = factors
            angles[a.module] = dict(zip(result.report.clients, measured.angles, strict=True))
    ranks = {a.module: a.rank if rank is None else rank for a in layout.adapters}
    if alpha is None:
        alpha = Counter(round(s[module] * r, 9) for module, r in ranks.items()).most_common(1)[0][0]
    s_final = {module: alpha / r for module, r in ranks.items()}
    ratios = {module: s[module] / s_final[module] for module in s}
    specs = {key: layout.specs[key] for key in merged}
    whole = Update("the merged adapter", specs, {key: key for key in specs}, merged, plan.adapters[0].device)
    state_dict = {k: x.to(layout.specs[k].dtype) for k, x in truncate_update(whole, layout, ranks, ratios).items()}
    check_range(state_dict, "the merged adapter,")
    reports = []
    sizes_by_name = {name: abs(w) for name, w in plan.weights.items()}
    for a in layout.adapters:
        error, norm = _errors(a, clients[a.module], sizes_by_name, state_dict, ratios[a.module])
        per_client = tuple(angles[a.module].get(name, 0.0) for name in plan.weights)
        # Errors are those of s·B·A: modules of a large s weigh more in the whole model.
        size = s_final[a.module]
        reports.append(AdapterReport(a.module, ranks[a.module], size * error, size * norm, per_client))
    target = None if options.method == "flexlora" else "each other, so that averaging loses least"
    report = Report(options.method, None, tuple(plan.weights), tuple(plan.weights.values()), {}, tuple(reports), target)
    tied = plan.storage.tied_modules.items()
    ranks |= {copy: ranks[module] for copy, module in tied}
    final = plan.config | rank_fields(ranks, s_final | {copy: s_final[module] for copy, module in tied})
    return AggregationResult(plan.storage.pack(state_dict | plan.saved), report, options, final)


def _signed(adapter: Update, layout: Layout, plan: MergePlan) -> dict[str, float]:
    """module → s of an adapter, negative if it is subtracted: −s·B·A is an update like any other, of the factor −B."""
    sign = -1.0 if plan.weights[adapter.name] < 0 else 1.0
    return {module: sign * s for module, s in own_scalings(adapter, layout).items()}


def _by_adapters(adapters: Sequence[Update], layout: Layout) -> list[tuple[list[Update], Layout]]:
    """Modules that the same adapters have, together: those adapters, and the layout of those modules in wide dtypes."""
    groups: dict[tuple[int, ...], dict[str, TensorSpec]] = {}
    for a in layout.adapters:
        having = tuple(i for i, adapter in enumerate(adapters) if a.key_A in adapter.specs)
        for key in (a.key_A, a.key_B, f"{a.module}.lora_B.bias"):
            if key in layout.specs:
                spec = layout.specs[key]
                groups.setdefault(having, {})[key] = replace(spec, dtype=working_dtype(spec.dtype))
    return [([adapters[i] for i in having], Layout(specs, "the merged adapter")) for having, specs in groups.items()]


@full_precision
def _errors(
    a: Adapter, clients: Sequence[Update], sizes: Mapping[str, float], state_dict: StateDict, ratio: float
) -> tuple[float, float]:
    """‖Σ wᵢBᵢAᵢ − result‖_F and ‖Σ wᵢBᵢAᵢ‖_F in float64; the clients' B count ``ratio`` times."""
    A = [client[a.key_A].double().flatten(1) for client in clients]
    B = [sizes[client.name] * ratio * client[a.key_B].double().flatten(1) for client in clients]
    A_result, B_result = (state_dict[key].double().flatten(1) for key in (a.key_A, a.key_B))
    error = product_norm(torch.cat([*B, -B_result], 1)[None], torch.cat([*A, A_result])[None])
    return float(error), float(product_norm(torch.cat(B, 1)[None], torch.cat(A)[None]))
