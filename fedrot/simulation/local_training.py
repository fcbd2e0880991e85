"""The local steps of a round, for all its clients at once."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .config import SimulationConfig
from .stacked import stacked_clients

Collate = Callable[[np.ndarray], dict[str, Tensor]]


def train_clients(
    model: nn.Module,
    start: Mapping[str, Tensor],
    batches: Sequence[np.ndarray],
    collate: Collate,
    config: SimulationConfig,
    on_step: Callable[[], object] = lambda: None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Train N clients for the configured local steps.

    Args:
        model: the PEFT model they share, in training mode.
        start: for every trainable parameter (N, …), each client's value to start from; not modified.
        batches: for every local step example indices (N, batch).
        collate: indices -> the model's inputs with ``labels``.
        config: its optimizer, lr, momentum, weight_decay and max_grad_norm.
        on_step: called after every step.

    Returns:
        The trained parameters (N, …), and each client's mean loss over its steps (N,).
    """
    parameters = {name: nn.Parameter(value.detach().clone()) for name, value in start.items()}
    optimizer = make_optimizer(list(parameters.values()), config)
    n, batch_size = batches[0].shape
    total = torch.zeros(n, device=next(iter(parameters.values())).device)
    with stacked_clients(model, parameters, batch_size):
        for indices in batches:
            inputs = collate(indices.ravel())
            labels = inputs.pop("labels")
            logits = model(**inputs).logits
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            losses = nn.functional.cross_entropy(logits, labels, reduction="none").view(n, batch_size).mean(1)
            losses.sum().backward()
            if config.max_grad_norm is not None:
                clip_per_client([p.grad for p in parameters.values() if p.grad is not None], config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            total += losses.detach()
            on_step()
    return {name: p.detach() for name, p in parameters.items()}, total / len(batches)


def make_optimizer(parameters: list[nn.Parameter], config: SimulationConfig) -> torch.optim.Optimizer:
    """The clients' optimizer; element by element, hence the same for stacked parameters."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, config.lr, config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)


def clip_per_client(gradients: Sequence[Tensor], max_norm: float) -> None:
    """Scale each client's part of the gradients (N, …) in place, as ``clip_grad_norm_`` does for one client."""
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
    scale = (max_norm / (norms + 1e-6)).clamp(max=1)
    for g in gradients:
        g.mul_(scale.view(-1, *[1] * (g.dim() - 1)))


def draw_batches(examples: np.ndarray, config: SimulationConfig, rng: np.random.Generator) -> np.ndarray:
    """(local_steps, batch): a client's examples in random order, over again in a new order when they run out."""
    needed = config.local_steps * config.batch_size
    passes = [rng.permutation(examples) for _ in range(-(-needed // len(examples)))]
    return np.concatenate(passes)[:needed].reshape(config.local_steps, config.batch_size)
