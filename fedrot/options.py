"""Every option of an aggregation, once: its name, default, meaning and check.

The API, the Flower strategy, NVIDIA FLARE, the command line, the simulator and the documentation take options from here.
"""

import inspect
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

from fedrot_kernels import Backend

Factor = Literal["A", "B"]
AlignOn = Literal["alternate", "A", "B", "joint"]
OnInvalid = Literal["raise", "drop"]
ReportError = bool | Literal["estimate"]
Robust = Literal["none", "krum", "multi-krum", "geometric-median"]
Clip = float | Literal["median"] | None
Collapse = Literal["none", "raflora"]


Check = Callable[[str, Any], Any]


def _option(meaning: str, check: Check) -> dict[str, Any]:
    """The metadata of an option: its meaning, and the check of a value by the option's name."""
    return {"help": " ".join(meaning.split()), "check": check}


def _one_of(choices: tuple[str, ...]) -> Check:
    def check(name: str, value: Any) -> Any:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        return value

    return check


def _name(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a name, got {value!r}")
    return value


def _flag(name: str, value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def _report_error(name: str, value: Any) -> Any:
    if not isinstance(value, bool) and value != "estimate":
        raise ValueError(f'{name} must be "estimate", True (exact) or False (none), got {value!r}')
    return value


def _strength(name: str, value: Any) -> Any:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if value is not None and (not is_number or not 0 <= value <= 1):
        raise ValueError(f"{name} must be between 0 (no rotation) and 1 (full rotation), got {value!r}")
    return value if value is None else float(value)


def _byzantine(name: str, value: Any) -> int | None:
    return None if value is None else whole_number(name, value)


def _clip(name: str, value: Any) -> Any:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if value is None or (isinstance(value, str) and value == "median"):
        return value
    if not is_number or not 0 < value < math.inf:
        raise ValueError(f'{name} must be a positive bound, "median" or None (no bound), got {value!r}')
    return float(value)


def _energy(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1 (all of the mean update), got {value!r}")
    return float(value)


def _server_rank(name: str, value: Any) -> int | None:
    rank = None if value is None else whole_number(name, value)
    if rank == 0:
        raise ValueError(f"{name} must be a whole number from 1, got {value!r}")
    return rank


def whole_number(name: str, value: Any) -> int:
    """The value as an int; ValueError unless it is a whole number from 0."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:  # no whole number; tensors and arrays of fractions have an __index__ too
        number = -1
    if number < 0:
        raise ValueError(f"{name} must be a whole number from 0, got {value!r}")
    return number


@dataclass(frozen=True, kw_only=True)
class AggregationOptions:
    """The options of an aggregation; each is also a keyword of ``aggregate`` and ``FedRotAggregator``.

    Every field's meaning stands in its metadata under ``help``. ``fedrot aggregate --help`` prints them.

    Raises:
        ValueError: a value that an option does not take.
    """

    method: str = field(default="fedrot", metadata=_option("The aggregation method, a name in fedrot.METHODS.", _name))
    align_on: AlignOn = field(
        default="alternate",
        metadata=_option(
            """The factor that a rotation brings close to the reference: A, B, alternate (B in even rounds and A in odd ones,
            counted from 0, as in the paper), or joint (both, each distance relative to the reference's norm). Towards an
            untrained reference, one of whose factors is zero, nothing rotates.
            fedrot-consensus takes both factors unless this is A or B.""",
            _one_of(get_args(AlignOn)),
        ),
    )
    strength: float | None = field(
        default=None,
        metadata=_option(
            """λ, how far clients are rotated: 0 does not rotate (FedIT to the bit), 1 is the full Procrustes rotation. If
            not set, 0.5 as in the paper, and 1 for fedrot-consensus, which fedrot is in a round without a reference, and for
            fedrot-least-error. Methods that do not rotate, and
            fedrot-adaptive, which chooses λ itself, ignore it.""",
            _strength,
        ),
    )
    reflections: bool = field(
        default=False,
        metadata=_option(
            "Allow reflections too, O(r), where the paper has rotations only, SO(r), of determinant +1.", _flag
        ),
    )
    on_invalid: OnInvalid = field(
        default="raise",
        metadata=_option(
            "What to do with a client whose update holds NaN or Inf: raise an error, or drop the client and report it.",
            _one_of(get_args(OnInvalid)),
        ),
    )
    backend: Backend = field(
        default="auto",
        metadata=_option(
            """What computes whole rounds: torch, triton, or auto, which takes the Triton kernels for tensors on a GPU as far
            as they take their dtype and rank. torch keeps the kernels off.""",
            _one_of(get_args(Backend)),
        ),
    )
    report_error: ReportError = field(
        default="estimate",
        metadata=_option(
            """The aggregation error in the report, and that of the plain average beside it. If it is estimate, sketches
            estimate both, with their standard deviations, for a fraction of the aggregation's cost. True measures them,
            which costs several aggregations; updates that are added one by one are estimated anyway, and methods that need
            their errors have them exact. False leaves them out.""",
            _report_error,
        ),
    )
    seed: int = field(
        default=0,
        metadata=_option(
            """The seed of what is drawn at random: random-rotation's rotations, the factors that FLoRA begins anew with, and
            the sketches that estimate errors.""",
            whole_number,
        ),
    )

    robust: Robust = field(
        default="none",
        metadata=_option(
            """Which clients count, by the distances of their updates s·B·A, which no client's basis changes: krum takes the
            one client nearest to its neighbours, multi-krum leaves out the byzantine clients that are furthest from theirs,
            and geometric-median weighs each client the less, the further it is from the others. Whole rounds only.""",
            _one_of(get_args(Robust)),
        ),
    )
    byzantine: int | None = field(
        default=None,
        metadata=_option(
            """The number f of clients that may be attackers, for krum and multi-krum, which need at least 2f + 3 clients. If
            not set, it is as many as that allows.""",
            _byzantine,
        ),
    )
    clip: Clip = field(
        default=None,
        metadata=_option(
            """The norm that no client's change exceeds: a larger one is shortened to it. A change is that from the reference
            or, without one, the update s·B·A itself. median takes the median norm of the round's clients.""",
            _clip,
        ),
    )
    energy: float | None = field(
        default=None,
        metadata=_option(
            """The part of the squared singular values of the mean update that the result keeps, above 0 and at most 1. In
            flexlora it chooses the rank of every module; if not set, the rank is server_rank. In fedmomentum it is the part
            that adapter and base weights hold together, 0.9999 if not set.""",
            _energy,
        ),
    )
    server_rank: int | None = field(
        default=None,
        metadata=_option(
            """The rank of the result of flexlora and glora. If not set, it is the largest of the clients'. With energy, it
            is at most this one. fedrot.truncate brings the result to the rank of a client.""",
            _server_rank,
        ),
    )
    collapse: Collapse = field(
        default="none",
        metadata=_option(
            """What keeps the ranks that few clients have from shrinking in the mean: raflora averages each row of the
            factors, or each direction after rotation, over the clients that have it. For whole rounds of clients of unequal
            ranks, in flexlora and the fedrot methods.""",
            _one_of(get_args(Collapse)),
        ),
    )

    def __post_init__(self) -> None:
        """Check every option."""
        refuse_old_spellings({f.name: getattr(self, f.name) for f in fields(AggregationOptions)})
        for f in fields(AggregationOptions):
            object.__setattr__(self, f.name, f.metadata["check"](f.name, getattr(self, f.name)))
        if self.byzantine is not None and self.robust not in KRUM:
            raise ValueError(
                f"byzantine={self.byzantine} plays no part in robust={self.robust!r}; it is for {' and '.join(KRUM)}"
            )

    @property
    def compares_clients(self) -> bool:
        """Whether clients' updates are compared before they are averaged."""
        return self.robust != "none" or self.clip is not None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """The options of a caller's keywords.

        Raises:
            TypeError: a keyword that is no option.
            ValueError: a value that an option does not take, or an option of fedrot 0.1, with what to write instead.
        """
        refuse_old_spellings(given)
        if unknown := [name for name in given if name not in OPTION_NAMES]:
            raise TypeError(f"there is no option {unknown[0]!r}; the options are {', '.join(OPTION_NAMES)}")
        return cls(**given)

    @classmethod
    def of_alignment(cls, given: Mapping[str, Any]) -> Self:
        """The options of a caller that aligns a single client, of which there are fewer.

        Raises:
            TypeError: a keyword that is no such option.
            ValueError: as ``of`` does.
        """
        options = cls.of(given)
        if options.compares_clients:
            raise TypeError(
                "robust and clip compare the updates of all clients, which no client has, nor a server whose sums are secure"
            )
        if others := [name for name in given if name not in OF_ALIGNMENT]:
            raise TypeError(f"{others[0]} plays no part on a client; what does is {', '.join(OF_ALIGNMENT)}")
        return options

    def as_dict(self) -> dict[str, Any]:
        """The options as plain Python data."""
        return asdict(self)


Function = TypeVar("Function", bound=Callable[..., Any])


def shows_options(*names: str, **defaults: Any) -> Callable[[Function], Function]:
    """Give a function that takes ``**options`` a signature that lists them, for ``help`` and for frameworks that read it.

    Args:
        *names: the options that the function takes; all if none is given.
        **defaults: defaults that differ from those of ``AggregationOptions``.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        parameters = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        for f in fields(AggregationOptions):
            if not names or f.name in names:
                default = defaults.get(f.name, f.default)
                parameters.append(
                    inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=f.type)
                )
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return function

    return decorate


OPTION_NAMES = tuple(f.name for f in fields(AggregationOptions))
OF_ALIGNMENT = ("align_on", "strength", "reflections")
OF_UNEQUAL_RANKS = ("energy", "server_rank", "collapse")
KRUM = ("krum", "multi-krum")

_OLD_VALUES: dict[tuple[str, Any], str] = {
    ("align_on", "error"): 'method="fedrot-least-error"',
    ("strength", "auto"): 'method="fedrot-adaptive"',
    ("reference", "consensus"): 'method="fedrot-consensus"; reference= is the adapter that the clients started from, if any',
    ("reference", "global"): "nothing: the reference is always what clients start from",
    ("group", "SO"): "nothing: rotations are the default",
    ("group", "O"): "reflections=True",
    ("group", "GL"): 'method="flexlora", which loses least; invertible matrices are gone',
}
_OLD_NAMES = {"group": "reflections=True or False", "previous": 'reference=, with method="fedrot-consensus"'}


def refuse_old_spellings(given: Mapping[str, Any]) -> None:
    """Raise ValueError for an option or a value of fedrot 0.1, naming what replaces it."""
    for name, value in given.items():
        if name == "reference" and isinstance(value, str) and Path(value).is_dir():
            continue  # an adapter whose folder is called global or consensus
        instead = _OLD_VALUES.get((name, value)) if isinstance(value, str) else None
        if name == "reference" and isinstance(value, str) and instead is None:
            _refuse_misspelt_word(value)
        instead = instead or _OLD_NAMES.get(name)
        if instead is not None:
            shown = "…" if isinstance(value, Mapping | tuple) and value else repr(value)  # not an adapter's tensors
            raise ValueError(f"{name}={shown} is a spelling of fedrot 0.1; write {instead}")


def _refuse_misspelt_word(reference: str) -> None:
    """Raise ValueError if a reference is no path that exists, and nearly a word that fedrot 0.1 took in its place."""
    words = [value for name, value in _OLD_VALUES if name == "reference"]
    near = [] if Path(reference).exists() else get_close_matches(reference.lower(), words, n=1, cutoff=0.8)
    if near:
        instead = _OLD_VALUES["reference", near[0]]
        raise ValueError(
            f"reference={reference!r} is neither a folder nor a word; {near[0]} was one in fedrot 0.1, now write {instead}"
        )
