"""Input that cannot be aggregated: refused, with a message that says which client, which tensor and why."""

import math

import pytest
import torch

import fedrot

from ..definitions import assert_same_bits
from ..refusals import HEAD, A, B, refused


def with_value(x, value):
    x = x.clone()
    x.view(-1)[-1] = value
    return x


def freed(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


# What is done to an update, and what the error must name besides the client.
UNLIKE_THE_FIRST = {
    "key missing": (lambda u: u.pop(HEAD), [HEAD, "client 0"]),
    "factor missing": (lambda u: u.pop(B), [B, "client 0"]),
    "adapter missing": (lambda u: (u.pop(A), u.pop(B)), [A, "client 0", "1 more"]),
    "key too many": (lambda u: u.update(extra=torch.zeros(2)), ["extra", "client 0"]),
    "shape": (lambda u: u.update({HEAD: torch.zeros(5, 16)}), [HEAD, "(5, 16)", "(3, 16)", "client 0"]),
    "rank": (lambda u: u.update({A: torch.ones(2, 16), B: torch.ones(16, 2)}), [A, "(2, 16)", "(4, 16)", "client 0"]),
    "dtype of a factor": (lambda u: u.update({A: u[A].half(), B: u[B].half()}), [A, "float16", "float32", "client 0"]),
    "dtype of a head": (lambda u: u.update({HEAD: u[HEAD].double()}), [HEAD, "float64", "float32", "client 0"]),
}
NO_PAIR = {
    "A alone": (lambda u: u.pop(B), [A, B, "(4, 16)"]),
    "B alone": (lambda u: u.pop(A), [A, B, "(16, 4)"]),
    "ranks that differ": (lambda u: u.update({B: torch.ones(16, 5)}), [A, B, "(4, 16)", "(16, 5)"]),
    "dtypes that differ": (lambda u: u.update({B: u[B].double()}), [A, B, "float32", "float64"]),
    "empty factor": (lambda u: u.update({A: torch.ones(0)}), [A, "(0,)"]),
    "flat factor": (lambda u: u.update({B: torch.ones(64)}), [B, "(64,)"]),
    "B with a kernel": (lambda u: u.update({B: torch.ones(16, 4, 3, 3)}), [A, B, "(16, 4, 3, 3)"]),
    "no adapter": (lambda u: [u.pop(key) for key in list(u) if "lora_" in key], ["lora_A"]),
}
NOT_NUMBERS = {
    "integers": (lambda u: u.update({A: u[A].long()}), [A, "int64", "(4, 16)"]),
    "complex numbers": (lambda u: u.update({A: u[A].to(torch.complex64)}), [A, "complex64", "(4, 16)"]),
    "8 bits": (lambda u: u.update({B: u[B].to(torch.float8_e4m3fn)}), [B, "float8_e4m3fn", "(16, 4)"]),
    "an array": (lambda u: u.update({A: u[A].numpy()}), [A, "ndarray"]),
    "freed": (lambda u: u.update({B: freed(u[B])}), [B, "(16, 4)", "its memory was freed"]),
    "None": (lambda u: u.update({HEAD: None}), [HEAD, "NoneType"]),
}
NOT_FINITE = {
    f"{value} in {key}": (
        lambda u, key=key, value=value: u.update({key: with_value(u[key], value)}),
        [key, shape, "NaN or Inf"],
    )
    for key, shape in ((A, "(4, 16)"), (B, "(16, 4)"), (HEAD, "(3, 16)"))
    for value in (math.nan, math.inf, -math.inf)
}
UNFIT, BROKEN = UNLIKE_THE_FIRST | NOT_NUMBERS | NOT_FINITE, NO_PAIR | NOT_NUMBERS | NOT_FINITE


@pytest.mark.parametrize("method", ["fedrot", "fedit"])
@pytest.mark.parametrize(("spoil", "named"), UNFIT.values(), ids=UNFIT)
def test_an_update_that_does_not_fit_is_refused(clients, spoil, named, method):
    spoil(clients[1])
    with refused("client 1", *named):
        fedrot.aggregate(clients, reference=clients[0], method=method)


@pytest.mark.parametrize(("spoil", "named"), UNFIT.values(), ids=UNFIT)
def test_an_update_that_does_not_fit_leaves_the_stream_usable(clients, spoil, named):
    stream, reference = fedrot.FedRotAggregator(clients[0]), clients[0]
    stream.add(clients[0], 2)
    good = dict(clients[1])
    spoil(clients[1])
    with refused("client 1", *named):
        stream.add(clients[1])
    stream.add(good)
    expected = fedrot.FedRotAggregator(reference)
    expected.add(clients[0], 2)
    expected.add(good)
    result, whole = stream.finish(), expected.finish()
    assert result.report == whole.report
    assert_same_bits(result.state_dict, whole.state_dict)


@pytest.mark.parametrize(("spoil", "named"), BROKEN.values(), ids=BROKEN)
def test_a_broken_update_is_refused_alone_and_by_align(clients, spoil, named):
    good = dict(clients[0])
    spoil(clients[0])
    with refused("client 0", *named):
        fedrot.aggregate(clients[:1])
    with refused("the update", *named):
        fedrot.align(clients[0], good)
    stream = fedrot.FedRotAggregator(good)
    with refused("client 0", *named):
        stream.add(clients[0])
    stream.add(good)
    assert stream.finish().report.clients == ("client 0",)


SPOILED_REFERENCE = {
    "shape": (lambda u: u.update({A: torch.ones(4, 8)}), [A, "(4, 8)", "(4, 16)"]),
    "rank": (lambda u: u.update({A: torch.ones(2, 16), B: torch.ones(16, 2)}), [A, "(2, 16)", "(4, 16)"]),
    "adapter missing": (lambda u: (u.pop(A), u.pop(B)), [A]),
    "factor missing": (lambda u: u.pop(B), [B]),
    "adapter too many": (lambda u: u.update({"new.lora_A.weight": u[A], "new.lora_B.weight": u[B]}), ["new.lora_A"]),
    **{name: case for name, case in NOT_FINITE.items() if HEAD not in name},
    **NOT_NUMBERS,
}


@pytest.mark.parametrize(("spoil", "named"), SPOILED_REFERENCE.values(), ids=SPOILED_REFERENCE)
def test_a_reference_that_does_not_fit_is_refused(clients, spoil, named):
    reference = dict(clients[2])
    spoil(reference)
    for call in (
        lambda: fedrot.aggregate(clients, reference=reference),
        lambda: fedrot.align(clients[0], reference),
        lambda: fedrot.FedRotAggregator(reference).add(clients[0]),
    ):
        with refused("the reference", *named):
            call()


def test_the_plain_tensors_of_a_reference_do_not_matter(clients):
    reference = {key: x for key, x in clients[0].items() if "lora_" in key} | {HEAD: torch.full((7,), math.nan)}
    expected = fedrot.aggregate(clients, reference=clients[0]).state_dict
    result = fedrot.aggregate(clients, reference=reference).state_dict
    assert_same_bits(result, expected)


WEIGHTS = {
    "negative": ([1, -1, 1], ["client 1", "-1"]),
    "NaN": ([1, 1, math.nan], ["client 2", "nan"]),
    "infinite": ([math.inf, 1, 1], ["client 0", "inf"]),
    "all zero": ([0, 0, 0], ["zero"]),
    "too few": ([1, 1], ["2 weights", "3 updates"]),
    "too many": ([1] * 4, ["4 weights", "3 updates"]),
    "none": ([], ["0 weights", "3 updates"]),
}


@pytest.mark.parametrize(("weights", "named"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_make_no_mean_are_refused(clients, weights, named):
    with refused(*named):
        fedrot.aggregate(clients, weights)


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf])
def test_a_bad_weight_leaves_the_stream_usable(clients, weight):
    stream = fedrot.FedRotAggregator(clients[0])
    with refused("client 0", weight):
        stream.add(clients[1], weight)
    stream.add(clients[1])
    assert stream.finish().report.clients == ("client 0",)


@pytest.mark.parametrize("updates", [[], (), iter(())])
def test_no_updates_are_refused(updates):
    with refused("no updates"):
        fedrot.aggregate(updates)


def test_one_update_that_is_not_in_a_list_is_refused(clients, folders):
    for single in (clients[0], str(folders[0]), folders[0]):
        with refused("sequence", "list"):
            fedrot.aggregate(single)
    for not_an_update in ([1], [list(clients[0].items())], [None]):
        with refused("client 0", "state dict", type(not_an_update[0]).__name__):
            fedrot.aggregate(not_an_update)


def test_dropping_everyone_is_an_error_that_says_why(clients):
    bad = [client | {A: with_value(client[A], math.nan)} for client in clients]
    with refused("client 0", "client 1", "client 2", A, "(4, 16)"):
        fedrot.aggregate(bad, on_invalid="drop")
    with refused("client 0", "client 1", A):  # what is left has no weight
        fedrot.aggregate([*bad[:2], clients[2]], [1, 1, 0], on_invalid="drop")
    stream = fedrot.FedRotAggregator(clients[0], on_invalid="drop")
    stream.add(bad[0])
    with refused("client 0", A):
        stream.finish()
    stream.add(clients[1])  # the round begins anew
    assert stream.finish().report.clients == ("client 0",)


def test_a_stream_that_lacks_something_says_what(clients):
    with refused("no updates", "add"):
        fedrot.FedRotAggregator(clients[0]).finish()
    with refused("reference"):
        fedrot.FedRotAggregator(method="fedrot").add(clients[0])
    stream = fedrot.FedRotAggregator(clients[0])
    stream.add(clients[0], 0)
    with refused("positive weight"):
        stream.finish()
    stream.add(clients[1])
    with refused("finish", error=RuntimeError):
        stream.aggregate(clients)
    stream.finish()
    with refused("no updates"):
        stream.finish()


def test_what_is_not_an_update_is_named(clients):
    with refused("client 0", "expected tensors by name"):
        fedrot.aggregate([{0: torch.zeros(2, 2)}])
    for strange in (clients[0][A].to("meta"), clients[0][A].to_sparse()):
        with refused("client 1", A, "(4, 16)", "dense"):
            fedrot.aggregate([clients[0], clients[1] | {A: strange}])
    with refused("sequence"):
        fedrot.aggregate(None)
    for weights in (3, [None, 1, 1], ["a", 1, 1]):
        with refused("weight"):
            fedrot.aggregate(clients, weights)


def test_updates_of_tensor_subclasses_are_checked_like_any_other(clients):
    class Labelled(torch.Tensor):
        pass

    labelled = [{key: x.as_subclass(Labelled) for key, x in client.items()} for client in clients]
    key = next(iter(labelled[1]))
    labelled[1][key] = labelled[1][key][:2]
    with pytest.raises(fedrot.UpdateError, match=r"client 1"):
        fedrot.aggregate(labelled)


@pytest.mark.parametrize("names", [["a", "b"], ["a", "b", "b"], ["a", "b", 3], ["a", "b", "c\nd"], ["a", "b", ""]])
def test_names_that_are_no_lines_of_text_one_each_are_refused(clients, names):
    with refused("names", *(str(n).split("\n")[0] for n in names)):
        fedrot.FedRotAggregator(clients[0]).aggregate(clients, names=names)
