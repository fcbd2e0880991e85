"""The sums that are kept of updates that are added one by one."""

from array import array
from collections import Counter
from dataclasses import replace
from functools import cached_property
from hashlib import sha256

import torch
from torch import Tensor

from fedrot_kernels import Rotations, product_norm, rotation_angle

from ..adapters.checks import carry
from ..adapters.layout import Layout
from ..adapters.update import StateDict, Update
from ..methods.running_mean import RunningMean
from ..report.measure import count_directions, read_estimates
from ..report.report import AdapterReport
from ..report.sketch import Sketch


class StreamedRound:
    """The clients of a round so far: their names, weights and angles, and the sums of their tensors.

    Args:
        first: the first client, whose keys and shapes the others must have.
        layout: the layout of the first client's update.
        reference: the adapter that clients are aligned to, or None.
        seed: the seed of the sketch that estimates the aggregation error, or None for no sketch.

    Attributes:
        weights: client → weight, in the order they came.
        dropped: client → why it was left out.
        frozen: key → the factor that no client trained.
        counters: key → the integers that the result has.
        angles: in degrees, every client's rotation angles of all adapters, in the order of the layout's groups.
        undetermined: key of A → in how many directions nothing determined the rotations of that adapter, over all clients;
            empty where no client was rotated.
        directions: key of A → how many directions there were in all, likewise.
    """

    def __init__(self, first: Update, layout: Layout, reference: Update | None, seed: int | None):
        self.first, self.layout, self.reference = first.without_tensors(), layout, reference
        self.frozen: dict[str, Tensor] = {}
        self.counters: dict[str, Tensor] = {}
        self.dropped: dict[str, str] = {}
        self.weights: dict[str, float] = {}
        self.angles = array("d")
        self.undetermined, self.directions = Counter[str](), Counter[str]()
        self.mean = RunningMean(layout, first.device)
        self.sketch = None if seed is None else Sketch(layout, first.device, seed)

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

    def add(self, name: str, weight: float, tensors: StateDict, rotations: list[Rotations] | None) -> None:
        """Add a client that has been checked, in the form that ``Method.prepare`` gave it."""
        R = None if rotations is None else [found.R for found in rotations]
        watch, seed = (None, None) if self.sketch is None else (self.sketch.add, self.sketch.seed)
        self.mean.add(tensors, weight, R, watch, seed)
        self.weights[name] = weight
        if rotations is None:
            self.angles.extend([0.0] * len(self.layout.adapters))
            return
        keys = [a.key_A for group in self.layout.groups for a in group.adapters]
        for found in rotations:
            self.angles.extend(rotation_angle(found.R).tolist())
        left = [count for found in rotations for count in found.undetermined.tolist()]
        every = [count for found in rotations for count in count_directions(found.R).tolist()]
        self.undetermined.update(dict(zip(keys, left, strict=True)))
        self.directions.update(dict(zip(keys, every, strict=True)))

    def merge(self, other: "StreamedRound") -> None:
        """Add another stream's clients, which have been checked. The other stays as it is."""
        share = self.mean.merge(other.mean)
        if self.sketch is not None and other.sketch is not None:
            self.sketch.merge(other.sketch.parts(), share)
        else:
            self.sketch = None
        self.weights |= other.weights
        self.dropped |= other.dropped
        self.frozen = self.frozen or {key: x.to(self.first.device, copy=True) for key, x in other.frozen.items()}
        if other.counters:
            theirs = replace(other.first, tensors=other.counters, keys_given={key: key for key in other.counters})
            self.counters = carry(self.counters, theirs, self.layout)
        table = other.angle_table([a.key_A for group in self.layout.groups for a in group.adapters])
        self.angles.frombytes(table.numpy().tobytes())
        self.undetermined.update(other.undetermined)
        self.directions.update(other.directions)

    def angle_table(self, keys: list[str]) -> Tensor:
        """The rotation angles (N, L) in float64: a row per client, a column per adapter in the order of these keys of A."""
        if not self.angles:
            return torch.empty(len(self.weights), len(keys), dtype=torch.float64)
        columns = {a.key_A: i for i, a in enumerate(a for group in self.layout.groups for a in group.adapters)}
        table = torch.frombuffer(self.angles, dtype=torch.float64).view(len(self.weights), -1)
        return table[:, [columns[key] for key in keys]]

    def adapter_reports(self) -> tuple[tuple[AdapterReport, ...], float | None]:
        """The reports of all adapters, whose errors are estimates, and the standard deviation of the whole model's error."""
        angles = self.angle_table([key_A for key_A, _ in self.layout.factor_keys]).T.tolist()
        pairs = list(zip(self.layout.adapters, map(tuple, angles), strict=True))
        if self.sketch is None:
            return tuple(
                AdapterReport(a.module, a.rank, None, None, per_client, None, None, *self._counts(a.key_A))
                for a, per_client in pairs
            ), None
        mean_norms: dict[str, float] = {}
        for group, sums in zip(self.layout.groups, self.mean.groups, strict=True):
            A, B = (x.double() / self.mean.total_weight for x in sums)
            mean_norms |= zip((a.key_A for a in group.adapters), product_norm(B, A).tolist(), strict=True)
        errors, deviation = read_estimates(self.sketch.estimates(mean_norms))
        rows = zip(pairs, errors, strict=True)
        return tuple(
            AdapterReport(
                *(a.module, a.rank, of.error, of.update_norm, per_client, None, of.deviations),
                *self._counts(a.key_A),
                of.plain_error,
            )
            for (a, per_client), of in rows
        ), deviation

    def _counts(self, key: str) -> tuple[int | None, int | None]:
        """The undetermined directions of an adapter, and all of them; None where no client was rotated."""
        return self.undetermined.get(key), self.directions.get(key)
