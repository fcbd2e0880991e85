"""What every task hands to the simulator, whatever clients learn."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel


@dataclass
class Task(ABC):
    """Everything of a simulation that does not depend on its seed.

    Attributes:
        train: the examples that clients share out.
        test: the examples that the server evaluates on.
        labels: (n,) class of every training example, or None where examples have no classes.
        classes: the names of the classes; empty where there are none.
        base_model: the pretrained model, without adapter; copy it before adding one.
        lora_defaults: options of ``peft.LoraConfig`` for what the user leaves open.
    """

    train: Dataset
    test: Dataset
    labels: np.ndarray | None
    classes: list[str]
    base_model: PreTrainedModel
    lora_defaults: dict[str, Any]

    @abstractmethod
    def collate(self, dataset: Dataset, indices: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        """The model's inputs and ``labels`` for these rows of either dataset, in the order of ``indices``."""

    @abstractmethod
    def losses(self, logits: Tensor, labels: Tensor, clients: int) -> Tensor:
        """Each client's mean loss, (clients,), in at least float32.

        Args:
            logits: (clients · batch, …), client-major: the first batch rows are the first client's.
            labels: as ``collate`` makes them.
            clients: how many clients' rows there are.
        """

    @abstractmethod
    def evaluate(
        self, model: torch.nn.Module, batch_size: int, device: torch.device, rows: np.ndarray | None = None
    ) -> dict[str, float]:
        """``loss`` on the test examples, or on some ``rows`` of them, and a score where the task has one."""


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits in the precision that a cross-entropy needs."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
