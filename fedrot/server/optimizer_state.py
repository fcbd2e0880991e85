"""The state of a server optimizer, checked before it is loaded: of this optimizer, and of this adapter."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..adapters.values import is_finite

# What a state holds of a tensor beside its value, and whether in the shape of the tensor or as one number.
_MOMENTS = {"momentum": {"momentum_buffer": True}, "adam": {"exp_avg": True, "exp_avg_sq": True, "step": False}}


def check_state(state: Mapping[str, Tensor], optimizer: str) -> None:
    """Raise ValueError unless tensors are values and moments of an optimizer of this name, all moments or none of each."""
    if not isinstance(state, Mapping):
        raise ValueError(f"the server optimizer's state is {type(state).__name__}; pass what state_dict() returned")
    moments = _MOMENTS[optimizer]
    held: dict[str, set[str]] = {}
    for full, x in state.items():
        name, _, key = full.partition(".") if isinstance(full, str) else ("", "", "")
        if (name != "value" and name not in moments) or not key or not isinstance(x, Tensor):
            raise ValueError(
                f"{full!r} is not of the state of a server optimizer of the name {optimizer}; pass what state_dict() of one "
                "returned"
            )
        value = state.get(f"value.{key}")
        shape = None if value is None else value.shape if moments.get(name, True) else torch.Size()
        if x.shape != shape:
            raise ValueError(
                f"the server optimizer's state has {full} {tuple(x.shape)}, but "
                + (f"no value.{key}" if value is None else f"value.{key} {tuple(value.shape)}")
            )
        held.setdefault(key, set()).add(name)
    for key, names in held.items():
        if len(names) > 1 and (missing := sorted(moments.keys() - names)):
            raise ValueError(f"the server optimizer's state lacks {missing[0]}.{key}; pass what state_dict() returned")
    # Only values: Adam's second moment may overflow, after which its steps are zero.
    if not is_finite([x for full, x in state.items() if full.startswith("value.")]):
        raise ValueError("the server optimizer's state holds NaN or Inf; go on from an earlier one")


def check_shapes(
    state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], expected: Iterable[str], whose: str
) -> None:
    """Raise ValueError unless a state's values are of the tensors of an adapter.

    Args:
        state: the state.
        shapes: canonical key → shape of the adapter's tensors.
        expected: the keys that the state must have.
        whose: the adapter's name in errors.
    """
    cure = "pass the state that was saved with this adapter"
    for full, x in state.items():
        name, key = full.split(".", 1)
        if name == "value" and shapes.get(key) != x.shape:
            other = f"has {tuple(shapes[key])}" if key in shapes else "lacks it"
            raise ValueError(f"the server optimizer's state has {key} {tuple(x.shape)}, but {whose} {other}; {cure}")
    if lacking := next((key for key in expected if f"value.{key}" not in state), None):
        raise ValueError(f"the server optimizer's state lacks {lacking}, which {whose} has; {cure}")
