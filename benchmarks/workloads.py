"""The models that are aggregated in the benchmarks, and client updates for them, in every layout the kernels take."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

StateDict = dict[str, Tensor]
# How far a client's factors have drifted from the reference, relative to the reference; a rotation comes on top.
DRIFT = 0.3
LARGEST_CONDITION_NUMBER = 6.0  # of M; client updates that were trained from a common start have 1 to 6


@dataclass(frozen=True)
class Adapter:
    """One LoRA pair: A (r, d_in) and B (d_out, r) of a module."""

    module: str
    d_in: int
    d_out: int

    @property
    def keys(self) -> tuple[str, str]:
        """The keys of A and B in a PEFT state dict."""
        return f"base_model.model.{self.module}.lora_A.weight", f"base_model.model.{self.module}.lora_B.weight"


@dataclass(frozen=True)
class Workload:
    """The adapters of one model, all of one rank, from N clients."""

    model: str
    adapters: tuple[Adapter, ...]
    rank: int
    clients: int

    @property
    def label(self) -> str:
        return f"{self.model} r={self.rank} N={self.clients}"

    @property
    def elements(self) -> tuple[int, int]:
        """The elements of one update's A factors and of its B factors."""
        return self.rank * sum(a.d_in for a in self.adapters), self.rank * sum(a.d_out for a in self.adapters)

    def update_bytes(self, dtype: torch.dtype) -> int:
        return sum(self.elements) * dtype.itemsize

    def aligned_bytes(self, dtype: torch.dtype) -> int:
        """The bytes that must move to align on A and average: every A read twice, every B and the reference's A once,
        the output written once."""
        A, B = self.elements
        return (self.clients * (2 * A + B) + A + (A + B)) * dtype.itemsize

    def together_bytes(self, dtype: torch.dtype) -> int:
        """The bytes that must move to align all clients together and average: every factor read twice, the reference once,
        the output written once."""
        return (2 * self.clients + 2) * self.update_bytes(dtype)

    def averaged_bytes(self, dtype: torch.dtype) -> int:
        """The bytes that must move to average without aligning: every factor read once, the output written once."""
        return (self.clients + 1) * self.update_bytes(dtype)

    def needed_bytes(self, dtype: torch.dtype) -> int:
        """The memory that a benchmark of this workload takes: three layouts, what batching copies (in float32), output."""
        working = self.update_bytes(torch.float32) * (self.clients + 2)
        return 3 * (self.clients + 1) * self.update_bytes(dtype) + working + self.aligned_bytes(dtype)

    def shrunk(self) -> "Workload":
        """Every fourth adapter and at most three clients: to see that a benchmark runs, not to measure."""
        return replace(self, adapters=self.adapters[::4][:8], clients=min(self.clients, 3))


def _roberta_large() -> tuple[Adapter, ...]:
    layers = (f"roberta.encoder.layer.{i}.attention.self.{name}" for i in range(24) for name in ("query", "value"))
    return tuple(Adapter(module, 1024, 1024) for module in layers)


def _llama(shapes: Mapping[str, tuple[int, int]]) -> tuple[Adapter, ...]:
    return tuple(Adapter(f"model.layers.{i}.{name}", *shape) for i in range(32) for name, shape in shapes.items())


_QV = {"self_attn.q_proj": (4096, 4096), "self_attn.v_proj": (4096, 1024)}
_ALL = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 1024),
    "self_attn.v_proj": (4096, 1024),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (4096, 14336),
    "mlp.up_proj": (4096, 14336),
    "mlp.down_proj": (14336, 4096),
}
WORKLOADS: dict[str, tuple[Workload, ...]] = {
    "roberta-large": tuple(Workload("roberta-large", _roberta_large(), 4, N) for N in (3, 10, 50)),
    "llama-qv": tuple(Workload("llama-qv", _llama(_QV), r, N) for r in (8, 16) for N in (6, 32)),
    "llama-all": (Workload("llama-all", _llama(_ALL), 16, 10),),
}


@dataclass(frozen=True)
class Inputs:
    """The same updates in every layout.

    Attributes:
        weights: the clients' example counts.
        reference: the state dict that the clients started from.
        separate: per client a state dict whose tensors are allocated one by one, as training leaves them.
        slabs: per client a state dict of views into one contiguous allocation.
        stacked: a state dict whose tensors have the clients as an additional first dimension.
    """

    workload: Workload
    weights: list[float]
    reference: StateDict
    separate: list[StateDict]
    slabs: list[StateDict]
    stacked: StateDict

    @property
    def reference_A(self) -> list[Tensor]:
        return [self.reference[a.keys[0]] for a in self.workload.adapters]

    @property
    def stacked_factors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Per adapter A (N, r, d_in) and B (N, d_out, r)."""
        keys = [a.keys for a in self.workload.adapters]
        return [self.stacked[A] for A, _ in keys], [self.stacked[B] for _, B in keys]

    def factors(self, updates: list[StateDict]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """Per adapter the clients' A (r, d_in) and B (d_out, r), from ``separate`` or ``slabs``."""
        keys = [a.keys for a in self.workload.adapters]
        return [[u[A] for u in updates] for A, _ in keys], [[u[B] for u in updates] for _, B in keys]


def build(workload: Workload, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Clients near a common reference, each adapter in a basis of its client's own.

    Aᵢ = Qᵢ (A_ref + drift), Bᵢ = (B_ref + drift) Qᵢᵀ with rotations Qᵢ; M has a condition number between 1 and 6.
    """
    generator = torch.Generator(device).manual_seed(seed)
    stacked: StateDict = {}
    reference: StateDict = {}
    for adapter in workload.adapters:
        for key, factor in zip(adapter.keys, _clients(adapter, workload, device, generator), strict=True):
            reference[key], stacked[key] = factor[0].to(dtype), factor[1:].to(dtype)
    separate = [{key: x[i].clone() for key, x in stacked.items()} for i in range(workload.clients)]
    weights = [float(100 + 37 * i % 101) for i in range(workload.clients)]
    return Inputs(workload, weights, reference, separate, [_slab(update) for update in separate], stacked)


def _clients(adapter: Adapter, workload: Workload, device: torch.device, generator: torch.Generator) -> Iterator[Tensor]:
    """A (1 + N, r, d_in) and B (1 + N, d_out, r), the reference first."""
    r, N = workload.rank, workload.clients

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    condition = 1 + (LARGEST_CONDITION_NUMBER - 1) * torch.rand((), device=device, generator=generator)
    spectrum = condition ** -torch.linspace(0, 0.5, r, device=device)  # of A_ref: M's is its square
    skew = normal(N, r, r)
    skew = 0.3 * (skew - skew.mT) / r**0.5
    eye = torch.eye(r, device=device)
    Q = torch.linalg.solve(eye + skew, eye - skew)  # Cayley: rotations, none of them a reflection
    Q = torch.cat([eye[None], Q])
    for d, left in ((adapter.d_in, True), (adapter.d_out, False)):
        F = (spectrum / d**0.5)[:, None] * normal(1 + N, r, d)
        F[1:] = F[0] + DRIFT * F[1:]
        F = Q @ F
        yield F if left else F.mT.contiguous()


def _slab(update: StateDict) -> StateDict:
    first = next(iter(update.values()))
    memory = torch.empty(sum(x.numel() for x in update.values()), dtype=first.dtype, device=first.device)
    views = memory.split([x.numel() for x in update.values()])
    slab = {key: view.view(x.shape) for (key, x), view in zip(update.items(), views, strict=True)}
    for key, view in slab.items():
        view.copy_(update[key])
    return slab


def free_bytes(device: torch.device) -> int:
    """The memory that is free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # counts the page cache, which SC_AVPHYS_PAGES does not
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def does_not_fit(workload: Workload, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a workload is left out on this device, or None."""
    needed, free = workload.needed_bytes(dtype), free_bytes(device)
    if needed <= free:
        return None
    return f"{workload.label}: skipped, needs {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB free on {device}"
