"""Training many clients in one pass through a model that they share.

The base model is frozen and the same for all, so the clients' batches go through it as one. Only the modules with
trainable parameters (LoRA layers, heads) tell clients apart: they hold a value per client, stacked on a leading axis,
and apply each client's to its own rows. Rows are client-major: the first batch rows are the first client's. With the sum
of the clients' mean losses, and optimizers that act element by element, each client trains as it would alone.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .dropout import ClientDropout


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that clients train, by name.

    Raises:
        ValueError: one of them is shared by two modules, which one pass cannot train for clients apart.
    """
    found: dict[str, nn.Parameter] = {}
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            if id(parameter) in names:
                raise ValueError(f"{name} and {names[id(parameter)]} are one trainable tensor; untie them or freeze it")
            found[name], names[id(parameter)] = parameter, name
    return found


@contextmanager
def stacked_clients(
    model: nn.Module, parameters: Mapping[str, Tensor], batch_size: int, dropout: ClientDropout | None = None
) -> Iterator[Callable[[Mapping[str, Tensor]], None]]:
    """Within the context the model treats its batch as those of N clients, client-major, each with its own parameters.

    Args:
        model: a PEFT model; restored on exit.
        parameters: for every trainable parameter of the model a tensor (N, …).
        batch_size: rows per client.
        dropout: if given, is active within the context.

    Yields:
        What exchanges the parameters for others, perhaps of other clients.
    """
    owned: dict[str, dict[str, str]] = {}
    for name in parameters:
        owner = _owner(model, name)
        owned.setdefault(owner, {})[name[len(owner) + 1 :]] = name
    original = {owner: model.get_submodule(owner) for owner in owned}
    stacked: list[StackedModule] = []

    def use(parameters: Mapping[str, Tensor]) -> None:
        for module, names in zip(stacked, owned.values(), strict=True):
            module.stacked = {own: parameters[name] for own, name in names.items()}

    try:
        for owner, module in original.items():
            kind = StackedLinear if StackedLinear.fits(module, owned[owner]) else StackedModule
            stacked.append(kind(owner, module, batch_size, dropout))
            model.set_submodule(owner, stacked[-1])
        use(parameters)
        with dropout.active() if dropout else nullcontext():
            yield use
    finally:
        for owner, module in original.items():
            model.set_submodule(owner, module)


def _owner(model: nn.Module, name: str) -> str:
    """The module to replace for a parameter: the outermost PEFT layer around it, or else the module that holds it."""
    path = name.split(".")[:-1]
    for depth in range(1, len(path) + 1):
        if isinstance(model.get_submodule(".".join(path[:depth])), BaseTunerLayer | AuxiliaryTrainingWrapper):
            return ".".join(path[:depth])
    return ".".join(path)


class StackedModule(nn.Module):
    """Any module, run for each client with its own parameters, under ``torch.vmap``."""

    stacked: dict[str, Tensor]  # (N, …) by the parameter's name in the module

    def __init__(self, name: str, module: nn.Module, batch_size: int, dropout: ClientDropout | None):
        super().__init__()
        self.name, self.module, self.batch_size, self.dropout = name, module, batch_size, dropout

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models look at their layers' attributes, such as weight.dtype
            return getattr(super().__getattr__("module"), name)

    def per_client(self, x: Tensor) -> Tensor:
        """(N · batch, …) -> (N, batch, …)"""
        clients = len(next(iter(self.stacked.values())))
        if x.dim() == 0 or x.shape[0] != clients * self.batch_size:
            raise ValueError(
                f"{self.name}: an input of shape {tuple(x.shape)} is not {clients} clients × {self.batch_size} rows; "
                "this layer's rows cannot be told apart by client, do not target it"
            )
        return x.unflatten(0, (clients, self.batch_size))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        def one(parameters: dict[str, Tensor], key: Tensor | None, args: list, kwargs: dict[str, Any]) -> Any:
            with self.dropout.one_client(key) if self.dropout and key is not None else nullcontext():
                return torch.func.functional_call(self.module, parameters, tuple(args), kwargs)

        inputs = tree_map(lambda x: self.per_client(x) if isinstance(x, Tensor) else x, (list(args), kwargs))
        dims = tree_map(lambda x: 0 if isinstance(x, Tensor) else None, inputs)
        keys, keys_dim = (self.dropout.keys, 0) if self.dropout else (None, None)
        # Nothing random is left but which dropout it is, the same for all.
        output = torch.vmap(one, in_dims=(0, keys_dim, *dims), randomness="same")(self.stacked, keys, *inputs)
        return tree_map(lambda x: x.flatten(0, 1), output)


class StackedLinear(StackedModule):
    """Plain LoRA on a linear layer, the common case: two batched products beside one pass of the base layer."""

    @staticmethod
    def fits(module: nn.Module, parameters: Collection[str]) -> bool:
        """Whether the module is plain LoRA and nothing but A and B is trained."""
        if type(module) is not LoraLinear or len(module.active_adapters) != 1 or module.disable_adapters:
            return False
        adapter = module.active_adapters[0]
        factors = {f"lora_A.{adapter}.weight", f"lora_B.{adapter}.weight"}
        return set(parameters) == factors and adapter not in module.lora_variant and not module.lora_bias[adapter]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self.module
        adapter = layer.active_adapters[0]
        A, B = self.stacked[f"lora_A.{adapter}.weight"], self.stacked[f"lora_B.{adapter}.weight"]
        result = layer.base_layer(x, *args, **kwargs)
        rows = self.per_client(layer.lora_dropout[adapter](x.to(A.dtype))).flatten(1, -2)
        update = (rows @ A.mT) @ B.mT * layer.scaling[adapter]
        return (result + update.reshape(result.shape)).to(result.dtype)
