"""What fedrot takes an adapter to be: its modules, ranks and scalings, experts, tied weights and saved tensors."""

from collections import Counter

from ..adapters.checks import own_scalings
from ..adapters.config import PREFIX, pattern_name
from ..adapters.experts import parse_module
from ..adapters.layout import Layout
from ..adapters.meaning import start_of
from ..adapters.update import Update


def describe_update(update: Update) -> str:
    """A table of what an adapter's tensors and configuration are taken to be; modules of one kind in one line."""
    layout, config = Layout(update.specs, update.name), update.config
    s = own_scalings(update, layout) if config is not None else {}
    kinds = Counter(
        (_kind(a.module), a.rank, f"{s[a.module]:g}" if s else "unknown", a.d_out, a.d_in) for a in layout.adapters
    )
    lines = [f"{'modules':<40} {'number':>6} {'rank':>5} {'s':>8}  {'shape'}"]
    for (name, rank, scaling, d_out, d_in), n in kinds.items():
        lines.append(f"{name:<40} {n:>6} {rank:>5} {scaling:>8}  {d_out} × {d_in}")
    stacks = Counter((_kind(part), n) for part, n in _find_stacks(update).items())
    lines += [f"experts: {n} in each of {count} {name}, with a rotation each" for (name, n), count in stacks.items()]
    for key, original in update.storage.copies.items():
        if key.endswith("_A"):
            copy, head = (_bare(parse_module(name)) for name in (key, original))
            lines.append(f"tied: {copy} repeats {head}, transposed; counted once")
    if saved := [_bare(key) for key in layout.other_keys]:
        lines.append(f"averaged as they are: {_listed(saved)}")
    if layout.counters:
        lines.append(f"counters, of which the largest is kept: {_listed([_bare(key) for key in layout.counters])}")
    if config is None:
        lines.append("no LoRA configuration: its scaling is unknown, and assumed to be that of all")
    else:
        flags = [name for name in ("use_dora", "use_rslora", "ensure_weight_tying", "velora_config") if config.get(name)]
        if start := start_of(config):
            flags.append(f"init_lora_weights={start!r} (s·B·A is the difference to a changed base)")
        lines += [f"configuration: {', '.join(flags)}"] if flags else []
    return "\n".join(lines)


def _find_stacks(update: Update) -> dict[str, int]:
    """The module of a parameter's first expert → the number of its experts."""
    held = [parts for parts in update.storage.parts.values() if len(parts) > 1]
    return {parse_module(parts[0]): len(parts) for parts in held}


def _kind(module: str) -> str:
    """The end of a module's name that does not depend on its layer."""
    parts = pattern_name(module).split(".")
    last = max((i for i, part in enumerate(parts) if part.isdecimal()), default=-1)
    return ".".join(parts[last + 1 :]) or parts[-1]


def _bare(name: str) -> str:
    return name.removeprefix(PREFIX)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
