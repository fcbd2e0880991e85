"""The local steps of a round, taken by all its clients at once."""

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..config import SimulationConfig
from ..storage import round_to_float16
from .dropout import ClientDropout
from .lengths import group_by_length, pass_overhead
from .packing import packed_linears
from .stacked import stacked_clients

Collate = Callable[[np.ndarray], dict[str, Tensor]]
Losses = Callable[[Tensor, Tensor, int], Tensor]


def train_clients(
    model: nn.Module,
    start: Mapping[str, Tensor],
    batches: Sequence[np.ndarray],
    collate: Collate,
    losses: Losses,
    config: SimulationConfig,
    on_step: Callable[[], object] = lambda: None,
    trained: Collection[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Train N clients for the configured local steps.

    Args:
        model: the PEFT model that the clients share, in training mode.
        start: for every trainable parameter (N, …), the value that each client starts from; not modified.
        batches: for every local step the indices of the examples (N, batch).
        collate: indices → the model's inputs with ``labels``, on any device.
        losses: logits, labels and N → each client's mean loss (N,), as ``Task.losses``.
        config: its optimizer, lr, momentum, weight_decay, max_grad_norm and dtype count.
        on_step: called after every step.
        trained: the parameters that are trained; the others stay as they start. None trains all.
        seeds: the seed of each client's dropout; by default 0, 1, …

    Returns:
        The parameters (N, …), and each client's mean loss over its steps (N,).

    Raises:
        ValueError: ``trained`` has a name that is no trainable parameter.
    """
    n, batch_size = batches[0].shape
    if trained is not None and (unknown := set(trained) - start.keys()):
        raise ValueError(f"{sorted(unknown)[0]} is to be trained, but it is no trainable parameter of the model")
    parameters = {name: value.detach().clone() for name, value in start.items()}
    in_float16 = config.dtype == "float16"
    if in_float16:
        round_to_float16(parameters.values())
    changing = [p.requires_grad_() for name, p in parameters.items() if trained is None or name in trained]
    optimizer = make_optimizer(changing, config)
    device = changing[0].device
    overhead = pass_overhead(model, device)
    dropout = ClientDropout(seeds or range(n), batch_size, device)
    total = torch.zeros(n, device=device)
    with stacked_clients(model, parameters, batch_size, dropout) as use, packed_linears(model) as use_mask:
        for indices in batches:
            random = torch.get_rng_state()
            for clients, inputs in group_by_length(collate(indices.ravel()), n, overhead):
                torch.set_rng_state(random)  # so that every group has the same dropouts
                dropout.use(clients)
                use(parameters if len(clients) == n else _some(parameters, clients))
                inputs = {name: x.to(device) for name, x in inputs.items()}
                labels = inputs.pop("labels")
                use_mask(inputs.get("attention_mask"))
                step_losses = losses(model(**inputs).logits, labels, len(clients))
                torch.autograd.backward(step_losses.sum())
                total[clients] += step_losses.detach()
            if config.max_grad_norm is not None:
                clip_per_client([p.grad for p in changing if p.grad is not None], config.max_grad_norm)
            optimizer.step()
            if in_float16:
                round_to_float16(changing)
            optimizer.zero_grad()
            on_step()
    return {name: p.detach() for name, p in parameters.items()}, total / len(batches)


def _some(parameters: Mapping[str, Tensor], clients: Sequence[int]) -> dict[str, Tensor]:
    rows = torch.tensor(clients, device=next(iter(parameters.values())).device)
    return {name: p.index_select(0, rows) for name, p in parameters.items()}


def make_optimizer(parameters: Sequence[Tensor], config: SimulationConfig) -> torch.optim.Optimizer:
    """Make the clients' optimizer. It acts element by element, hence on stacked parameters as on one client's."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, config.lr, config.momentum, weight_decay=config.weight_decay, fused=True)
    return torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay, fused=True)


def clip_per_client(gradients: Sequence[Tensor], max_norm: float) -> None:
    """Clip each client's part of the gradients (N, …) in place, as ``clip_grad_norm_`` does for one client."""
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
    scale = (max_norm / (norms + 1e-6)).clamp(max=1)
    for g in gradients:
        g.mul_(scale.view(-1, *[1] * (g.dim() - 1)))


def draw_batches(examples: np.ndarray, config: SimulationConfig, rng: np.random.Generator) -> np.ndarray:
    """Draw a client's examples (local_steps, batch) in random order; when they run out, again in a new order."""
    needed = config.local_steps * config.batch_size
    passes = [rng.permutation(examples) for _ in range(-(-needed // len(examples)))]
    return np.concatenate(passes)[:needed].reshape(config.local_steps, config.batch_size)
