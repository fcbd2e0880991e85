"""A whole model in three launches: cross-covariance, rotations, rotated averages, whatever the adapters and clients."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ..checks import normalize_weights
from ..grouping import group_indices
from ..tolerances import PRODUCT_FLOOR
from ..types import Aligned, Clients
from . import cross_covariance, plain_average, rotate_average
from .launch import current_backend, interpreted, on_device_of, padded_rank, rank_multiple
from .rotations import rotations
from .tables import ModelTables, address_table, addresses_of, are_aligned, average_tables, model_tables


def align_average(
    A: Sequence[Clients],
    B: Sequence[Clients],
    weights: Sequence[float] | Tensor,
    *,
    A_ref: Sequence[Tensor] | None,
    B_ref: Sequence[Tensor] | None,
    strength: float,
    reflections: bool,
) -> Aligned:
    """Align and average checked factors, in three launches per dtype; see ``dispatch.align_average``.

    The averages of one dtype share their memory.
    """
    shares = normalize_weights(weights, len(A[0]), A[0][0].device).float()
    A_mean, B_mean, R = [A[0][0]] * len(A), [A[0][0]] * len(A), [A[0][0]] * len(A)
    residual, undetermined, finite = [shares] * len(A), [shares] * len(A), []
    for indices in group_indices(clients[0].dtype for clients in A):
        model = Model(
            [A[i] for i in indices],
            [B[i] for i in indices],
            None if A_ref is None else [A_ref[i] for i in indices],
            None if B_ref is None else [B_ref[i] for i in indices],
        )
        M = model.cross_covariance()
        model_R, deviation, left = rotations(
            M,
            model.tables.adapters,
            RP=model.RP,
            leading=model.RP,
            n_clients=model.n_clients,
            joint=len(model.on) == 2,
            strength=strength,
            reflections=reflections,
            floor=PRODUCT_FLOOR[torch.float32],
        )
        means, is_finite = model.rotate_average(model_R, shares, model.dtype)
        finite.append(is_finite)
        for at, i in enumerate(indices):
            rank = model.shapes[at][0]
            A_mean[i], B_mean[i], R[i] = means[2 * at], means[2 * at + 1], model_R[at, :, :rank, :rank]
            residual[i], undetermined[i] = deviation[at], left[at]
    return Aligned(A_mean, B_mean, R, torch.stack(residual), torch.stack(undetermined), torch.stack(finite).all())


def average(tensors: Sequence[Clients], weights: Sequence[float] | Tensor) -> tuple[list[Tensor], Tensor]:
    """Average checked tensors, in one launch per dtype; see ``dispatch.average``."""
    return weighted_sums(tensors, normalize_weights(weights, len(tensors[0]), tensors[0][0].device).float())


def weighted_sums(tensors: Sequence[Clients], shares: Tensor) -> tuple[list[Tensor], Tensor]:
    """Compute Σ wᵢxᵢ of checked tensors, and whether all are finite; shares: wᵢ, (N,) float32 on their device."""
    means, finite = [tensors[0][0]] * len(tensors), []
    for indices in group_indices(clients[0].dtype for clients in tensors):
        first = [tensors[i][0] for i in indices]
        device, dtype = first[0].device, first[0].dtype
        _check_device(device)
        found = [addresses_of(tensors[i]) for i in indices]
        addresses = [p for pointers, _ in found for p in pointers]
        sizes = tuple(x.numel() for x in first)
        tables = average_tables(sizes, device)
        table = address_table(addresses, device)
        out = torch.empty(tables.size, dtype=dtype, device=device)
        flags = torch.empty(len(tables.items), dtype=torch.int32, device=device)
        aligned = are_aligned(addresses) and all(n % 8 == 0 for n in sizes)
        options = plain_average.options(dtype, aligned)
        with on_device_of(out):
            plain_average.plain_average_kernel[(len(tables.items),)](
                table, tables.items, shares, out, tables.offsets, flags, len(shares), len(shares), **options.arguments()
            )
        finite.append(flags.all())
        for i, x, start in zip(indices, first, tables.starts, strict=True):
            means[i] = out[start : start + x.numel()].view(x.shape)
    return means, torch.stack(finite).all()


class Model:
    """L adapters of N clients, all of one dtype, wherever in memory their factors and the references are.

    Attributes:
        n_clients: N.
        dtype: of the factors.
        device: of the factors.
        shapes: per adapter its rank, d_in and d_out.
        on: the aligned factors, 0 for A and 1 for B.
        RP: the padded rank of all adapters.
        tables: the work of the launches.
        ref_dtype: the dtype in which the references are read.
        aligned: whether all tensors can be read in 16-byte loads.
        table: the address of every tensor.
    """

    def __init__(
        self,
        A: Sequence[Clients],
        B: Sequence[Clients],
        A_ref: Sequence[Tensor] | None,
        B_ref: Sequence[Tensor] | None,
    ):
        """Make the tables; arguments as in ``dispatch.align_average``, of one dtype."""
        self.n_clients, self.dtype, self.device = len(A[0]), A[0][0].dtype, A[0][0].device
        _check_device(self.device)
        self.shapes = tuple((a[0].shape[0], a[0].shape[1], b[0].shape[0]) for a, b in zip(A, B, strict=True))
        self.on = tuple(factor for factor, ref in enumerate((A_ref, B_ref)) if ref is not None)
        self.RP = padded_rank(max(rank for rank, _, _ in self.shapes))
        self.tables: ModelTables = model_tables(self.shapes, self.on, self.RP, self.device)
        refs = [x for factor_refs in (A_ref, B_ref) if factor_refs is not None for x in factor_refs]
        self.ref_dtype = self.dtype if all(r.dtype == self.dtype for r in refs) else torch.float32
        addresses: list[int] = []
        self._alive: list[Clients] = []  # copies of tensors that are not contiguous live until the launches
        for adapter, factors in enumerate(zip(A, B, strict=True)):
            for clients, factor_refs in zip(factors, (A_ref, B_ref), strict=True):
                found, alive = addresses_of(clients)
                addresses += found
                self._alive.append(alive)
                if factor_refs is None:
                    addresses.append(0)
                else:
                    found, alive = addresses_of([factor_refs[adapter].to(self.device, self.ref_dtype)])
                    addresses += found
                    self._alive.append(alive)
        multiple = rank_multiple(self.RP, self.dtype)
        self.aligned = are_aligned(addresses) and all(
            rank % multiple == 0 and d_in % 8 == 0 and d_out % 8 == 0 for rank, d_in, d_out in self.shapes
        )
        self.table = address_table(addresses, self.device)

    def cross_covariance(self) -> Tensor:
        """Compute M, (slices, N + 1, RP, RP) float32; row N, the reference's own, only where both factors are aligned."""
        n_rows = self.n_clients + 1
        M = torch.empty(len(self.tables.slices), n_rows, self.RP, self.RP, dtype=torch.float32, device=self.device)
        joint, mixed = len(self.on) == 2, self.ref_dtype != self.dtype
        self._launch_cross_covariance(M, self.dtype, 0, n_rows if joint and not mixed else self.n_clients)
        if joint and mixed:  # the reference has another dtype than the clients, so it takes a launch of its own
            self._launch_cross_covariance(M, self.ref_dtype, self.n_clients, n_rows)
        return M

    def _launch_cross_covariance(self, M: Tensor, dtype: torch.dtype, first: int, last: int) -> None:
        options = cross_covariance.options(self.RP, dtype, self.ref_dtype, self.aligned, current_backend())
        grid = (len(self.tables.slices), triton.cdiv((last - first) * self.RP, options.constants["ROWS"]))
        with on_device_of(M):
            cross_covariance.cross_covariance_kernel[grid](
                self.table, self.tables.slices, M, first, last, self.n_clients + 1, **options.arguments()
            )

    def rotate_average(self, R: Tensor, shares: Tensor, out_dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
        """Average the rotated factors.

        Args:
            R: (L, N, RP, RP) float32.
            shares: (N,) float32, summing to 1.
            out_dtype: of the averages.

        Returns:
            Ā (r, d_in) and B̄ (d_out, r) of every adapter in turn, and a bool scalar tensor: all of their entries are finite.
        """
        tables = self.tables
        out = torch.empty(tables.size, dtype=out_dtype, device=self.device)
        flags = torch.empty(len(tables.tiles), dtype=torch.int32, device=self.device)
        options = rotate_average.options(self.RP, self.dtype, out_dtype, self.aligned, current_backend())
        with on_device_of(out):
            rotate_average.rotate_average_kernel[(len(tables.tiles),)](
                self.table,
                tables.tiles,
                R,
                shares,
                out,
                tables.offsets,
                flags,
                self.n_clients,
                self.n_clients + 1,
                **options.arguments(),
            )
        shapes = [shape for rank, d_in, d_out in self.shapes for shape in ((rank, d_in), (d_out, rank))]
        means = [out[s : s + r * c].view(r, c) for s, (r, c) in zip(tables.starts, shapes, strict=True)]
        return means, flags.all()


def _check_device(device: torch.device) -> None:
    if device.type != "cuda" and not interpreted():
        raise ValueError(f"the Triton kernels take tensors on a GPU, got {device}; use backend='torch'")
