"""The sums that are kept of updates that are added one by one."""

from array import array
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from hashlib import sha256

import torch
from torch import Tensor

from fedrot_kernels import Estimates, Rotations, product_norm, rotation_angle

from ..adapters.checks import carry
from ..adapters.layout import Layout
from ..adapters.update import StateDict, Update
from ..methods.base import Alignment
from ..methods.running_mean import RunningMean
from ..report.measure import Errors, count_directions, read_estimates
from ..report.report import AdapterReport
from ..report.sketch import Sketch
from .compiled import CompiledStream, StreamAverage, compile_stream


class StreamedRound:
    """The clients of a round so far: their names, weights and angles, and the sums of their tensors.

    Args:
        first: the first client, whose keys and shapes the others must have.
        layout: the layout of the first client's update.
        reference: the adapter that clients are aligned to, or None.
        seed: the seed of the sketch that estimates the aggregation error, or None for no sketch.
        alignment: how clients are aligned to the reference; None if otherwise, or if none are added here.

    Attributes:
        weights: client → weight, in the order they came.
        dropped: client → why it was left out.
        frozen: key → the factor that no client trained.
        counters: key → the integers that the result has.
        angles: in degrees, every client's rotation angles of all adapters, in the order of the layout's groups.
        undetermined: in how many directions nothing determined the rotations of an adapter, over all clients; per adapter,
            in the order of the layout's groups.
        directions: how many directions there were in all, likewise; zeros where no client was rotated.
    """

    def __init__(
        self,
        first: Update,
        layout: Layout,
        reference: Update | None,
        seed: int | None,
        alignment: Alignment | None = None,
    ):
        self.first, self.layout, self.reference = first.without_tensors(), layout, reference
        self.frozen: dict[str, Tensor] = {}
        self.counters: dict[str, Tensor] = {}
        self.dropped: dict[str, str] = {}
        self.weights: dict[str, float] = {}
        self.angles = array("d")
        self.adapters = [a for group in layout.groups for a in group.adapters]
        self.undetermined, self.directions = (array("q", bytes(8 * len(self.adapters))) for _ in range(2))
        self.mean = RunningMean(layout, first.device)
        rotates = alignment is None or bool(alignment.on)
        self.sketch = None if seed is None else Sketch(layout, first.device, seed, rotates=rotates)
        self._alignment = alignment
        self._first_has_layout = first.specs == layout.specs

    @property
    def seen(self) -> int:
        """The number of clients that were added or dropped."""
        return len(self.weights) + len(self.dropped)

    @cached_property
    def reference_digest(self) -> str:
        """A hash of the reference's factors, by which servers tell that they aligned to the same bits."""
        digest = sha256()
        for key in sorted(key for keys in self.layout.factor_keys for key in keys):
            assert self.reference is not None
            x = self.reference[key].detach().cpu().contiguous()
            digest.update(f"{key} {x.dtype} {tuple(x.shape)} ".encode())
            digest.update(x.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @cached_property
    def compiled(self) -> CompiledStream | None:
        """The compiled library's side of the stream; None if it does not take it."""
        return compile_stream(
            self.first,
            self.layout,
            self.reference,
            self.mean,
            self.sketch,
            self._alignment,
            self.undetermined,
            self.directions,
        )

    def has_layout(self, client: Update) -> bool:
        """Whether a client has the layout's ranks, and no configuration is known by which its scaling could be another."""
        configs = client.config, self.first.config, None if self.reference is None else self.reference.config
        return client.specs is self.first.specs and self._first_has_layout and configs == (None, None, None)

    def look(self, client: Update) -> bool | None:
        """Have the compiled library look at a client, which adds nothing yet.

        Returns:
            Whether the client is finite; None if the library cannot add this one.
        """
        if self._alignment is None or self.compiled is None:
            return None
        return self.compiled.look(client)

    def add_looked_at(self, name: str, weight: float) -> None:
        """Add the client that was looked at last; see ``CompiledStream.add``."""
        assert self.compiled is not None
        self.angles.extend(self.compiled.add(name, weight))
        self.weights[name] = weight

    def add(self, name: str, weight: float, tensors: StateDict, rotations: list[Rotations] | None) -> None:
        """Add a client that has been checked, in the form that ``Method.prepare`` gave it."""
        R = None if rotations is None else [found.R for found in rotations]
        watch, seed = (None, None) if self.sketch is None else (self.sketch.add, self.sketch.seed)
        self.mean.add(tensors, weight, R, watch, seed)
        self.weights[name] = weight
        if rotations is None:
            self.angles.extend([0.0] * len(self.adapters))
            return
        for found in rotations:
            self.angles.extend(rotation_angle(found.R).tolist())
        left = [count for found in rotations for count in found.undetermined.tolist()]
        every = [count for found in rotations for count in count_directions(found.R).tolist()]
        self._count(left, every)

    def merge(self, other: "StreamedRound") -> None:
        """Add another stream's clients, which have been checked. The other stays as it is."""
        share = self.mean.merge(other.mean)
        if self.sketch is not None and other.sketch is not None:
            self.sketch.merge(other.sketch.parts(), share)
        else:
            self.sketch = None
            self.__dict__.pop("compiled", None)  # which sketches
        self.weights |= other.weights
        self.dropped |= other.dropped
        self.frozen = self.frozen or {key: x.to(self.first.device, copy=True) for key, x in other.frozen.items()}
        if other.counters:
            theirs = replace(other.first, tensors=other.counters, keys_given={key: key for key in other.counters})
            self.counters = carry(self.counters, theirs, self.layout)
        keys = [a.key_A for a in self.adapters]
        self.angles.frombytes(other.angle_table(keys).numpy().tobytes())
        places = {a.key_A: i for i, a in enumerate(other.adapters)}
        self._count(*([counts[places[key]] for key in keys] for counts in (other.undetermined, other.directions)))

    def angle_table(self, keys: list[str]) -> Tensor:
        """The rotation angles (N, L) in float64: a row per client, a column per adapter in the order of these keys of A."""
        if not self.angles:
            return torch.empty(len(self.weights), len(keys), dtype=torch.float64, device="cpu")
        columns = {a.key_A: i for i, a in enumerate(self.adapters)}
        table = torch.frombuffer(self.angles, dtype=torch.float64).view(len(self.weights), -1)
        return table[:, [columns[key] for key in keys]]

    def average(self) -> StreamAverage:
        """Make the averages, which the sums do not survive."""
        if self.compiled is not None:
            return self.compiled.close()
        estimates = None if self.sketch is None else self.sketch.estimates(self._mean_norms())
        return StreamAverage(self.mean.state_dict(), estimates, False, None)

    def _mean_norms(self) -> dict[str, float]:
        """Key of A → ‖B̄Ā‖_F."""
        norms: dict[str, float] = {}
        for group in self.layout.groups:
            sums = group.all_A(self.mean.sums), group.all_B(self.mean.sums)
            A, B = (torch.stack(x).double() / self.mean.total_weight for x in sums)
            norms |= zip((a.key_A for a in group.adapters), product_norm(B, A).tolist(), strict=True)
        return norms

    def adapter_reports(self, estimates: Estimates | None) -> tuple[tuple[AdapterReport, ...], float | None]:
        """The reports of all adapters, and the standard deviation of the whole model's error.

        Args:
            estimates: of the errors, or None.
        """
        angles = self.angle_table([key_A for key_A, _ in self.layout.factor_keys]).T.tolist()
        errors, deviation = [Errors()] * len(angles), None
        if estimates is not None:
            errors, deviation = read_estimates(estimates)
        counts = self.counts()
        reports = []
        for a, per_client, of in zip(self.layout.adapters, map(tuple, angles), errors, strict=True):
            undetermined, directions = counts.get(a.key_A, (None, None))
            found = (of.error, of.update_norm, per_client, None, of.deviations, undetermined, directions, of.plain_error)
            reports.append(AdapterReport(a.module, a.rank, *found))
        return tuple(reports), deviation

    def counts(self) -> dict[str, tuple[int, int]]:
        """Key of A → its undetermined directions, and all of them; empty where no client was rotated."""
        if not any(self.directions):
            return {}
        counts = zip(self.undetermined, self.directions, strict=True)
        return dict(zip((a.key_A for a in self.adapters), counts, strict=True))

    def _count(self, undetermined: Iterable[int], directions: Iterable[int]) -> None:
        """Add numbers of directions, per adapter in the order of the layout's groups."""
        for counts, more in ((self.undetermined, undetermined), (self.directions, directions)):
            for i, n in enumerate(more):
                counts[i] += n
