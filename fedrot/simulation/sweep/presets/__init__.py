"""Comparisons by name, one YAML file each, whose first line describes it. Names that begin with _ are bases of others."""

from functools import reduce
from importlib.resources import files
from typing import Any

import yaml

from ..layers import overlay


def load_preset(name: str) -> dict[str, Any]:
    """Load the options of a preset, laid over those of the presets that its key ``preset`` names: one, or a list of them.

    Raises:
        ValueError: no such preset.
    """
    file = files(__name__) / f"{name}.yaml"
    if not file.is_file():
        raise ValueError(f"there is no preset {name!r}; the presets are {', '.join(describe_presets())}")
    options = yaml.safe_load(file.read_text("utf-8"))
    bases = options.pop("preset", [])
    layers = [load_preset(base) for base in ([bases] if isinstance(bases, str) else bases)]
    return reduce(overlay, [*layers, options], {})


def describe_presets() -> dict[str, str]:
    """List the presets that can be run: name → description."""
    found = {f.name.removesuffix(".yaml"): f for f in files(__name__).iterdir() if f.name.endswith(".yaml")}
    return {
        name: found[name].read_text("utf-8").splitlines()[0].removeprefix("# ")
        for name in sorted(found)
        if not name.startswith("_")
    }
