"""A stream by the compiled library: a client is looked at in one call and added in another."""

from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from fedrot_kernels import ClientTensors, Estimates, Stream, open_stream
from fedrot_kernels.native_backend.tensors import TensorTable, read_tensors

from ..adapters.layout import Adapter, Layout, as_matrix
from ..adapters.update import Update
from ..methods.base import Alignment
from ..methods.rotation import LARGEST_RESIDUAL, check_rotations, trained_references
from ..methods.running_mean import RunningMean
from ..report.sketch import Sketch


@dataclass(frozen=True)
class StreamAverage:
    """What a stream ends in.

    Attributes:
        mean: canonical key → mean, in the updates' shapes and dtypes, each with storage of its own.
        estimates: of the errors, in the layout's order, if there is a sketch.
        is_finite: whether the mean is known to be finite.
        dead: the adapters that may have a rank without a row of A and a column of B that are not zero; None if all may.
    """

    mean: dict[str, Tensor]
    estimates: Estimates | None
    is_finite: bool
    dead: list[Adapter] | None


class CompiledStream:
    """The sums of a stream in the hands of the library.

    Args:
        stream: the library's side.
        first: the client that began the round.
        adapters: in the order of the layout's groups.
        layout: the layout.
        mean: the sums.
        is_aligned: whether clients are rotated.
    """

    def __init__(
        self, stream: Stream, first: Update, adapters: list[Adapter], layout: Layout, mean: RunningMean, is_aligned: bool
    ):
        self._stream, self._adapters, self._layout, self._mean = stream, adapters, layout, mean
        self._is_aligned = is_aligned
        # Tables of clients that were opened as the first have its order, which is the layout's.
        self._specs = first.specs if first.signature[:1] == (tuple(first.keys_given.values()),) else None
        self._client: TensorTable | None = None

    def look(self, client: Update) -> bool | None:
        """Find a client's rotations, which adds nothing yet.

        Returns:
            Whether the client is finite; None if the library cannot add this one.
        """
        table = client.table if client.specs is self._specs else None
        table = table or read_tensors([client[key] for key in self._layout.specs])

        def factors(i: int) -> tuple[Tensor, Tensor]:
            a = self._adapters[i]
            return as_matrix(client[a.key_A]), as_matrix(client[a.key_B])

        if table is None or not self._stream.look(table, factors):
            return None
        self._client = table  # keeps its memory
        return self._stream.is_finite

    def add(self, client: str, weight: float) -> "array[float]":
        """Add the client that was looked at last.

        Returns:
            The client's rotation angles, per adapter.

        Raises:
            UpdateError: the products of its factors overflow. Nothing was added.
        """
        if self._is_aligned and not float(self._stream.residual.max()) <= LARGEST_RESIDUAL:  # which NaN passes through
            check_rotations(self._stream.residual[:, None], self._adapters, [client])
        self._stream.add(*self._mean.count(weight))
        self._client = None
        return self._stream.angles

    def close(self) -> StreamAverage:
        """Make the averages, in the memory of the sums where that will do."""
        specs, total, out = self._layout.specs, self._mean.total_weight, {}
        for key, x in self._mean.sums.items():
            dtype = specs[key].dtype
            out[key] = x if x.dtype == dtype else torch.empty(x.shape, dtype=dtype, device="cpu")
        estimates = self._stream.close(total, list(out.values()))
        if estimates is not None:
            places = {a.key_A: i for i, a in enumerate(self._adapters)}
            order = [places[a.key_A] for a in self._layout.adapters]
            estimates = estimates._replace(numbers=estimates.numbers[order])
        mean = {key: x if x.shape == specs[key].shape else x.view(specs[key].shape) for key, x in out.items()}
        dead = [a for a, is_dead in zip(self._adapters, self._stream.dead, strict=True) if is_dead]
        return StreamAverage(mean, estimates, self._stream.is_finite, dead)


def compile_stream(
    first: Update,
    layout: Layout,
    reference: Update | None,
    mean: RunningMean,
    sketch: Sketch | None,
    alignment: Alignment | None,
    undetermined: "array[int]",
    directions: "array[int]",
) -> CompiledStream | None:
    """Give a stream's sums to the library; None if it does not take them.

    Args:
        first, layout, reference, mean, sketch, undetermined, directions: of the stream.
        alignment: how clients are aligned to the reference; None if the library adds none.
    """
    adapters = [a for group in layout.groups for a in group.adapters]
    places = {key: i for i, key in enumerate(layout.specs)}
    keys = [key for a in adapters for key in (a.key_A, a.key_B)] + list(layout.other_keys)
    others = [(mean.sums[key].numel(), layout.specs[key].dtype) for key in layout.other_keys]
    shapes, dtypes = [(a.rank, a.d_in, a.d_out) for a in adapters], [a.dtype for a in adapters]
    clients = ClientTensors(shapes, dtypes, others, [places[key] for key in keys])
    stream = open_stream(clients, list(mean.sums.values()), undetermined, directions)
    if stream is None:
        return None
    if sketch is not None:
        stream.sketch(sketch.sums, sketch.seed)
    on = () if alignment is None else alignment.on
    if alignment is not None and on:
        assert reference is not None
        A_ref, B_ref = trained_references(adapters, reference, on)
        stream.rotate_towards(
            A_ref if "A" in on else None,
            B_ref if "B" in on else None,
            strength=alignment.strength,
            reflections=alignment.reflections,
        )
    return CompiledStream(stream, first, adapters, layout, mean, bool(on))
