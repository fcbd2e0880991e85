"""Grouping the clients that go through the model together in a step, when their texts differ in length.

Padding all clients to the longest text can waste more than another pass costs. A CPU soon gains from more passes, a GPU only
with long texts.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn


def pass_overhead(model: nn.Module, device: torch.device) -> float:
    """Estimate the fixed cost of one forward and backward pass, in tokens. The estimate is the same on every run.

    The fixed cost of small models is the calls, that of large ones reading the weights. For MiniLM (22 million parameters)
    on a core of an EPYC, 60 to 240 tokens were equally good. The numbers for GPUs are not measured.
    """
    size = sum(p.numel() for p in model.parameters())
    return 30 + 2e9 / size if device.type == "cpu" else 500 + 1e12 / size


def client_lengths(inputs: Mapping[str, Tensor], clients: int) -> list[int] | None:
    """Count the tokens of each client's longest text without padding at the end; None if the inputs are not texts."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return None
    ends = (mask != 0) * torch.arange(1, mask.shape[1] + 1, device=mask.device)
    lengths: list[int] = ends.view(clients, -1).amax(1).tolist()
    return lengths


def client_of_longest(inputs: Mapping[str, Tensor], clients: int) -> int:
    """Find the client that has the longest text; the first client if inputs are not texts."""
    lengths = client_lengths(inputs, clients) or [0]
    return lengths.index(max(lengths))


def group_clients(lengths: Sequence[int], rows: int, overhead: float) -> list[list[int]]:
    """Group clients of similar lengths so that Σ (overhead + clients · rows · longest) over the groups is least.

    Args:
        lengths: the length of every client's longest text, in tokens.
        rows: the number of rows of each client.
        overhead: the fixed cost of a pass, in tokens.

    Returns:
        The groups' client numbers, ascending by length.
    """
    order = sorted(range(len(lengths)), key=lambda client: lengths[client])
    least, cut = [0.0], [0]  # for the first 0, 1, … clients: the least cost, and where the last group begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        costs = [least[start] + overhead + (end - start) * rows * longest for start in range(end)]
        cut.append(min(range(end), key=costs.__getitem__))
        least.append(costs[cut[end]])
    groups, end = [], len(order)
    while end:
        groups.append(order[cut[end] : end])
        end = cut[end]
    return groups[::-1]


def group_by_length(
    inputs: Mapping[str, Tensor], clients: int, overhead: float
) -> Iterator[tuple[list[int], Mapping[str, Tensor]]]:
    """Yield a step's inputs for one group of clients after the other, without padding that the group does not need.

    Args:
        inputs: the inputs of all clients, client-major.
        clients: N, the number of clients.
        overhead: the fixed cost of a pass, in tokens.

    Yields:
        The group's clients and its inputs, client-major. If inputs are not texts, all clients and the inputs as they are.
    """
    lengths = client_lengths(inputs, clients)
    rows = len(next(iter(inputs.values()))) // clients
    groups = group_clients(lengths, rows, overhead) if lengths else []
    if lengths is None or len(groups) == 1:
        yield list(range(clients)), inputs
        return
    texts = inputs["attention_mask"].shape
    for group in groups:
        longest = lengths[group[-1]]
        own = (torch.tensor(group)[:, None] * rows + torch.arange(rows)).flatten().to(inputs["attention_mask"].device)
        yield group, {name: x[own, :longest] if x.shape[:2] == texts else x[own] for name, x in inputs.items()}
