"""Server optimizers (FedOpt, arXiv 2003.00295), which step towards the mean of a round instead of taking it."""

import math
from collections.abc import Container, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fedrot_kernels import widen

from ..adapters.keys import TensorSpec, parse_factor
from ..adapters.update import Update
from ..adapters.values import is_finite, not_finite
from ..errors import UpdateError
from .optimizer_state import check_shapes, check_state

ServerOptimizerName = Literal["none", "momentum", "adam"]
_BETA, _BETA_2, _EPS = 0.9, 0.999, 1e-8


class ServerOptimizer:
    """Steps from the reference with torch's SGD or Adam, which take reference − mean as the gradient.

    Moments are kept entry by entry, in the basis of the reference. Rotated clients agree on that basis. Clients that hold
    one update in different bases cancel in an unrotated mean, and the moments see noise. Adam's step is not equivariant:
    from a rotated reference it would lead elsewhere. Methods whose results change basis from round to round (FlexLoRA,
    FLoRA) are therefore refused.

    Moments and the adapter itself are kept in float32 (float64 for float64), so that small steps add up in half precision
    too: each step starts from the adapter kept here, which is the first reference at first. A tensor that clients did not
    train in a round does not move, nor do its moments.

    Args:
        name: "momentum" (β) or "adam" (β and 0.999, ε 1e-8, bias-corrected).
        lr: the server's learning rate.
        beta: β, how much of the last step stays in the next one, from 0 to below 1; momentum with β = 0 and lr 1 is plain
            averaging.

    Raises:
        ValueError: another name, a learning rate that is not a positive number, or a β out of its range.
    """

    def __init__(self, name: ServerOptimizerName, lr: float, beta: float = _BETA):
        if name not in get_args(ServerOptimizerName)[1:]:
            raise ValueError(f"a server optimizer is momentum or adam, got {name!r}; for none pass server_optimizer=None")
        if not _is_number(lr) or not 0 < lr < math.inf:
            raise ValueError(f"the server's learning rate must be a positive number, got {lr!r}")
        if not _is_number(beta) or not 0 <= beta < 1:
            raise ValueError(f"the server optimizer's beta must be a number from 0 to below 1, got {beta!r}")
        self.name, self.lr, self.beta = name, float(lr), float(beta)
        self._parameters: dict[str, nn.Parameter] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._restored: dict[str, Tensor] | None = None

    def step(
        self, reference: Update, mean: Mapping[str, Tensor], specs: Mapping[str, TensorSpec], frozen: Container[str]
    ) -> dict[str, Tensor]:
        """Take one step.

        Args:
            reference: the adapter that the clients started from.
            mean: canonical key → the round's mean.
            specs: canonical key → shape and dtype of the result.
            frozen: the keys that clients did not train.

        Returns:
            The next adapter, by canonical key.

        Raises:
            UpdateError: a reference that lacks a tensor or has it in another shape, or a step that overflows the dtype of
                the result. The optimizer is then as before.
            ValueError: a loaded state of another adapter.
        """
        self._check(reference, mean)
        before = self.state_dict()
        stepped = self._step(reference, mean, specs, frozen)
        if not is_finite(list(stepped.values())):
            self.load_state_dict(before)
            raise UpdateError(f"the step of the server optimizer overflows; lower its learning rate, {self.lr}")
        return stepped

    def _check(self, reference: Update, mean: Mapping[str, Tensor]) -> None:
        if lacking := next((key for key in mean if key not in reference), None):
            raise UpdateError(f"{reference.name} lacks {lacking}; a server optimizer steps from it, pass the whole adapter")
        for key, x in mean.items():
            if reference.specs[key].shape != x.shape:
                raise UpdateError(
                    f"{reference.name}, {key}: shape {reference.specs[key].shape}, but the mean has {tuple(x.shape)}; "
                    "a server optimizer needs the adapter that the clients started from"
                )
        if found := not_finite(reference, list(mean)):
            raise UpdateError(f"{reference.name}, {found}; a server optimizer steps from it")
        if self._restored:
            check_shapes(self._restored, {key: tuple(x.shape) for key, x in mean.items()}, list(mean), "the round's mean")

    def _step(
        self, reference: Update, mean: Mapping[str, Tensor], specs: Mapping[str, TensorSpec], frozen: Container[str]
    ) -> dict[str, Tensor]:
        if self._optimizer is None:
            wide = {key: widen(reference[key].to(x.device)).reshape(x.shape) for key, x in mean.items()}
            copies = {key: x.clone(memory_format=torch.contiguous_format) for key, x in wide.items()}
            self._parameters = {key: nn.Parameter(x) for key, x in copies.items()}
            values = list(self._parameters.values())
            if self.name == "adam":
                self._optimizer = torch.optim.Adam(values, self.lr, (self.beta, _BETA_2), _EPS)
            else:
                self._optimizer = torch.optim.SGD(values, self.lr, self.beta)
            self._load()
        for key, p in self._parameters.items():
            start = widen(reference[key].to(p.device)).reshape(p.shape)
            p.grad = None if key in frozen else start - widen(mean[key])
        self._optimizer.step()
        return {key: p.detach().to(specs[key].dtype).clone() for key, p in self._parameters.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that a restart needs, which safetensors can save; empty before the first step."""
        if self._optimizer is None:
            return dict(self._restored or {})
        state = {f"value.{key}": p.detach().clone() for key, p in self._parameters.items()}
        for key, p in self._parameters.items():
            for name, x in self._optimizer.state.get(p, {}).items():
                if isinstance(x, Tensor):
                    state[f"{name}.{key}"] = x.clone(memory_format=torch.contiguous_format)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor], reference: Update | None = None) -> None:
        """Go on from what ``state_dict`` returned, at the next step.

        Args:
            state: what was returned.
            reference: the adapter that the next step starts from, to check the state against; None if it is not known yet.

        Raises:
            ValueError: the state of another optimizer, or of another adapter. The optimizer is then as before.
        """
        check_state(state, self.name)
        if reference is not None and state:
            factors = [key for key in reference.specs if parse_factor(key)]
            check_shapes(state, {key: spec.shape for key, spec in reference.specs.items()}, factors, reference.name)
        self._restored, self._optimizer = dict(state), None

    @torch.no_grad()
    def _load(self) -> None:
        assert self._optimizer is not None
        for full, x in (self._restored or {}).items():
            name, key = full.split(".", 1)
            p = self._parameters[key]
            if name == "value":
                p.copy_(x)
            else:  # Adam counts its steps on the CPU
                self._optimizer.state[p][name] = x.clone() if name == "step" else x.to(p.device).clone()
        self._restored = None


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)
