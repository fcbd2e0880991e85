"""Training many clients in one pass through a model that they share.

The base model is frozen and the same for all, so the clients' batches go through it as one. Only the modules with
trainable parameters (LoRA layers, heads) tell clients apart: they hold a value per client, stacked on a leading axis,
and apply each client's value to its own rows. Rows are client-major: the first batch rows are the first client's. The loss
is the sum of the clients' mean losses and optimizers act element by element, so that each client trains as it would alone.
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
    """Return the parameters that clients train, by name.

    Raises:
        ValueError: two modules share one of them, so that one pass cannot train a value per client.
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
    """Let the model treat its batch, within the context, as those of N clients, client-major, each with own parameters.

    Args:
        model: a PEFT model; restored on exit.
        parameters: for every trainable parameter of the model a tensor (N, …).
        batch_size: the number of rows of each client.
        dropout: a dropout that is active within the context, or None.

    Yields:
        A function that replaces the parameters by others, perhaps of other clients.
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
    """Find the module to replace for a parameter: the outermost PEFT layer around it, or else the module that holds it."""
    path = name.split(".")[:-1]
    for depth in range(1, len(path) + 1):
        if isinstance(model.get_submodule(".".join(path[:depth])), BaseTunerLayer | AuxiliaryTrainingWrapper):
            return ".".join(path[:depth])
    return ".".join(path)


class StackedModule(nn.Module):
    """A module that is run for each client with the client's own parameters, under ``torch.vmap``.

    Attributes:
        stacked: the parameters (N, …) by their names in the module.
    """

    stacked: dict[str, Tensor]

    def __init__(self, name: str, module: nn.Module, batch_size: int, dropout: ClientDropout | None):
        """Wrap a module.

        Args:
            name: the module's name in the model, for errors.
            module: the module.
            batch_size: the number of rows of each client.
            dropout: the dropout that is active, or None.
        """
        super().__init__()
        self.name, self.module, self.batch_size, self.dropout = name, module, batch_size, dropout

    def __getattr__(self, name: str) -> Any:
        """Find attributes of the wrapped module too: models read those of their layers, such as weight.dtype."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def per_client(self, x: Tensor) -> Tensor:
        """Split the rows by client: (N · batch, …) → (N, batch, …)."""
        clients = len(next(iter(self.stacked.values())))
        if x.dim() == 0 or x.shape[0] != clients * self.batch_size:
            raise ValueError(
                f"{self.name}: an input of shape {tuple(x.shape)} is not {clients} clients × {self.batch_size} rows; "
                "this layer's rows cannot be told apart by client, do not target it"
            )
        return x.view(clients, self.batch_size, *x.shape[1:])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module for every client; tensors among the arguments have the clients' rows."""

        def one(parameters: dict[str, Tensor], key: Tensor | None, args: list[Any], kwargs: dict[str, Any]) -> Any:
            with self.dropout.one_client(key) if self.dropout and key is not None else nullcontext():
                return torch.func.functional_call(self.module, parameters, tuple(args), kwargs)

        inputs = tree_map(lambda x: self.per_client(x) if isinstance(x, Tensor) else x, (list(args), kwargs))
        dims = tree_map(lambda x: 0 if isinstance(x, Tensor) else None, inputs)
        keys, keys_dim = (self.dropout.keys, 0) if self.dropout else (None, None)
        # The only random number that is left is the number of the dropout, which all clients share.
        output = torch.vmap(one, in_dims=(0, keys_dim, *dims), randomness="same")(self.stacked, keys, *inputs)
        return tree_map(lambda x: x.flatten(0, 1), output)


class StackedLinear(StackedModule):
    """Plain LoRA on a linear layer, the usual case: two batched products beside one pass of the base layer."""

    @staticmethod
    def fits(module: nn.Module, parameters: Collection[str]) -> bool:
        """Whether the module is plain LoRA of which only A and B are trained."""
        if type(module) is not LoraLinear or len(module.active_adapters) != 1 or module.disable_adapters:
            return False
        adapter = module.active_adapters[0]
        factors = {f"lora_A.{adapter}.weight", f"lora_B.{adapter}.weight"}
        return set(parameters) == factors and adapter not in module.lora_variant and not module.lora_bias[adapter]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer on the clients' rows."""
        layer: Any = self.module
        adapter = layer.active_adapters[0]
        A, B = self.stacked[f"lora_A.{adapter}.weight"], self.stacked[f"lora_B.{adapter}.weight"]
        result: Tensor = layer.base_layer(x, *args, **kwargs)
        rows = self.per_client(layer.lora_dropout[adapter](x.to(A.dtype))).flatten(1, -2)
        update = (rows @ A.mT) @ B.mT * layer.scaling[adapter]
        combined: Tensor = result + update.reshape(result.shape)
        return combined.to(result.dtype)
