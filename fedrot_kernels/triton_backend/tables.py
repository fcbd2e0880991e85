"""Tables that launches over a whole model read from the device: work items, tensors' addresses, places of averages.

Tables are made once per model shape and stay on the device for good, because launches under way and graphs may read them.
Tables of addresses are kept for when the same tensors come back: a call that has run once can be captured in a CUDA graph,
which then holds only the launches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from ..schedule import CLASSIC, SCHEDULE
from ..types import Clients
from . import plain_average, rotate_average
from .cross_covariance import slice_length
from .launch import ALIGNMENT

Shape = tuple[int, int, int]  # rank, d_in, d_out of an adapter
_LANE = 64  # elements: averages begin at multiples, which are aligned in every dtype


@dataclass(frozen=True)
class ModelTables:
    """The work of one model shape.

    Attributes:
        slices: (n, 4) int32, the cross-covariance's items: tensor, rank, d, start. Tensor 2l is A of adapter l, 2l + 1 is B.
        adapters: (L, 5) int32: the rank, the first and last slice whose sum is M, and those of B where both are aligned.
        tiles: (m, 4) int32, the rotated average's items, likewise.
        offsets: (2L,) int64, where each average begins in the memory that all share.
        starts: the offsets on the host.
        size: how many elements that memory has.
    """

    slices: Tensor
    adapters: Tensor
    tiles: Tensor
    offsets: Tensor
    starts: tuple[int, ...]
    size: int


@cache
def model_tables(shapes: tuple[Shape, ...], on: tuple[int, ...], RP: int, device: torch.device) -> ModelTables:
    """Make the tables of a model whose factors ``on`` (0 for A, 1 for B) are aligned.

    The averages begin with the aligned factor's tiles, last adapter first, because the L2 cache still holds what the
    cross-covariance read last.
    """
    dims = {(adapter, factor): (rank, d[factor]) for adapter, (rank, *d) in enumerate(shapes) for factor in (0, 1)}
    slices: list[tuple[int, ...]] = []
    adapters = []
    for adapter, (rank, *_) in enumerate(shapes):
        bounds = []
        for factor in on:
            d = dims[adapter, factor][1]
            bounds.append(len(slices))
            slices += [(2 * adapter + factor, rank, d, start) for start in range(0, d, slice_length(RP))]
            bounds.append(len(slices))
        adapters.append((rank, *bounds, *[0] * (4 - len(bounds))))
    reread = [(adapter, factor) for adapter in reversed(range(len(shapes))) for factor in on]
    order = [*reread, *(key for key in dims if key[1] not in on)]
    tiles = [
        (2 * adapter + factor, *dims[adapter, factor], start)
        for adapter, factor in order
        for start in range(0, dims[adapter, factor][1], rotate_average.tile_length(RP))
    ]
    starts, size = _starts([rank * d for rank, d in dims.values()])
    return ModelTables(
        _on_device(slices, torch.int32, device),
        _on_device(adapters, torch.int32, device),
        _on_device(tiles, torch.int32, device),
        _on_device(starts, torch.int64, device),
        starts,
        size,
    )


@dataclass(frozen=True)
class AverageTables:
    """The work of plain averages.

    Attributes:
        items: (n, 3) int64: tensor, elements, start.
        offsets: as in ``ModelTables``, and so are starts and size.
        starts: the offsets on the host.
        size: how many elements the memory has that all averages share.
    """

    items: Tensor
    offsets: Tensor
    starts: tuple[int, ...]
    size: int


@cache
def average_tables(sizes: tuple[int, ...], device: torch.device) -> AverageTables:
    """Make the tables of tensors that have ``sizes`` elements."""
    items = [(t, n, start) for t, n in enumerate(sizes) for start in range(0, n, plain_average.BLOCK)]
    starts, size = _starts(sizes)
    return AverageTables(_on_device(items, torch.int64, device), _on_device(starts, torch.int64, device), starts, size)


def address_table(addresses: Sequence[int], device: torch.device) -> Tensor:
    """Put addresses on the device, as int64, ordered by tensor, then client, then the reference."""
    table = _address_table(tuple(addresses), device)
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            _captured.append(table)
        else:
            table.record_stream(torch.cuda.current_stream(device))  # not to be reused before this stream has read it
    return table


_captured: list[Tensor] = []  # tables that graphs read; kept for good, because nothing tells when a graph is gone


@lru_cache(maxsize=16)
def _address_table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    return _on_device(addresses, torch.int64, device)


@cache
def one_adapter(rank: int, device: torch.device) -> Tensor:
    """Make the ``adapters`` of a batch of whole matrices of one rank: (1, 5) int32."""
    return _on_device([(rank, 0, 1, 0, 0)], torch.int32, device)


@cache
def schedule_table(device: torch.device) -> Tensor:
    """Put the coefficients of Newton–Schulz on the device: (steps + 1, 3) float32, the classic ones last."""
    return _on_device((*SCHEDULE, CLASSIC), torch.float32, device)


def addresses_of(clients: Clients) -> tuple[list[int], Clients]:
    """Find the address of every client's tensor.

    Returns:
        The addresses, and the tensors that must live until the launch: copies of those that are not contiguous.
    """
    if not clients[0].numel():
        return [0] * len(clients), clients
    if isinstance(clients, Tensor):
        if not clients[0].is_contiguous():
            clients = clients.contiguous()
        first, step = clients.data_ptr(), clients.stride(0) * clients.element_size()
        return [first + step * i for i in range(len(clients))], clients
    if not all(map(Tensor.is_contiguous, clients)):
        clients = [x.contiguous() for x in clients]
    return list(map(Tensor.data_ptr, clients)), clients


def are_aligned(addresses: Sequence[int]) -> bool:
    """Whether 16 bytes can be read at once from every address."""
    return not bool((torch.tensor(addresses) % ALIGNMENT).any())


def _starts(sizes: Sequence[int]) -> tuple[tuple[int, ...], int]:
    ends = list(accumulate(-(-n // _LANE) * _LANE for n in sizes))
    return (0, *ends[:-1]), ends[-1]


def _on_device(rows: Sequence[int] | Sequence[Sequence[int | float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy that every stream may read. It is made on a stream of its own, so that only the copy is waited for."""
    if device.type != "cuda":
        return torch.tensor(rows, dtype=dtype, device=device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("new tensors: call once before capturing a CUDA graph, with contiguous tensors of one dtype")
    stream = _copy_stream(device)
    with torch.cuda.stream(stream):
        copy = torch.tensor(rows, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
    stream.synchronize()
    return copy


@lru_cache(maxsize=64)
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
