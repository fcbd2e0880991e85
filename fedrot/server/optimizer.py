"""Server optimizers (FedOpt, arXiv 2003.00295), which step towards the mean of a round instead of taking it."""

from collections.abc import Container, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fedrot_kernels import widen

from ..adapters.checks import is_finite, not_finite
from ..adapters.keys import TensorSpec
from ..adapters.update import Update
from ..errors import UpdateError

ServerOptimizerName = Literal["none", "momentum", "adam"]
_MOMENTUM, _BETAS, _EPS = 0.9, (0.9, 0.999), 1e-8


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
        name: "momentum" (β 0.9) or "adam" (β 0.9 and 0.999, ε 1e-8, bias-corrected).
        lr: the server's learning rate; momentum with β = 0 and lr 1 would be plain averaging.
    """

    def __init__(self, name: ServerOptimizerName, lr: float):
        if name not in get_args(ServerOptimizerName)[1:]:
            raise ValueError(f"a server optimizer is momentum or adam, got {name!r}")
        is_number = isinstance(lr, int | float) and not isinstance(lr, bool)
        if not is_number or not lr > 0:
            raise ValueError(f"the server's learning rate must be a positive number, got {lr!r}")
        self.name, self.lr = name, float(lr)
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

    def _step(
        self, reference: Update, mean: Mapping[str, Tensor], specs: Mapping[str, TensorSpec], frozen: Container[str]
    ) -> dict[str, Tensor]:
        if self._optimizer is None:
            wide = {key: widen(reference[key].to(x.device)).reshape(x.shape) for key, x in mean.items()}
            copies = {key: x.clone(memory_format=torch.contiguous_format) for key, x in wide.items()}
            self._parameters = {key: nn.Parameter(x) for key, x in copies.items()}
            values = list(self._parameters.values())
            if self.name == "adam":
                self._optimizer = torch.optim.Adam(values, self.lr, _BETAS, _EPS)
            else:
                self._optimizer = torch.optim.SGD(values, self.lr, _MOMENTUM)
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

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state_dict`` returned, at the next step.

        Raises:
            ValueError: the state of another optimizer.
        """
        other = "momentum_buffer" if self.name == "adam" else "exp_avg"
        if any(name.startswith(f"{other}.") for name in state):
            raise ValueError(f"this is not the state of a server optimizer of the name {self.name}")
        self._restored, self._optimizer = dict(state), None

    @torch.no_grad()
    def _load(self) -> None:
        assert self._optimizer is not None
        for full, x in (self._restored or {}).items():
            name, key = full.split(".", 1)
            if key not in self._parameters or (name != "step" and x.shape != self._parameters[key].shape):
                raise ValueError(f"the server optimizer's state has {key} {tuple(x.shape)}, which the adapter has not")
            p = self._parameters[key]
            if name == "value":
                p.copy_(x)
            else:  # Adam counts its steps on the CPU
                self._optimizer.state[p][name] = x.clone() if name == "step" else x.to(p.device).clone()
        self._restored = None
