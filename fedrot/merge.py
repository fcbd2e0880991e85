"""Merging adapters that were trained independently, of unequal ranks, scalings and modules, into one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fedrot_kernels import average, full_precision, product_norm, working_dtype

from .adapters.checks import check_range, check_weights, own_scalings
from .adapters.config import rank_fields
from .adapters.keys import TensorSpec
from .adapters.layout import Adapter, Layout
from .adapters.update import StateDict, Update, UpdateLike, open_updates
from .methods.running_mean import shares_of
from .options import AggregationOptions, refuse_old_spellings, whole_number
from .ranks.padding import pad
from .ranks.truncation import truncate
from .ranks.union import check_plain, union_config, union_layout, without_base
from .report.report import AdapterReport, Report
from .report.result import AggregationResult
from .server.aggregator import FedRotAggregator

MergeMethod = Literal["flexlora", "fedrot-least-error"]


def merge(
    adapters: Sequence[UpdateLike],
    weights: Sequence[float] | None = None,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    method: MergeMethod = "flexlora",
    reflections: bool = False,
    names: Sequence[str] | None = None,
    **unknown: Any,
) -> AggregationResult:
    """Merge adapters of one base model that were trained independently: Σ wᵢsᵢBᵢAᵢ, as nearly as one adapter has it.

    Either the best approximation of the sum is computed (FlexLoRA), or the factors are rotated so that averaging them loses
    least (fedrot-least-error) and averaged, module by module those of the adapters that have it. A module that an adapter
    lacks is an update of zero there. Whether the base models are the same shows in shapes only.

    Args:
        adapters: PEFT folders, or pairs of a state dict and its LoRA configuration.
        weights: a non-negative number per adapter; None for equal weights.
        rank: of every module of the result. Larger than the adapters' it is padded with zeros, smaller it is the best
            approximation of the merged adapter (``truncate``). None: in every module the largest of the adapters.
        alpha: the result's lora_alpha. None keeps in every module the s of the first adapter of the largest rank. What the
            result does to the model does not depend on it.
        method: "flexlora", which loses least of all adapters of this rank, and nothing if the rank is as large as the sum of
            theirs, but keeps no adapter's basis; or "fedrot-least-error", which ends in the basis of one.
        reflections: whether fedrot-least-error may use reflections too.
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
            f"merge() takes no option {next(iter(unknown))!r}; it takes rank, alpha, method, reflections and names"
        )
    if rank is not None and not (rank := whole_number("rank", rank)):
        raise ValueError(f"rank must be a whole number from 1, got {rank!r}")
    if alpha is not None and (not isinstance(alpha, Real) or not 0 < alpha < float("inf")):
        raise ValueError(f"alpha must be a positive number, got {alpha!r}")
    if str(method) == "fedrot":
        raise ValueError('method="fedrot" is a spelling of fedrot 0.1; write method="fedrot-least-error"')
    if method not in get_args(MergeMethod):
        raise ValueError(f"method must be one of {', '.join(get_args(MergeMethod))}, got {method!r}")
    options = AggregationOptions(method=method, reflections=reflections)
    opened = open_updates(adapters, names)
    for adapter in opened:
        check_plain(adapter, opened[0])
    values = check_weights(weights, opened)
    opened, base = without_base([adapter for adapter, w in zip(opened, values, strict=True) if w])
    shares = dict(zip((adapter.name for adapter in opened), shares_of([w for w in values if w]), strict=True))
    layout = union_layout(opened, rank or 0)
    s = _scaling(opened, layout)
    merged = _averaged_plain(opened, shares, layout)
    clients: dict[str, list[Update]] = {}
    angles: dict[str, dict[str, float]] = {}
    for some, part in _by_adapters(opened, layout):
        factors = [pad(adapter, part, own_scalings(adapter, part), s) for adapter in some]
        aggregator = FedRotAggregator(method=method, reflections=reflections, report_error=False)
        result = aggregator.aggregate(factors, [shares[adapter.name] for adapter in some])
        total = sum(shares[adapter.name] for adapter in some)
        without_A = {*part.specs} - {a.key_A for a in part.adapters}
        merged |= {key: total * x if key in without_A else x for key, x in result.state_dict.items()}
        for a, measured in zip(part.adapters, result.report.adapters, strict=True):
            clients[a.module] = factors
            angles[a.module] = dict(zip(result.report.clients, measured.angles, strict=True))
    merged = {key: merged[key] for key in layout.specs}
    s_final, ranks = s, {a.module: a.rank if rank is None else rank for a in layout.adapters}
    if alpha is not None:
        s_final = {module: alpha / r for module, r in ranks.items()}
    config = union_config(opened, layout, s)
    final = config | rank_fields(ranks, s_final)
    state_dict = {k: x.to(layout.specs[k].dtype) for k, x in truncate((merged, config), final).items()}
    check_range(state_dict, "the merged adapter,")
    reports = []
    for a in layout.adapters:
        error, norm = _errors(a, clients[a.module], shares, state_dict, s[a.module] / s_final[a.module])
        per_client = tuple(angles[a.module].get(name, 0.0) for name in shares)
        # Errors are those of s·B·A: modules of a large s weigh more in the whole model.
        size = s_final[a.module]
        reports.append(AdapterReport(a.module, ranks[a.module], size * error, size * norm, per_client))
    report = Report(method, 0, tuple(shares), tuple(shares.values()), {}, tuple(reports))
    return AggregationResult(state_dict | base, report, options, final)


def _scaling(adapters: Sequence[Update], layout: Layout) -> dict[str, float]:
    """module → s of the first adapter of the largest rank."""
    scalings = [own_scalings(adapter, layout) for adapter in adapters]
    s = {}
    for a in layout.adapters:
        having = [(x.specs[a.key_A].shape[0], i) for i, x in enumerate(adapters) if a.key_A in x.specs]
        s[a.module] = scalings[max(having, key=lambda pair: pair[0])[1]][a.module]
    return s


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


def _averaged_plain(adapters: Sequence[Update], shares: Mapping[str, float], layout: Layout) -> dict[str, Tensor]:
    """The means of what is no part of LoRA: all adapters have it."""
    keys = [key for key in layout.other_keys if not key.endswith(".lora_B.bias")]
    if not keys:
        return {}
    tensors = [[adapter[key].detach().to(layout.specs[key].dtype) for adapter in adapters] for key in keys]
    means, _ = average(tensors, list(shares.values()))
    return dict(zip(keys, means, strict=True))


@full_precision
def _errors(
    a: Adapter, clients: Sequence[Update], shares: Mapping[str, float], state_dict: StateDict, ratio: float
) -> tuple[float, float]:
    """‖Σ wᵢBᵢAᵢ − result‖_F and ‖Σ wᵢBᵢAᵢ‖_F in float64; the clients' B count ``ratio`` times."""
    A = [client[a.key_A].double().flatten(1) for client in clients]
    B = [shares[client.name] * ratio * client[a.key_B].double().flatten(1) for client in clients]
    A_result, B_result = (state_dict[key].double().flatten(1) for key in (a.key_A, a.key_B))
    error = product_norm(torch.cat([*B, -B_result], 1)[None], torch.cat([*A, A_result])[None])
    return float(error), float(product_norm(torch.cat(B, 1)[None], torch.cat(A)[None]))
