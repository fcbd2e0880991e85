"""The clients of a simulation: the model they share, their examples and where each starts from."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from .config import SimulationConfig
from .local_training import draw_batches, train_clients
from .partition import partition
from .stacked import trainable_parameters
from .task import Task, head_modules

# Streams of random numbers, apart from each other and, by the second number, from the partition's.
_SAMPLING, _EXAMPLES, _DROPOUT, _START = 1, 2, 3, 4
# The embedded model's layers; for others PEFT knows its defaults.
_DIGITS_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


State = dict[str, Tensor]


class Clients:
    """All clients of a run. Random choices are functions of the seed, the round and the client alone; dropout of the pass.

    Attributes:
        model: the PEFT model.
        examples: for every client the indices of its examples.
    """

    def __init__(self, task: Task, config: SimulationConfig):
        self.task, self.config = task, config
        self.device = _open_device(config.device)
        column = None if config.partition_column is None else np.array(task.train[config.partition_column])
        self.examples = partition(task.labels, column, config)
        if (config.clients_per_round or 0) > len(self.examples):
            raise ValueError(f"clients_per_round is {config.clients_per_round}, but there are {len(self.examples)} clients")
        options = dict(config.lora)
        if config.model == "digits":
            options.setdefault("target_modules", _DIGITS_TARGETS)
        if config.task == "text-classification":
            options.setdefault("task_type", "SEQ_CLS")  # with which PEFT trains the head
        elif config.dataset != "digits":
            options.setdefault("modules_to_save", head_modules(task.base_model))
        torch.manual_seed(config.seed)
        try:
            self.lora = LoraConfig(**options)
        except TypeError as error:
            raise ValueError(f"lora: {error}; see peft.LoraConfig for its options") from error
        if config.start == "independent" and self.lora.init_lora_weights not in (True, "gaussian"):
            raise ValueError(
                f"an independent start needs adapters that can be drawn anew, init_lora_weights true or gaussian, "
                f"not {self.lora.init_lora_weights!r}"
            )
        self.model = get_peft_model(copy.deepcopy(task.base_model), self.lora).to(self.device)
        self.parameters = trainable_parameters(self.model)

    def state(self) -> State:
        """A copy of the model's trainable tensors, by parameter name."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Set the model's trainable tensors."""
        for name, p in self.parameters.items():
            p.copy_(state[name])

    def sample(self, round: int) -> list[int]:
        """The clients that take part in a round."""
        n, k = len(self.examples), self.config.clients_per_round
        if k is None:
            return list(range(n))
        return sorted(self._rng(_SAMPLING, round).choice(n, k, replace=False).tolist())

    def own_start(self, client: int) -> State:
        """An adapter of the client's own: PEFT's initialisation, drawn with its seed."""
        shared = self.state()
        torch.manual_seed(self._torch_seed(_START, client))
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                for adapter in module.active_adapters:
                    module.reset_lora_parameters(adapter, self.lora.init_lora_weights)
        own = self.state()
        self.load(shared)
        return own

    def train(
        self, round: int, chosen: list[int], start: State | None, on_step: Callable[[], object]
    ) -> list[tuple[State, float]]:
        """Train the chosen clients of a round, in as few passes as ``clients_per_pass`` allows.

        Args:
            round: its number.
            chosen: client numbers.
            start: the global adapter, or None for each client's own.
            on_step: called once per local step and pass.

        Returns:
            For every chosen client its trained state, views of the stacked tensors, and its mean loss.
        """
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()  # part of the frozen base; statistics of a batch of all clients would mix them
        results = []
        size = self.config.clients_per_pass or len(chosen)
        for first in range(0, len(chosen), size):
            some = chosen[first : first + size]
            starts = [start if start is not None else self.own_start(c) for c in some]
            stacked = {name: torch.stack([s[name] for s in starts]) for name in self.parameters}
            drawn = [draw_batches(self.examples[c], self.config, self._rng(_EXAMPLES, round, c)) for c in some]
            torch.manual_seed(self._torch_seed(_DROPOUT, round, first))
            trained, losses = train_clients(
                self.model,
                stacked,
                list(np.stack(drawn, axis=1)),
                lambda indices: self.task.collate(self.task.train, indices, self.device),
                self.config,
                on_step,
            )
            for i, loss in enumerate(losses.tolist()):
                results.append(({name: x[i] for name, x in trained.items()}, loss))
        return results

    def evaluate(self, state: State) -> dict[str, float]:
        """Accuracy and loss of an adapter on the test examples."""
        self.load(state)
        return self.task.evaluate(self.model, self.config.eval_batch_size, self.device)

    def _rng(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, *stream])

    def _torch_seed(self, *stream: int) -> int:
        return int(self._rng(*stream).integers(2**62))


def _open_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
