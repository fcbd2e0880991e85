"""The interface of a task to the simulator, whatever clients learn."""

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
    """The part of a simulation that does not depend on its seed: data, model, losses and scores.

    Attributes:
        train: the examples that clients share out.
        test: the examples that the server evaluates on.
        labels: (n,) the class of every training example, or None if examples have no classes.
        classes: the names of the classes; empty if there are none.
        base_model: the pretrained model, without adapter. Copy it before adding one.
        lora_defaults: options of ``peft.LoraConfig`` that hold unless the user sets them.
    """

    train: Dataset
    test: Dataset
    labels: np.ndarray | None
    classes: list[str]
    base_model: PreTrainedModel
    lora_defaults: dict[str, Any]

    @abstractmethod
    def collate(self, dataset: Dataset, indices: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        """Make the model's inputs, with ``labels``, of these rows of either dataset, in the order of ``indices``."""

    @abstractmethod
    def losses(self, logits: Tensor, labels: Tensor, clients: int) -> Tensor:
        """Compute each client's mean loss, (clients,), in at least float32.

        Args:
            logits: (clients · batch, …), client-major: the first batch rows are the first client's.
            labels: as ``collate`` makes them.
            clients: the number of clients.
        """

    @abstractmethod
    def evaluate(
        self, model: torch.nn.Module, batch_size: int, device: torch.device, rows: np.ndarray | None = None
    ) -> dict[str, float]:
        """Measure the ``loss`` on the test examples, or on some ``rows`` of them, and a score if the task has one."""


def at_least_float32(logits: Tensor) -> Tensor:
    """Convert logits to the precision that a cross-entropy needs."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
