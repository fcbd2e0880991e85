"""Every option once: its check, its meaning, its default in every signature, and what became of older spellings."""

import inspect
import math
from dataclasses import FrozenInstanceError, fields

import pytest

import fedrot
from fedrot import METHODS, AggregationOptions, FedRotAggregator
from fedrot.options import OF_ALIGNMENT, OPTION_NAMES

from .peft_models import save_clients
from .refusals import LINEAR, refused

NOT_A_FLAG = [0, 1, "yes", None]
WRONG = {
    "method": ["fedRot", "", None, ["fedrot"]],
    "align_on": ["a", "both", "AB", None, ["A"]],
    "strength": [-0.1, 1.1, math.nan, math.inf, "a", [0.5], True],
    "reflections": NOT_A_FLAG,
    "on_invalid": ["ignore", None],
    "backend": ["cuda", None],
    "report_error": [0, 1, "exact", None],
    "seed": [-1, 1.5, "a", None, True],
    "robust": ["Krum", "median", None, True],
    "byzantine": [-1, 1.5, "a", True],
    "clip": [0, -1.0, math.nan, math.inf, "mean", True],
    "energy": [0, -0.5, 1.1, math.nan, "a", True],
    "server_rank": [0, -1, 1.5, "a", True],
    "collapse": ["raFLoRA", None, True],
}
# What the message must name besides the option and the value.
CHOICES = {
    "align_on": "alternate, A, B, joint",
    "strength": "between 0 (no rotation) and 1",
    "reflections": "True or False",
    "on_invalid": "raise, drop",
    "backend": "auto, native, torch, triton",
    "report_error": '"estimate", True (exact) or False (none)',
    "seed": "whole number from 0",
    "robust": "none, krum, multi-krum, geometric-median",
    "byzantine": "whole number from 0",
    "clip": 'a positive bound, "median" or None',
    "energy": "above 0 and at most 1",
    "server_rank": "whole number from",
    "collapse": "none, raflora",
}
RIGHT = {
    "method": ["fedit", "fedrot-consensus"],
    "align_on": ["alternate", "A", "B", "joint"],
    "strength": [None, 0, 0.25, 1],
    "reflections": [False, True],
    "on_invalid": ["raise", "drop"],
    "backend": ["auto", "torch"],
    "report_error": [False, True, "estimate"],
    "seed": [0, 1 << 70],
    "robust": ["none", "geometric-median"],
    "byzantine": [None],
    "clip": [None, "median", 0.5, 2],
    "energy": [None],
    "server_rank": [None],
    "collapse": ["none"],
}
DEFAULTS = {
    "method": "fedrot",
    "align_on": "alternate",
    "strength": None,
    "reflections": False,
    "on_invalid": "raise",
    "backend": "auto",
    "report_error": "estimate",
    "seed": 0,
    "robust": "none",
    "byzantine": None,
    "clip": None,
    "energy": None,
    "server_rank": None,
    "collapse": "none",
}


def cases(table):
    return [(name, value) for name, values in table.items() for value in values]


def test_the_tables_here_are_of_every_option():
    assert list(WRONG) == list(RIGHT) == list(DEFAULTS) == list(OPTION_NAMES) == [f.name for f in fields(AggregationOptions)]


@pytest.mark.parametrize(("name", "value"), cases(WRONG))
def test_a_value_that_an_option_does_not_take_is_named(clients, name, value):
    wanted = [name, CHOICES.get(name, ""), repr(value)]
    for call in (fedrot.aggregate, FedRotAggregator):
        with refused(*wanted, error=ValueError):
            call(clients[0] if call is FedRotAggregator else clients, **{name: value})
    if name in OF_ALIGNMENT:
        with refused(*wanted, error=ValueError):
            fedrot.align(clients[0], clients[1], **{name: value})
    if name != "method" or not isinstance(value, str):  # which methods there are is the registry's to know
        with refused(*wanted, error=ValueError):
            AggregationOptions(**{name: value})


@pytest.mark.parametrize("method", ["fedRot", ""])
def test_an_unknown_method_is_told_the_known_ones(clients, method):
    with refused(repr(method), *METHODS, error=ValueError):
        fedrot.aggregate(clients, method=method)


@pytest.mark.parametrize(("name", "value"), cases(RIGHT))
def test_a_value_that_an_option_takes_is_kept_and_reported(clients, name, value):
    options = AggregationOptions(**{name: value})
    assert options.as_dict() == DEFAULTS | {name: value}
    assert fedrot.aggregate(clients[:2], **{name: value}).options == options == FedRotAggregator(**{name: value}).options


def test_options_are_frozen_keywords():
    with pytest.raises(TypeError, match="positional"):
        AggregationOptions("fedit")
    with pytest.raises(FrozenInstanceError):
        AggregationOptions().method = "fedit"
    assert (
        AggregationOptions(strength=1) == AggregationOptions(strength=1.0) and AggregationOptions(strength=1).strength == 1.0
    )


@pytest.mark.parametrize("value", [-1, 1.0, "1", None, True])
def test_a_round_is_a_whole_number_from_0(clients, value):
    for call in (
        lambda: fedrot.aggregate(clients, round=value),
        lambda: FedRotAggregator(clients[0], round=value),
        lambda: fedrot.align(clients[0], clients[1], round=value),
    ):
        with refused("round must be a whole number from 0", repr(value), error=ValueError):
            call()


CALLS = {
    "aggregate": lambda clients, **options: fedrot.aggregate(clients, **options),
    "FedRotAggregator": lambda clients, **options: FedRotAggregator(**{"reference": clients[0]} | options),
    "align": lambda clients, **options: fedrot.align(*clients[:2], **options),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_unknown_keyword_is_told_the_options(clients, call):
    with refused("alignon", *OPTION_NAMES, error=TypeError):
        call(clients, alignon="A")


@pytest.mark.parametrize("name", [name for name in OPTION_NAMES if name not in OF_ALIGNMENT])
def test_options_that_play_no_part_on_a_client_are_refused_there(clients, name):
    with refused(name, "no part on a client", *OF_ALIGNMENT, error=TypeError):
        fedrot.align(clients[0], clients[1], **{name: DEFAULTS[name]})


OLD = [
    ("align_on", "error", 'method="fedrot-least-error"'),
    ("strength", "auto", 'method="fedrot-adaptive"'),
    ("group", "SO", "rotations are the default"),
    ("group", "O", "reflections=True"),
    ("group", "GL", "flexlora"),
    ("group", "U", "reflections=True or False"),
    ("previous", {}, "fedrot-consensus"),
]


@pytest.mark.parametrize(("name", "value", "new"), OLD)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_old_spelling_is_told_the_new_one(clients, call, name, value, new):
    with refused(name, repr(value), "fedrot 0.1", new, error=ValueError):
        call(clients, **{name: value})


@pytest.mark.parametrize(
    ("value", "new"), [("consensus", 'method="fedrot-consensus"'), ("global", "what clients start from")]
)
def test_an_old_reference_is_told_the_new_method(clients, value, new):
    for call in (
        lambda: fedrot.aggregate(clients, reference=value),
        lambda: fedrot.aggregate(clients, None, value),
        lambda: FedRotAggregator(value),
    ):
        with refused("reference", repr(value), "fedrot 0.1", new, error=ValueError):
            call()


@pytest.mark.parametrize("value", ["concensus", "Consensus", "consenus", "globl"])
def test_a_misspelt_word_for_a_reference_is_told_the_method_too(clients, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    near, new = ("global", "what clients start from") if value == "globl" else ("consensus", 'method="fedrot-consensus"')
    for call in (lambda: fedrot.aggregate(clients, reference=value), lambda: FedRotAggregator(value)):
        with refused(f"reference={value!r} is neither a folder nor a word", near, new, error=ValueError):
            call()
    with refused("there is no folder adapter7", "save_pretrained"):
        fedrot.aggregate(clients, reference="adapter7")
    save_clients(LINEAR, tmp_path, 1)[0].rename(value)
    assert fedrot.aggregate(clients, reference=value).state_dict


def test_merge_tells_the_new_method(folders):
    with refused('method="fedrot"', "fedrot 0.1", "fedrot-least-error", error=ValueError):
        fedrot.merge(folders, method="fedrot")


@pytest.mark.parametrize("group", ["SO", "O", "GL"])
def test_merge_tells_the_new_spelling_of_group(folders, group):
    with refused("group", "fedrot 0.1", error=ValueError):
        fedrot.merge(folders, group=group)


@pytest.mark.parametrize("call", [fedrot.aggregate, FedRotAggregator, FedRotAggregator.__init__])
def test_signatures_list_every_option_with_its_default(call):
    parameters = inspect.signature(call).parameters
    assert {name: parameters[name].default for name in OPTION_NAMES} == DEFAULTS
    assert {parameters[name].kind for name in OPTION_NAMES} == {inspect.Parameter.KEYWORD_ONLY}
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def test_the_signature_of_align_lists_the_options_of_a_client():
    parameters = inspect.signature(fedrot.align).parameters
    assert list(parameters) == ["update", "reference", "round", *OF_ALIGNMENT]
    assert {name: parameters[name].default for name in OF_ALIGNMENT} == {name: DEFAULTS[name] for name in OF_ALIGNMENT}


@pytest.mark.parametrize("field", fields(AggregationOptions), ids=lambda f: f.name)
def test_every_option_has_a_meaning(field):
    text = field.metadata["help"]
    assert text.endswith(".") and len(text.split()) >= 5 and "  " not in text and "\n" not in text


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_uses_are_options(method):
    assert set(OPTION_NAMES) >= METHODS[method].uses
