"""Updates added in any order and merged in any tree: the batch's result; and the error that a sketch estimates."""

import gc
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fedrot
from fedrot import METHODS, FedRotAggregator, Partial
from fedrot.alignment import Alignment
from fedrot.methods import get_method
from fedrot.sketch import SIZE, mean_and_deviation

from .dense import UNEQUAL, lora_config, with_frozen
from .peft_models import KINDS, client_updates, factor_keys, save_folder, turned_clients
from .refusals import HEAD, A, B, refused

KIND = KINDS["modules to save"]
# Of the adapters in a row the first and the third are of one shape.
MIXED = replace(KIND, config={"target_modules": ["query", "key", "value"], "rank_pattern": {"key": 2}})
WEIGHTS = [1.0, 2.0, 4.5, 0.3, 7.0, 1e-3, 3.0]
STREAMING = [name for name, method in METHODS.items() if not method.needs_all]
MERGING = [name for name in STREAMING if METHODS[name].keeps_basis]
TREES = {  # whose leaves are clients; a list is a server
    "two servers": [[0, 1, 2], [3, 4, 5, 6]],
    "one client each": [[0], [1], [2], [3], [4], [5], [6]],
    "a server with clients of its own": [0, 1, [2, 3], 4, [5, 6]],
    "three levels, out of order": [[[5, 1], [4]], [[0, 2], [6, [3]]]],
}


def inputs(method, kind=KIND):
    reference, clients = turned_clients(kind, len(WEIGHTS))
    for factor in set("AB") - set(get_method(method, Alignment()).trains(1)):
        clients = with_frozen(clients, factor)
        reference = clients[0]
    return reference, clients


def started(reference, **options):
    return FedRotAggregator(reference, **{"round": 1} | options)


def added(aggregator, clients, numbers, weights=WEIGHTS):
    for i in numbers:
        aggregator.add(clients[i], weights[i], f"client {i}")
    return aggregator


def grown(tree, reference, clients, through=lambda partial: partial, **options):
    """The aggregator at the root, after its clients and its servers'."""
    aggregator = started(reference, **options)
    for node in tree:
        if isinstance(node, int):
            added(aggregator, clients, [node])
        else:
            aggregator.merge(through(grown(node, reference, clients, through, **options).partial()))
    return aggregator


def assert_same(result, other):
    assert list(result.state_dict) == list(other.state_dict)
    for key, x in other.state_dict.items():
        assert torch.equal(result.state_dict[key], x), key
    assert result.report == other.report


def assert_within_rounding(state_dict, reference, clients, additions, method, kind=KIND):
    """Of Σ wᵢ x̃ᵢ / Σ wᵢ in float64, x̃ᵢ being what a client alone contributes, after so many additions in a row."""
    alone = [added(started(reference, method=method), clients, [i]).finish().state_dict for i in range(len(clients))]
    u = torch.finfo(kind.dtype).eps / 2
    for key, x in state_dict.items():
        terms = [w / sum(WEIGHTS) * c[key].double() for w, c in zip(WEIGHTS, alone, strict=True)]
        # Weights are rounded once, each sum once and the quotient once, and the sums of a server when they are rescaled.
        bound = (2 * additions + 3) * u * sum(term.abs() for term in terms)
        assert ((x.double() - sum(terms)).abs() <= bound).all(), key


@pytest.mark.parametrize("kind", [KINDS[name] for name in ("modules to save", "convolution", "float64", "DoRA")])
@pytest.mark.parametrize("method", ["fedrot", "fedit", "scalar"])
def test_any_order_gives_the_same_mean(kind, method):
    reference, clients = inputs(method, kind)
    for order in ([0, 1, 2, 3, 4, 5, 6], [5, 3, 0, 6, 2, 1, 4], [6, 5, 4, 3, 2, 1, 0]):
        result = added(started(reference, method=method), clients, order).finish()
        assert_within_rounding(result.state_dict, reference, clients, len(clients), method, kind)
        again = added(started(reference, method=method), clients, order).finish()
        assert_same(again, result)


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("method", MERGING)
def test_any_tree_of_servers_is_the_batch(method, tree):
    reference, clients = inputs(method)
    result = grown(tree, reference, clients, method=method).finish()
    assert_within_rounding(result.state_dict, reference, clients, len(clients) + 3, method)
    at_once = fedrot.aggregate(clients, WEIGHTS, reference, method=method, round=1)
    assert result.state_dict.keys() == at_once.state_dict.keys() and result.personal == at_once.personal
    for key, x in at_once.state_dict.items():
        torch.testing.assert_close(result.state_dict[key], x, rtol=2e-6, atol=2e-6 * float(x.abs().max()))
    report, whole = result.report, at_once.report
    of_clients = dict(zip(report.clients, report.weights, strict=True))
    assert of_clients == pytest.approx(dict(zip(whole.clients, whole.weights, strict=True)), rel=1e-12)
    for merged, exact in zip(report.adapters, whole.adapters, strict=True):
        angles = dict(zip(report.clients, merged.angles, strict=True))
        assert angles == pytest.approx(dict(zip(whole.clients, exact.angles, strict=True)), abs=1e-2)
    assert_same(grown(tree, reference, clients, method=method).finish(), result)


@pytest.mark.parametrize("scale", [1e-60, 1.0, 1e13, 1e60])
def test_servers_whose_weights_differ_by_magnitudes_merge(scale):
    """Both ways round; each server counts with its share, however its weights compare with the first of the other's."""
    reference, clients = inputs("fedit")
    weights = [w * (scale if i > 2 else 1.0) for i, w in enumerate(WEIGHTS)]
    truth = {
        key: sum(w / sum(weights) * c[key].double() for w, c in zip(weights, clients, strict=True)) for key in reference
    }
    for tree in ([0, 1, 2, [3, 4, 5, 6]], [3, 4, 5, 6, [0, 1, 2]], [[3, 4], [0, 1, 2], [5, 6]]):
        root = started(reference, method="fedit")
        for node in tree:
            if isinstance(node, int):
                added(root, clients, [node], weights)
            else:
                root.merge(added(started(reference, method="fedit"), clients, node, weights).partial())
        result = root.finish()
        assert sum(result.report.weights) == pytest.approx(1)
        for key, x in truth.items():
            bound = 24 * torch.finfo(torch.float32).eps * max(c[key].abs().max() for c in clients)
            assert (result.state_dict[key] - x).abs().max() <= bound, key


@pytest.mark.parametrize("method", ["fedrot", "rolora", "fedsa-lora"])
@pytest.mark.parametrize("kind", [KIND, KINDS["bfloat16"], MIXED], ids=["float32", "bfloat16", "mixed ranks"])
def test_a_file_keeps_every_bit(tmp_path, kind, method):
    reference, clients = inputs(method, kind)
    numbers = itertools.count()

    def through_a_file(partial):
        partial.save(path := tmp_path / f"{next(numbers)}.safetensors")
        return path

    tree = TREES["three levels, out of order"]
    expected = grown(tree, reference, clients, method=method).finish()
    assert_same(grown(tree, reference, clients, through_a_file, method=method).finish(), expected)
    assert len(list(tmp_path.iterdir())) == next(numbers)  # and nothing temporary


def test_a_partial_aggregation_says_whose_it_is_and_may_be_used_again(tmp_path):
    reference, clients = inputs("fedrot")
    partial = added(started(reference), clients, [0, 1]).partial("north")
    assert partial.clients == ("north/client 0", "north/client 1") and partial.weights == (1.0, 2.0) and not partial.dropped
    results = []
    for _ in range(2):
        root = added(started(reference), clients, [2])
        root.merge(partial)
        added(root, clients, [3])
        results.append(root.finish())
    assert_same(*results)
    partial.save(tmp_path / "north")
    with pytest.raises(FileExistsError):
        partial.save(tmp_path / "north")
    assert Partial.load(tmp_path / "north").clients == partial.clients


def test_a_server_goes_on_after_it_handed_its_part_on():
    reference, clients = inputs("fedrot")
    edge, root = started(reference), started(reference)
    for _ in range(2):
        root.merge(added(edge, clients, [0, 1]).partial("north"))
        root.merge(added(edge, clients, [0, 1]).partial("south"))
        result = root.finish()
        edge.reference, edge.round = result.state_dict, root.round
    assert result.report.clients == ("north/client 0", "north/client 1", "south/client 0", "south/client 1")
    assert result.report.round == 2


def test_keys_in_another_order_are_the_same_keys():
    reference, clients = inputs("fedrot", MIXED)
    expected = grown([[0, 1], [2, 3]], reference, clients).finish()
    backwards = [dict(reversed(c.items())) for c in clients]
    root = started(reference)
    root.merge(added(started(reference), clients, [0, 1]).partial())
    root.merge(added(started(dict(reversed(reference.items()))), backwards, [2, 3]).partial())
    result = root.finish()
    for key, x in expected.state_dict.items():
        torch.testing.assert_close(result.state_dict[key], x, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(result.report.adapters, expected.report.adapters, strict=True):
        assert (mine.module, mine.angles) == (theirs.module, pytest.approx(theirs.angles, abs=1e-3))
        assert (mine.error, mine.update_norm) == pytest.approx((theirs.error, theirs.update_norm), rel=1e-5)


def test_dropped_clients_of_every_server_are_reported():
    reference, clients = inputs("fedrot")
    broken = clients[0] | {A: clients[0][A] * math.nan}
    root = started(reference, on_invalid="drop")
    for name in ("north", "south"):
        edge = started(reference, on_invalid="drop")
        edge.add(broken)
        if name == "south":
            edge.add(clients[1], 2)
        root.merge(edge.partial(name))
    root.add(broken, name="mine")
    result = root.finish()
    assert result.report.clients == ("south/client 1",)
    assert list(result.report.dropped) == ["north/client 0", "south/client 0", "mine"]
    assert all(A in why for why in result.report.dropped.values())


def test_servers_of_clients_of_unequal_ranks_merge(tmp_path):
    """Each pads its clients to the reference's ranks and scaling; what they add up to does not tell which were padded."""
    wide = replace(UNEQUAL[0], config=UNEQUAL[0].config | {"r": 8, "lora_alpha": 4})
    reference = client_updates(wide, 1)[0], lora_config(wide)
    clients = [(client_updates(kind, 1, seed=i)[0], lora_config(kind)) for i, kind in enumerate((*UNEQUAL, wide))]
    at_once = fedrot.aggregate(clients, WEIGHTS[:4], reference, round=1)
    for tree in ([[0, 1], [2, 3]], [3, [0], [2, 1]]):
        root = started(reference)
        for i, node in enumerate(tree):
            if isinstance(node, int):
                added(root, clients, [node])
            else:
                added(started(reference), clients, node).partial().save(path := tmp_path / f"{len(tree)}.{i}")
                root.merge(path)
        result = root.finish()
        assert result.config == at_once.config
        for key, x in at_once.state_dict.items():
            torch.testing.assert_close(result.state_dict[key], x, rtol=1e-9, atol=1e-9)
    other = reference[0], lora_config(replace(wide, config=wide.config | {"lora_alpha": 8}))
    with refused("the partial aggregation", "lora_alpha", 4, 8):
        started(other).merge(added(started(reference), clients, [0]).partial())


def exact(clients, shares, reference, **options):
    """module → ‖Σ wᵢBᵢAᵢ − B̄Ā‖_F and ‖Σ wᵢBᵢAᵢ‖_F of the rotated clients, formed densely in float64."""
    rotated = [fedrot.align(c, reference, **options) for c in clients]
    found = {}
    for a, b in factor_keys(reference):
        A_, B_ = (torch.stack([c[k].double().flatten(1) for c in rotated]) for k in (a, b))
        mean = sum(p * y @ x for p, x, y in zip(shares, A_, B_, strict=True))
        A_mean, B_mean = (sum(p * x for p, x in zip(shares, F, strict=True)) for F in (A_, B_))
        found[a.split(".lora_")[0]] = float((mean - B_mean @ A_mean).norm()), float(mean.norm())
    return found


SEEDS = range(40)


@pytest.mark.parametrize(
    ("strength", "tree"), [(0.0, TREES["three levels, out of order"]), (0.5, [0, 1, 2, 3, 4, 5, 6])], ids=["tree", "stream"]
)
def test_the_estimated_error_lies_where_its_deviation_says(strength, tree):
    kind = KINDS["convolution"]
    reference, clients = inputs("fedrot", kind)
    truth = exact(clients, [w / sum(WEIGHTS) for w in WEIGHTS], reference, round=1, strength=strength)
    reports = [grown(tree, reference, clients, strength=strength, seed=seed).finish().report for seed in SEEDS]
    for i, (module, true) in enumerate(truth.items()):
        of_seeds = [report.adapters[i] for report in reports]
        assert {a.module for a in of_seeds} == {module}
        for which, name in enumerate(("error", "update_norm")):
            values, deviations = (
                torch.tensor([f(a) for a in of_seeds], dtype=torch.float64)
                for f in (lambda a, n=name: getattr(a, n), lambda a, w=which: a.deviations[w])
            )
            misses = (values - true[which]).abs() / deviations
            assert misses.max() <= 8 and (misses > 3).double().mean() <= 0.1, (module, name)
            assert 0.7 <= float(deviations.square().mean().sqrt() / values.std()) <= 1.5, (module, name)
            squares = values.square()  # without bias, which their roots are not
            assert (squares.mean() - true[which] ** 2).abs() <= 4 * squares.std() / len(squares) ** 0.5, (module, name)
    whole = math.hypot(*(error for error, _ in truth.values()))
    misses = [(report.error - whole) / report.deviation for report in reports]
    assert max(map(abs, misses)) <= 5 and 0.6 <= (sum(z * z for z in misses) / len(misses)) ** 0.5 <= 1.5


def test_the_variance_is_what_the_docstring_says():
    """Relative variance of the squares 2(1 + (2k + 1) ρ)/k², of two clients (E of low rank) and of seven."""
    reference, clients = turned_clients(KIND, 7, noise=1.0)
    (a, b), *_ = factor_keys(reference)
    for n in (2, 7):
        S = torch.linalg.svdvals(dense_error(clients[:n], a, b))
        rho = float(S.pow(4).sum() / S.pow(2).sum() ** 2)
        squares = []
        for seed in range(300):
            stream = added(started(reference, method="fedit", seed=seed), clients, range(n), [1.0] * n)
            sketch = stream.partial().stream.sketch
            squares.append(float(sketch.parts()[a]["lost"].square().mean() / S.pow(2).sum()))
        expected = 2 * (1 + (2 * SIZE + 1) * rho) / SIZE**2
        assert torch.tensor(squares).var().item() == pytest.approx(expected, rel=0.35), rho


def test_the_deviation_of_independent_squares_is_theirs():
    """Relative to their mean: of independent entries √2/k, of products of a row's and a column's square 2√(k + 1)/k."""
    generator = torch.Generator().manual_seed(0)
    independent, of_rank_one = [], []
    for _ in range(400):
        independent.append(mean_and_deviation(torch.randn(SIZE, SIZE, generator=generator).square().double()))
        x, y = torch.randn(2, SIZE, generator=generator).square().double()
        of_rank_one.append(mean_and_deviation(torch.outer(x, y)))
    for found, variance in ((independent, 2 / SIZE**2), (of_rank_one, 2 * (2 * SIZE + 2) / SIZE**2)):
        variances = torch.tensor([deviation**2 for _, deviation in found])
        assert (variances.mean() - variance).abs() <= 4 * variances.std() / len(found) ** 0.5
        assert variances.mean().item() == pytest.approx(variance, rel=0.2)


def test_projections_of_both_sides_are_independent():
    """Of an E that is symmetric and positive, as of B = Aᵀ, (ψᵀEψ)² is far larger than ‖E‖² in the mean."""
    reference, clients = turned_clients(KIND, 7, noise=1.0)
    (a, b), *_ = factor_keys(reference)
    clients = [c | {b: c[a].T.contiguous()} for c in clients]
    truth = float(dense_error(clients, a, b).square().sum())
    squares = []
    for seed in range(100):
        sketch = added(started(reference, method="fedit", seed=seed), clients, range(7), [1.0] * 7).partial().stream.sketch
        squares.append(float(sketch.parts()[a]["lost"].square().mean()) / truth)
    squares = torch.tensor(squares)
    assert (squares.mean() - 1).abs() <= 4 * squares.std() / 10


def dense_error(clients, a, b):
    A_, B_ = (torch.stack([c[k].double() for c in clients]) for k in (a, b))
    return (B_ @ A_).mean(0) - B_.mean(0) @ A_.mean(0)


@pytest.mark.parametrize("drift", [1e-2, 1e-5])
def test_an_error_far_below_the_updates_rounding_keeps_its_digits(drift):
    """In float32 it is drift² of the update, down to 1e-10: less than the rounding of Σ wᵢBᵢAᵢ and B̄Ā."""
    reference, _ = turned_clients(KIND, 1)
    steps = client_updates(KIND, 5, seed=3)
    clients = [{key: x + drift * step[key] for key, x in reference.items()} for step in steps]
    result = added(started(reference, method="fedit"), clients, range(5)).finish()
    truth = exact(clients, [w / sum(WEIGHTS[:5]) for w in WEIGHTS[:5]], reference, strength=0)
    for a, (error, norm) in zip(result.report.adapters, truth.values(), strict=True):
        assert error / norm < 20 * drift**2
        assert a.deviations[0] < 0.1 * error
        assert abs(a.error - error) <= 4 * a.deviations[0]
        assert a.update_norm == pytest.approx(norm, rel=1e-4)


def test_clients_that_agree_have_no_error_at_all():
    reference, clients = inputs("ffa-lora")
    for method, updates in (("fedit", [clients[0]] * 4), ("fedrot", [clients[0]] * 4), ("ffa-lora", clients)):
        report = added(started(reference, method=method), updates, range(4)).finish().report
        assert report.error == report.deviation == 0
        assert all(a.update_norm > 0 for a in report.adapters)


def test_a_report_says_that_its_error_is_an_estimate():
    reference, clients = inputs("fedrot")
    report = added(started(reference), clients, range(7)).finish().report
    assert report.deviation > 0 and f"{report.error:.3e} ± {report.deviation:.1e}" in str(report)
    assert json.loads(json.dumps(report.as_dict()))["deviation"] == report.deviation
    at_once = fedrot.aggregate(clients, WEIGHTS, reference, round=1).report
    assert at_once.deviation is None and "±" not in str(at_once) and at_once.adapters[0].deviations is None
    silent = added(started(reference, report_error=False), clients, range(7)).finish().report
    assert silent.error is silent.deviation is None and "±" not in str(silent)
    for one, other in ((False, True), (True, False)):  # unless all measure it, nobody knows
        root = added(started(reference, report_error=one), clients, [0])
        root.merge(added(started(reference, report_error=other), clients, [1]).partial())
        assert added(root, clients, [2]).finish().report.error is None


UNLIKE = {
    "round": ({"round": 3}, ["round", 3, 1]),
    "method": ({"method": "fedit"}, ["method", "fedit", "fedrot"]),
    "strength": ({"strength": 0.75}, ["strength", 0.75, 0.5]),
    "align_on": ({"align_on": "A"}, ["align_on", "alternate"]),
    "group": ({"group": "O"}, ["group", "SO"]),
    "seed": ({"seed": 3}, ["seed", 3]),
}


@pytest.mark.parametrize("saved", [False, True], ids=["in memory", "from a file"])
@pytest.mark.parametrize(("options", "named"), UNLIKE.values(), ids=UNLIKE)
def test_servers_of_other_options_do_not_merge(tmp_path, options, named, saved):
    reference, clients = inputs("fedrot")
    partial = added(started(reference, **options), clients, [0]).partial("north")
    if saved:
        partial.save(tmp_path / "north")
        partial = Partial.load(tmp_path / "north")
    root = added(started(reference), clients, [1])
    with refused("north", *named):
        root.merge(partial)
    with refused("north", *named):
        started(reference).merge(partial)
    assert_same(root.finish(), added(started(reference), clients, [1]).finish())


def test_servers_that_aligned_to_another_reference_do_not_merge():
    reference, clients = inputs("fedrot")
    other = reference | {A: reference[A].nextafter(torch.tensor(math.inf))}
    with refused("north", "another reference"):
        started(other).merge(added(started(reference), clients, [0]).partial("north"))
    plain = started(other, method="fedit")  # where it plays no part
    plain.merge(added(started(reference, method="fedit"), clients, [0]).partial("north"))
    plain.finish()


def test_servers_of_other_adapters_do_not_merge(tmp_path):
    _, clients = inputs("fedit")
    spoils = {
        "keys": (lambda u: {k: x for k, x in u.items() if k != HEAD}, ["lacks", HEAD]),
        "shapes": (lambda u: u | {A: u[A][:, :8].contiguous()}, [A, "(4, 8)", "(4, 16)"]),
        "dtypes": (lambda u: {k: x.half() for k, x in u.items()}, ["float16", "float32"]),
    }
    for spoil, named in spoils.values():
        root = added(FedRotAggregator(method="fedit"), clients, [1])
        with refused("north", *named):
            root.merge(added(FedRotAggregator(method="fedit"), [spoil(clients[0])], [0]).partial("north"))
        assert root.finish().report.clients == ("client 1",)
    halved = replace(KIND, config=KIND.config | {"lora_alpha": 4})
    folders = [save_folder(kind, clients[0], tmp_path / str(i)) for i, kind in enumerate((KIND, halved))]
    root = added(FedRotAggregator(method="fedit"), folders, [0])
    with refused("north", "lora_alpha", 4, 8):
        root.merge(added(FedRotAggregator(method="fedit"), folders, [1]).partial("north"))
    root.merge(added(FedRotAggregator(method="fedit"), clients, [1]).partial())  # of which no scaling is known
    assert root.finish().config["lora_alpha"] == 8


def test_no_client_counts_twice():
    reference, clients = inputs("fedrot")
    partial = added(started(reference), clients, [0, 1]).partial()
    root = started(reference)
    root.merge(partial)
    for again in (partial, added(started(reference), clients, [1]).partial()):
        with refused("client", "already", "name"):
            root.merge(again)
    with refused("client 1", "name"):
        root.add(clients[1], name="client 1")
    for bad in ("", 3):
        with refused("name", error=ValueError):
            root.add(clients[1], name=bad)
        with refused("name", error=ValueError):
            root.partial(bad)
    assert root.finish().report.clients == ("client 0", "client 1")


@pytest.mark.parametrize(("method", "key"), [("ffa-lora", A), ("rolora", B)])
def test_what_no_client_trains_is_the_same_on_all_servers(method, key):
    reference, clients = inputs(method)
    moved = [client | {key: client[key] + 1} for client in clients]
    partial = added(FedRotAggregator(method=method, round=1), moved, [0]).partial("north")
    for root in (started(reference, method=method), added(FedRotAggregator(method=method, round=1), clients, [1])):
        with refused("north", key, method):
            root.merge(partial)
    root = FedRotAggregator(method=method, round=1)  # of which nothing but the partial aggregation tells
    root.merge(partial)
    with refused("client 1", key, method):
        added(root, clients, [1])
    assert torch.equal(added(root, moved, [2]).finish().state_dict[key], moved[0][key])


def test_what_cannot_be_streamed_or_merged_says_so():
    reference, clients = inputs("fedrot")
    partial = added(started(reference), clients, [0]).partial()
    for options in ({"align_on": "error"}, {"strength": "auto"}, {"method": "flexlora"}):
        aggregator = started(reference, **options)
        for call in (lambda a=aggregator: a.add(clients[0]), lambda a=aggregator: a.merge(partial)):
            with refused("at once", "aggregate", error=ValueError):
                call()
    with refused("at once", error=ValueError):
        FedRotAggregator("consensus", previous=reference).add(clients[0])
    with refused("random-rotation", "one aggregator", error=ValueError):
        added(started(reference, method="random-rotation"), clients, [0]).partial()
    with refused("no updates", "partial()"):
        started(reference).partial()
    with refused("reference"):
        FedRotAggregator(round=1).merge(partial)


def damaged_header(change):
    def spoil(tensors, header):
        change(header)
        return tensors, header

    return spoil


def damaged_tensor(key, change):
    return lambda tensors, header: (tensors | {key: change(tensors[key])}, header)


SUM, LOST = f"sum/{A}", f"sketch/lost/{A}"
DAMAGED = {
    "another dtype": (damaged_tensor(SUM, torch.Tensor.half), [SUM, "F16", "F32", "(4, 16)"]),
    "another shape": (damaged_tensor(SUM, lambda x: x[:2].clone()), [SUM, "(2, 16)", "(4, 16)"]),
    "another shape of the sketch": (damaged_tensor(LOST, lambda x: x[:4].clone()), [LOST, "(4, 32)", "(32, 32)"]),
    "NaN in a sum": (damaged_tensor(SUM, lambda x: x * math.nan), [SUM, "(4, 16)", "NaN"]),
    "Inf in the sketch": (damaged_tensor(LOST, lambda x: x / 0), [LOST, "NaN or Inf"]),
    "NaN among weights": (damaged_tensor("weights", lambda x: x * math.nan), ["weights", "NaN"]),
    "a negative weight": (damaged_tensor("weights", lambda x: torch.tensor([-1.0, 4.0]).double()), ["weights"]),
    "other weights": (damaged_tensor("weights", lambda x: 3 * x), ["weights", "total"]),
    "a missing sum": (lambda t, h: ({k: x for k, x in t.items() if k != SUM}, h), [SUM, "missing"]),
    "something else": (lambda t, h: (t | {"code": torch.ones(3)}, h), ["code"]),
    "a huge shape": (damaged_header(lambda h: h["tensors"][0].__setitem__(2, [1 << 40, 1 << 20])), ["(", str(1 << 40)]),
    "no shape": (damaged_header(lambda h: h["tensors"][0].__setitem__(2, "16")), ["header"]),
    "a negative shape": (damaged_header(lambda h: h["tensors"][0].__setitem__(2, [-4, 16])), ["header", "-4"]),
    "a dtype of none": (damaged_header(lambda h: h["tensors"][0].__setitem__(3, "I8")), ["header", "I8"]),
    "a key twice": (damaged_header(lambda h: h["tensors"].append(h["tensors"][0])), ["header", A]),
    "a client twice": (damaged_header(lambda h: h.update(clients=["client 0"] * 2)), ["clients"]),
    "a client too many": (damaged_header(lambda h: h["clients"].append("me")), ["weights", "(2,)", "(3,)"]),
    "clients that are no names": (damaged_header(lambda h: h.update(clients=[0, 1])), ["clients"]),
    "frozen keys of others": (damaged_header(lambda h: h.update(frozen=["x"])), ["frozen", "x"]),
    "no number": (damaged_header(lambda h: h.update(unit=math.inf)), ["unit in its header"]),
    "no field": (damaged_header(lambda h: h.pop("total_weight")), ["total_weight"]),
    "another version": (damaged_header(lambda h: h.update(version=2)), ["version"]),
    "no adapters": (damaged_header(lambda h: h.update(tensors=h["tensors"][-2:])), ["lora_A/lora_B"]),
    "no LoRA": (damaged_header(lambda h: h.update(config={"peft_type": "IA3"})), ["IA3"]),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    reference, clients = inputs("fedrot")
    path = tmp_path_factory.mktemp("saved") / "partial"
    added(started(reference), clients, [0, 1]).partial().save(path)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return path, tensors, json.loads(file.metadata()["fedrot-partial"])


@pytest.mark.parametrize(("spoil", "named"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named_and_refused(tmp_path, saved, spoil, named):
    _, tensors, header = saved
    tensors, header = spoil(tensors, json.loads(json.dumps(header)))
    save_file(tensors, path := tmp_path / "sent.safetensors", metadata={"fedrot-partial": json.dumps(header)})
    with refused(path, *named):
        Partial.load(path)


def test_what_is_no_such_file_is_refused(tmp_path, saved):
    whole = saved[0].read_bytes()
    broken = tmp_path / "broken"
    huge = json.dumps({"sum": {"dtype": "F32", "shape": [1 << 30, 1 << 20], "data_offsets": [0, 1 << 52]}}).encode()
    for content in (whole[:-1], whole[:100], b"", b"\x80\x04.", len(huge).to_bytes(8, "little") + huge):
        broken.write_bytes(content)
        with refused(broken, "safetensors"):
            Partial.load(broken)
    with refused("nowhere"):
        Partial.load(tmp_path / "nowhere")
    adapter = save_folder(KIND, client_updates(KIND, 1)[0], tmp_path / "adapter") / "adapter_model.safetensors"
    with refused(adapter, "no partial aggregation"):
        Partial.load(adapter)
    for text in ("[]", "{", "[" * 100000):
        save_file({"x": torch.ones(1)}, path := tmp_path / "other", metadata={"fedrot-partial": text})
        with refused(path):
            Partial.load(path)


def tensor_bytes():
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def test_tensors_take_the_memory_of_one_update_however_many_there_are():
    reference, clients = inputs("fedrot")
    nothing = tensor_bytes()

    def sent(i):
        return {key: x.clone() for key, x in clients[i % 7].items()}

    stream = started(reference)
    for i in range(3):
        stream.add(sent(i))
    expected = tensor_bytes() - nothing
    sums = sum(x.nbytes for x in clients[0].values())
    sketch = sum(8 * (SIZE * SIZE + 2 * SIZE * len(clients[0][a])) for a, _ in factor_keys(reference))
    assert expected == sums + sketch + 4 * SIZE * 2 * reference[A].shape[1]  # as wide as it is high
    for i in range(200):
        stream.add(sent(i), 1.0, f"another {i}")
    edges = [added(started(reference), clients, range(3)).partial(f"edge {i}") for i in range(2)]
    for edge in edges:
        stream.merge(edge)
    del edges, edge
    assert tensor_bytes() - nothing == expected
    round = stream._under_way
    assert len(round.angles) * round.angles.itemsize == 8 * (203 + 6) * len(factor_keys(reference))
    stream.finish()
