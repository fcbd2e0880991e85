"""The clients of a simulation: the model that they share, their examples and the adapter that each starts from."""

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, get_type_hints

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .config import SimulationConfig
from .partition import partition
from .storage import round_to_float16
from .tasks import Task
from .training.dropout import ClientDropout
from .training.lengths import client_of_longest
from .training.local_training import draw_batches, train_clients
from .training.memory import clients_that_fit, pass_memory
from .training.stacked import trainable_parameters
from .types import check_type

# Streams of random numbers. The second number tells them from each other and from the partition's, which is 0.
_SAMPLING, _EXAMPLES, _DROPOUT, _START = 1, 2, 3, 4

# How often a client's parameters are kept while it trains: the start, the trained value, the gradient and two moments.
_COPIES = 5

State = dict[str, Tensor]


class Clients:
    """All clients of a run. Random choices are functions of the seed, the round and the client alone.

    Attributes:
        model: the PEFT model.
        parameters: the model's trainable parameters by name.
        device: where the model is.
        examples: for every client the indices of its examples.
        column: (n,) the value of partition_column of every example, or None.
        lora: the configuration of every client's adapter.
    """

    def __init__(self, task: Task, config: SimulationConfig):
        """Share out the task's examples and make the model.

        Args:
            task: the data and the base model, which is copied.
            config: the run's configuration.

        Raises:
            ValueError: options that the data, PEFT or this machine do not have.
        """
        self.task, self.config = task, config
        self.device = _open_device(config.device)
        self.column = None if config.partition_column is None else np.array(task.train[config.partition_column])
        self.examples = partition(task.labels, self.column, config, size=len(task.train))
        if (config.clients_per_round or 0) > len(self.examples):
            raise ValueError(f"clients_per_round is {config.clients_per_round}, but there are {len(self.examples)} clients")
        torch.manual_seed(config.seed)
        self.lora = _lora_config({**task.lora_defaults, **config.lora})
        if config.start == "independent" and self.lora.init_lora_weights not in (True, "gaussian"):
            raise ValueError(
                f"an independent start needs adapters that can be drawn anew, init_lora_weights true or gaussian, "
                f"not {self.lora.init_lora_weights!r}"
            )
        _check_targets(task.base_model, self.lora)
        self.model = get_peft_model(copy.deepcopy(task.base_model), self.lora).to(self.device)
        self._round()
        self.parameters = trainable_parameters(self.model)
        # None: "auto", which the first pass measures.
        self._per_pass = None if config.clients_per_pass == "auto" else config.clients_per_pass or len(self.examples)

    def state(self) -> State:
        """A copy of the model's trainable tensors, by parameter name."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Set the model's trainable tensors."""
        for name, p in self.parameters.items():
            p.copy_(state[name])

    def sample(self, round: int) -> list[int]:
        """Draw the clients that take part in the round of this index."""
        n, k = len(self.examples), self.config.clients_per_round
        if k is None:
            return list(range(n))
        return sorted(self._rng(_SAMPLING, round).choice(n, k, replace=False).tolist())

    def own_start(self, client: int) -> State:
        """Draw the adapter that a client starts from alone: PEFT's initialisation, by the client's own seed."""
        shared = self.state()
        torch.manual_seed(self._torch_seed(_START, client))
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                for adapter in module.active_adapters:
                    reset: Any = module.reset_lora_parameters
                    reset(adapter, self.lora.init_lora_weights)
        self._round()
        own = self.state()
        self.load(shared)
        return own

    def batches(self, round: int, client: int) -> np.ndarray:
        """Draw the examples that a client trains on in the round of this index: (local_steps, batch) indices."""
        return draw_batches(self.examples[client], self.config, self._rng(_EXAMPLES, round, client))

    @contextmanager
    def dropout(self, round: int, client: int) -> Iterator[None]:
        """Give PyTorch's dropouts, within the context, the masks that a client meets in the round of this index.

        This is for training the client by other means than ``train``. Within the context nothing but the model may draw from
        PyTorch's global generator.
        """
        torch.manual_seed(self._torch_seed(_DROPOUT, round))
        seeds = [self._torch_seed(_DROPOUT, round, client)]
        with ClientDropout(seeds, self.config.batch_size, self.device).active():
            yield

    def train(
        self,
        round: int,
        chosen: list[int],
        starts: Sequence[State],
        on_step: Callable[[int], object],
        trained: Collection[str] | None = None,
    ) -> list[tuple[State, float]]:
        """Train the chosen clients of a round, in as few passes as ``clients_per_pass`` allows.

        Args:
            round: the round index, from 0.
            chosen: client numbers.
            starts: the adapter that each of them starts from.
            on_step: called after every local step of a pass with the number of its clients.
            trained: the parameters that are trained; the others stay as they start. None trains all.

        Returns:
            For every chosen client its trained state, views of the stacked tensors, and its mean loss.
        """
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()  # part of the frozen base; statistics of a batch of all clients would mix them
        batches = [self.batches(round, c) for c in chosen]
        seeds = [self._torch_seed(_DROPOUT, round, c) for c in chosen]

        def train_pass(some: slice, steps: int, on_step: Callable[[], object]) -> tuple[State, Tensor]:
            torch.manual_seed(self._torch_seed(_DROPOUT, round))
            return train_clients(
                self.model,
                {name: torch.stack([s[name] for s in starts[some]]) for name in self.parameters},
                list(np.stack(batches[some], axis=1)[:steps]),
                lambda indices: self.task.collate(self.task.train, indices, torch.device("cpu")),
                self.task.losses,
                self.config,
                on_step,
                trained,
                seeds[some],
            )

        if self._per_pass is None:
            inputs = self.task.collate(self.task.train, np.concatenate([b[0] for b in batches]), torch.device("cpu"))
            longest = client_of_longest(inputs, len(chosen))
            with pass_memory(self.model, self.device) as found:
                train_pass(slice(longest, longest + 1), 1, lambda: None)
            copies = _COPIES * sum(p.nbytes for p in self.parameters.values())
            self._per_pass = clients_that_fit(found[0] + copies, self.device)
        results = []
        for first in range(0, len(chosen), self._per_pass):
            some = slice(first, first + self._per_pass)
            states, losses = train_pass(some, self.config.local_steps, partial(on_step, len(chosen[some])))
            for i, loss in enumerate(losses.tolist()):
                results.append(({name: x[i] for name, x in states.items()}, loss))
        return results

    def evaluate(self, state: State, rows: np.ndarray | None = None) -> dict[str, float]:
        """Measure an adapter's score and loss on the test examples, or on some rows of them."""
        self.load(state)
        return self.task.evaluate(self.model, self.config.eval_batch_size, self.device, rows)

    def _round(self) -> None:
        """Round the model's weights to the dtype that they are stored in, if that is float16."""
        if self.config.dtype == "float16":
            round_to_float16(self.model.parameters())

    def _rng(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, *stream])

    def _torch_seed(self, *stream: int) -> int:
        return int(self._rng(*stream).integers(2**62))


def _lora_config(options: dict[str, Any]) -> LoraConfig:
    """Make PEFT's configuration, which PEFT itself does not check the types of."""
    # PEFT takes fractions of α, and names of initialisations that hold a number, such as pissa_niter_4.
    hints = get_type_hints(LoraConfig) | {"lora_alpha": float, "init_lora_weights": bool | str}
    checked = {name: check_type(f"lora.{name}", x, hints[name]) if name in hints else x for name, x in options.items()}
    try:
        return LoraConfig(**checked)
    except (TypeError, ValueError) as error:
        raise ValueError(f"lora: {error}; see peft.LoraConfig for its options") from error


def _check_targets(base: nn.Module, lora: LoraConfig) -> None:
    """Refuse target modules that the model lacks: PEFT leaves them out without a word if it has another one of the list."""
    if not isinstance(lora.target_modules, list | set | tuple):
        return  # a pattern, or all linear layers
    modules = [f".{name}" for name, _ in base.named_modules()]
    for target in sorted(lora.target_modules):
        if not any(module.endswith(f".{target}") for module in modules):
            linear = {
                name.rsplit(".", 1)[-1] for name, m in base.named_modules() if type(m).__name__ in ("Linear", "Conv1D")
            }
            raise ValueError(
                f"lora.target_modules: the model has no module {target!r}; its linear layers are {', '.join(sorted(linear))}"
            )


def _open_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
