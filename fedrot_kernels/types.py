"""Types that the functions of this package take and return."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

Clients = Tensor | Sequence[Tensor]
"""One tensor from each of N clients: stacked, (N, …), or N tensors (…)."""

Factors = Sequence[Clients]
"""One factor of every adapter of a model, from each of N clients."""

Backend = Literal["auto", "native", "torch", "triton"]
"""The implementation: Triton kernels, the compiled library on a CPU ("native"), PyTorch, or ("auto") the first of these
that is there and takes the inputs."""

Target = Literal["reference", "consensus", "error"]
"""The quantity that ``align_together`` minimises: distance to a reference, spread of the clients, or aggregation error."""


class Rotations(NamedTuple):
    """Rotations, and how sure they are.

    Attributes:
        R: (..., r, r), float32 (float64 for float64).
        residual: (...), ‖RᵀR − I‖_max; NaN where the cross-covariance is not finite.
        undetermined: (...), int64: the number of directions in which the cross-covariance says nothing, so that R is
            completed by what is nearest the identity.
    """

    R: Tensor
    residual: Tensor
    undetermined: Tensor


class Estimates(NamedTuple):
    """Errors of L adapters, estimated by the sketches of ``sketch.py``.

    Attributes:
        numbers: (L, 7) float64 on the CPU: ‖E‖² of the result, that of the plain average, and what E adds to ‖B̄Ā‖², each
            followed by its standard deviation; then ‖B̄Ā‖². E = Σ wᵢBᵢAᵢ − B̄Ā, and ‖Σ wᵢBᵢAᵢ‖² is the fifth and seventh.
        squares: (32, 32) float64 on the CPU, whose sum estimates ‖E‖² of all adapters together.
    """

    numbers: Tensor
    squares: Tensor


@dataclass(frozen=True)
class Aligned:
    """Rotated averages of L adapters from N clients.

    Attributes:
        A: per adapter Ā = Σ wᵢ RᵢᵀAᵢ, (r, d_in), in the inputs' dtype. PyTorch gives each average storage of its own; the
            Triton averages of one dtype share one storage.
        B: per adapter B̄ = Σ wᵢ BᵢRᵢ, (d_out, r), likewise.
        R: per adapter the rotations, (N, r, r), float32 (float64 for float64 inputs).
        residual: (L, N), ‖RᵀR − I‖_max of every rotation; NaN where the cross-covariance was not finite.
        undetermined: (L, N), the number of directions in which a cross-covariance says nothing; see ``Rotations``.
        finite: a bool scalar tensor on the inputs' device: every entry of every average is finite.
        estimates: the errors, if a seed was given to estimate them.
        angles: (L, N) float64, the rotation angles in degrees; None if the backend leaves them to ``rotation_angle``.
    """

    A: list[Tensor]
    B: list[Tensor]
    R: list[Tensor]
    residual: Tensor
    undetermined: Tensor
    finite: Tensor
    estimates: Estimates | None = None
    angles: Tensor | None = None


@dataclass(frozen=True)
class Averaged:
    """Plain averages of L adapters from N clients.

    Attributes:
        A, B, finite, estimates: as in ``Aligned``.
    """

    A: list[Tensor]
    B: list[Tensor]
    finite: Tensor
    estimates: Estimates | None = None


@dataclass(frozen=True)
class Together:
    """Rotated averages of L adapters whose N clients were aligned together.

    Attributes:
        A: per adapter Ā = Σ wᵢ RᵢᵀAᵢ, (r, d_in), in the inputs' dtype.
        B: per adapter B̄ = Σ wᵢ BᵢRᵢ, (d_out, r), likewise.
        R: per adapter the rotations, (N, r, r), float32 (float64 for float64 inputs).
        residual: (L, N), ‖RᵀR − I‖_max of every rotation; NaN where products of the factors were not finite.
        finite: a bool scalar tensor on the inputs' device: every entry of every average is finite.
        strengths: (L,) float64, λ of every adapter.
        error: (L,) float64, ‖Σ wᵢBᵢAᵢ − B̄Ā‖_F before Ā and B̄ are rounded to the inputs' dtype; None if the compiled library
            aligned, which only estimates errors.
        update_norm: (L,) float64, ‖Σ wᵢBᵢAᵢ‖_F; None likewise.
        plain_error: (L,) float64, the error of the average without rotations; None likewise.
        undetermined: (L, N), as in ``Aligned``; None unless the target is a reference.
        estimates: the errors, if the compiled library aligned and a seed was given to estimate them.
        angles: as in ``Aligned``.
    """

    A: list[Tensor]
    B: list[Tensor]
    R: list[Tensor]
    residual: Tensor
    finite: Tensor
    strengths: Tensor
    error: Tensor | None
    update_norm: Tensor | None
    plain_error: Tensor | None
    undetermined: Tensor | None
    estimates: Estimates | None = None
    angles: Tensor | None = None
