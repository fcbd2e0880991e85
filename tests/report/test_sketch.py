"""The error of updates that are not kept, as a sketch estimates it, against the dense one."""

import json
import math

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import fedrot
from fedrot_kernels.sketch import SKETCH_SIZE as SIZE
from fedrot_kernels.sketch import sum_and_deviation

from ..peft_models import KINDS, Kind, client_updates, factor_keys, turned_clients
from ..streams import KIND, TREES, WEIGHTS, added, grown, inputs, started


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
SERVED = {
    "tree": (0.0, TREES["three levels, out of order"]),
    "stream": (0.5, [0, 1, 2, 3, 4, 5, 6]),
}


def wide_bert():
    sizes = {"hidden_size": 320, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=16, num_labels=3, **sizes))


@pytest.mark.parametrize(("strength", "tree"), SERVED.values(), ids=SERVED)
def test_the_estimated_error_lies_where_its_deviation_says(strength, tree):
    reference, clients = inputs("fedrot", Kind(wide_bert, {"target_modules": ["query"]}))
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


def test_estimates_of_narrow_adapters_are_exact():
    """Of at most 32 dimensions on either side each has a bucket of its own. The deviations do not know that."""
    reference, clients = inputs("fedrot", KINDS["linear"])
    truth = exact(clients, [w / sum(WEIGHTS) for w in WEIGHTS], reference, round=1, strength=0.5)
    report = grown([0, 1, 2, 3, 4, 5, 6], reference, clients, strength=0.5).finish().report
    for a, (error, norm) in zip(report.adapters, truth.values(), strict=True):
        assert (a.error, a.update_norm) == pytest.approx((error, norm), rel=1e-5)


def test_the_deviation_of_independent_squares_is_theirs():
    """Relative to their mean: of independent entries √2/k, of products of a row's and a column's square 2√(k + 1)/k."""
    generator = torch.Generator().manual_seed(0)
    independent, of_rank_one = [], []
    for _ in range(400):
        independent.append(sum_and_deviation(torch.randn(SIZE, SIZE, generator=generator).square().double() / SIZE**2))
        x, y = torch.randn(2, SIZE, generator=generator).square().double()
        of_rank_one.append(sum_and_deviation(torch.outer(x, y) / SIZE**2))
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
        squares.append(float(sketch.parts()[a]["lost"].square().sum()) / truth)
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
        assert a.deviations[0] < 0.25 * error
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
    assert at_once.error == pytest.approx(report.error, rel=1e-5) and at_once.deviation == pytest.approx(
        report.deviation, rel=1e-4
    )
    at_once = fedrot.aggregate(clients, WEIGHTS, reference, round=1, report_error=True).report
    assert at_once.deviation is None and "±" not in str(at_once) and at_once.adapters[0].deviations is None
    silent = added(started(reference, report_error=False), clients, range(7)).finish().report
    assert silent.error is silent.deviation is None and "±" not in str(silent)
    for one, other in ((False, True), (True, False)):  # unless all measure it, nobody knows
        root = added(started(reference, report_error=one), clients, [0])
        root.merge(added(started(reference, report_error=other), clients, [1]).partial())
        assert added(root, clients, [2]).finish().report.error is None
