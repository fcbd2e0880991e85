"""The task of causal language models: predict the next token of a text, or of the response to a prompt."""

from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from .base import Task, at_least_float32
from .scoring import Scorer

NO_TARGET = -100
# The most logits of one batch of an evaluation: 1 GiB in float32. With a vocabulary of 128,000 they outgrow all else.
_MAX_LOGITS = 1 << 28


@dataclass
class LanguageTask(Task):
    """A task whose rows have ``input_ids``, and ``prompt_tokens``: how many of the first tokens are no targets.

    Rows of conversations also have ``targets``: for every token 1 if it is a target and 0 otherwise.

    Attributes:
        pad_id: any token; it fills up short rows.
        scorer: scores greedy answers, or None.
    """

    pad_id: int = 0
    scorer: Scorer | None = None

    def collate(self, dataset: Dataset, indices: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        """See ``Task.collate``; rows are padded on the right."""
        rows = dataset[indices.tolist()]
        shape = len(indices), max(map(len, rows["input_ids"]))
        tokens, mask = torch.full(shape, self.pad_id), torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, NO_TARGET)
        for i, (ids, prompt) in enumerate(zip(rows["input_ids"], rows["prompt_tokens"], strict=True)):
            tokens[i, : len(ids)] = torch.tensor(ids)
            mask[i, : len(ids)] = 1
            labels[i, prompt : len(ids)] = tokens[i, prompt : len(ids)]
        for i, targets in enumerate(rows.get("targets", [])):
            labels[i, : len(targets)][torch.tensor(targets) == 0] = NO_TARGET
        return {name: x.to(device) for name, x in (("input_ids", tokens), ("attention_mask", mask), ("labels", labels))}

    def losses(self, logits: Tensor, labels: Tensor, clients: int) -> Tensor:
        """See ``Task.losses``; a client's mean is over its target tokens."""
        each, targets = token_losses(logits, labels)
        return each.view(clients, -1).sum(1) / targets.view(clients, -1).sum(1).clamp(min=1)

    @torch.no_grad()
    def evaluate(
        self, model: torch.nn.Module, batch_size: int, device: torch.device, rows: np.ndarray | None = None
    ) -> dict[str, float]:
        """Measure the mean cross-entropy of the target tokens and, if there is a scorer, its score of the first rows."""
        was_training = model.training
        model.eval()
        rows = np.arange(len(self.test)) if rows is None else rows
        lengths = np.array([len(ids) for ids in self.test[rows.tolist()]["input_ids"]])
        size = max(
            1, min(batch_size, _MAX_LOGITS // (int(lengths.max()) * self.base_model.config.get_text_config().vocab_size))
        )
        total, count = 0.0, 0
        ordered = rows[np.argsort(lengths, kind="stable")]  # rows of similar length need little padding
        for start in range(0, len(ordered), size):
            inputs = self.collate(self.test, ordered[start : start + size], device)
            labels = inputs.pop("labels")
            each, targets = token_losses(model(**inputs).logits, labels)
            total, count = total + each.double().sum().item(), count + int(targets.sum())
        measured = {"loss": total / count}
        if self.scorer is not None:
            measured |= self.scorer(model, self.test, rows, batch_size, device)
        model.train(was_training)
        return measured


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of every next token, zero if it is no target, and which are targets: both (rows, tokens).

    Args:
        logits: (rows, tokens, vocabulary).
        labels: (rows, tokens), ``NO_TARGET`` for tokens that are not to be predicted. The first token never is.
    """
    # The labels are shifted and not the logits, which would be copied.
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=NO_TARGET)
    each = torch.nn.functional.cross_entropy(
        at_least_float32(logits).flatten(0, 1), following.flatten(), ignore_index=NO_TARGET, reduction="none"
    )
    return each.view_as(following), following != NO_TARGET
