"""Dropout whose masks are functions of the seed, the round and the client, whichever clients share the pass.

Numbers drawn one after another would depend on how many clients a pass has and how far their texts are padded. Therefore a
mask is computed: whether an element is dropped is a hash of the client's seed, the number of the dropout and the element's
place among the client's rows. Padding at the end, the number of clients in a pass and the device change nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

# MurmurHash3's multipliers as int32, whose products wrap.
_MIX1, _MIX2 = -2048144789, -1028477387
_SHIFT1, _SHIFT2 = torch.tensor([16, 13], dtype=torch.int32)  # a Python number would become a tensor each time
_STEP = -1640531527  # 2³² divided by the golden ratio, as int32: multiples of neighbouring numbers lie far apart

_plain_attention = functional.scaled_dot_product_attention


class ClientDropout:
    """Replaces PyTorch's dropouts, including attention's, by dropouts with masks of the clients' own.

    A leading axis whose length is a multiple of the pass's rows is taken for rows, client-major, perhaps with heads or
    tokens. Any other tensor, such as a table of positions, belongs to no client, and all clients drop the same of it.
    Random numbers that are drawn elsewhere, such as in the dropout inside ``nn.LSTM``, still depend on the pass.

    The number of a dropout is drawn from PyTorch's global generator, so that passes that start from the same seed have the
    same dropouts. Gradient checkpointing sets that generator back before it computes activations again, so that it gets the
    same masks.
    """

    def __init__(self, seeds: Sequence[int], batch_size: int, device: torch.device):
        """Set up the clients' masks.

        Args:
            seeds: one per client.
            batch_size: rows per client.
            device: the model's device.
        """
        self.all_keys = torch.tensor([_int32(seed ^ seed >> 32) for seed in seeds], dtype=torch.int32, device=device)
        self.keys, self.batch_size = self.all_keys, batch_size
        self._one: Tensor | None = None
        self._axes: dict[int, Tensor] = {}

    def use(self, clients: Sequence[int]) -> None:
        """Take the rows of what follows for those of these clients."""
        self.keys = self.all_keys[list(clients)]

    @contextmanager
    def one_client(self, key: Tensor) -> Iterator[None]:
        """Take every tensor within the context for one client's, as under ``vmap`` over ``keys``."""
        self._one = key
        try:
            yield
        finally:
            self._one = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Replace the dropouts of ``torch.nn.functional`` within the context.

        A TorchFunctionMode would not reach the backward pass, in which checkpoints compute activations again.
        """
        originals = {name: getattr(functional, name) for name in _REPLACED}
        try:
            for name, replacement in _REPLACED.items():
                setattr(functional, name, partial(replacement, self))
            yield
        finally:
            for name, original in originals.items():
                setattr(functional, name, original)

    def drop(self, x: Tensor, p: float, shape: Sequence[int]) -> Tensor:
        """Drop elements of x with probability p and scale the others up by 1 / (1 − p).

        Args:
            x: any tensor.
            p: the probability, between 0 and 1.
            shape: the mask's shape, with as many axes as x; it is broadcast.
        """
        if not 0 <= p <= 1:
            raise ValueError(f"a dropout's probability must lie between 0 and 1, got {p}")
        which = _int32(int(torch.empty((), dtype=torch.int64).random_()))
        if p == 1:
            return x * 0
        hashed: Tensor
        if self._one is not None:
            hashed = _mix(self._one + which) + self._places(0, shape[0])
        elif shape[0] % (len(self.keys) * self.batch_size) == 0:
            hashed = (_mix(self.keys + which)[:, None] + self._places(0, shape[0] // len(self.keys))).flatten()
        else:
            hashed = self._places(0, shape[0]) + which
        for axis, size in enumerate(shape[1:], start=1):
            hashed = hashed.unsqueeze(-1) + self._places(axis, size)
        keep = _mix(hashed) >= round(p * 2**32) - 2**31
        return (x * keep).mul_(1 / (1 - p))

    def _places(self, axis: int, size: int) -> Tensor:
        """Random numbers (size,) of the places along an axis; the first ones are the same for every size."""
        found = self._axes.get(axis)
        if found is None or len(found) < size:
            found = torch.arange(size, dtype=torch.int32, device=self.keys.device) * _STEP + _int32(axis * _MIX2)
            self._axes[axis] = found = _mix(_mix(found))
        return found[:size]


def _int32(n: int) -> int:
    return (n + 2**31) % 2**32 - 2**31


def _mix(h: Tensor) -> Tensor:
    h = (h ^ (h >> _SHIFT1)).mul_(_MIX1)
    return h.bitwise_xor_(h >> _SHIFT2).mul_(_MIX2)


# The parameters have PyTorch's names, by which callers may pass them.
def _dropout(
    clients: ClientDropout,
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,  # noqa: ARG001
) -> Tensor:
    return clients.drop(input, p, input.shape) if training and p != 0 else input


def _channels(
    clients: ClientDropout,
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,  # noqa: ARG001
) -> Tensor:
    return clients.drop(input, p, (*input.shape[:2], *[1] * (input.dim() - 2))) if training and p != 0 else input


def _attention(
    clients: ClientDropout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p == 0:
        return _plain_attention(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(
            ~attn_mask, torch.finfo(scores.dtype).min
        )  # not −inf: a padding token may attend to nothing
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return clients.drop(weights, dropout_p, weights.shape) @ value


_REPLACED: dict[str, Callable[..., Tensor]] = {
    "dropout": _dropout,
    "dropout1d": _channels,
    "dropout2d": _channels,
    "dropout3d": _channels,
    "scaled_dot_product_attention": _attention,
}
