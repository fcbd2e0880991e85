"""Clipping: no client's change is longer than the bound, and the mean is that of the clipped updates."""

import pytest
import torch

import fedrot

from ..dense import KIND, UNEQUAL, WEIGHTS, WIDE, dense, modules
from ..dense import pairs as unequal_pairs
from ..peft_models import factor_keys
from .rounds import HEAD, attacked, honest, pairs, turned, vectors

METHODS = ["flexlora", "fedex-lora", "flora"]


def update_of(result, kind=KIND):
    """Every adapter's update side by side: what the base and the adapter have together."""
    A_B = [(A, s * B) for A, B, s in modules(kind, result.state_dict).values()]
    total = [B @ A for A, B in A_B]
    if result.base_update is not None:
        folded = [result.base_update[b] @ result.base_update[a] for a, b in factor_keys(result.base_update)]
        total = [x + y for x, y in zip(total, folded, strict=True)]
    return torch.cat([x.flatten() for x in total]).detach()


def flat(kind, update):
    """One client's updates s·B·A side by side."""
    return torch.cat([x.flatten() for x in dense(kind, update).values()])


def clipped(changes, bound):
    return changes * (bound / changes.norm(dim=1, keepdim=True)).clamp(max=1)


@pytest.mark.parametrize("method", METHODS[1:])
def test_without_a_reference_updates_are_shortened(method):
    clients = attacked(7, 2, -5)
    X = vectors(clients, heads=False)
    result = fedrot.aggregate(pairs(clients), clip="median", method=method)
    choice, norms = result.report.choice, X.norm(dim=1)
    assert choice.bound == pytest.approx(float(norms.median())) and choice.changes == pytest.approx(norms.tolist())
    assert choice.clipped.keys() == {f"client {i}" for i in range(7) if norms[i] > norms.median()}
    torch.testing.assert_close(update_of(result), clipped(X, norms.median()).mean(0), rtol=1e-9, atol=1e-9)
    # No start is known for the head.
    torch.testing.assert_close(result.state_dict[HEAD], torch.stack([c[HEAD] for c in clients]).mean(0))


@pytest.mark.parametrize("method", METHODS[1:])
@pytest.mark.parametrize("bound", [5.0, "median"])
def test_towards_a_reference_changes_are_shortened_heads_included(method, bound):
    reference, *clients = honest(8)
    clients[2] = {key: x * 4 for key, x in clients[2].items()}
    start, X = vectors([reference], heads=False), vectors(clients, heads=False)
    result = fedrot.aggregate(pairs(clients), reference=pairs([reference])[0], clip=bound, method=method)
    choice = result.report.choice
    changes = vectors(clients) - vectors([reference])
    share = choice.other_weight
    heads = (changes[:, X.shape[1] :].square().sum(1) * share, changes[:, : X.shape[1]].square().sum(1))
    norms = torch.stack(heads).sum(0).sqrt()
    assert choice.changes == pytest.approx(norms.tolist())
    limit = float(norms.median()) if bound == "median" else bound
    left = (limit / norms).clamp(max=1)
    torch.testing.assert_close(update_of(result), (start + left[:, None] * (X - start)).mean(0), rtol=1e-9, atol=1e-9)
    expected = (reference[HEAD] + left[:, None, None] * (torch.stack([c[HEAD] for c in clients]) - reference[HEAD])).mean(0)
    torch.testing.assert_close(result.state_dict[HEAD], expected)
    assert sum(choice.weights) + choice.kept == pytest.approx(1) and choice.kept > 0
    assert sum(result.report.weights) == pytest.approx(1) and len(result.report.clients) == 7
    assert all(len(a.angles) == 7 for a in result.report.adapters)


def test_what_stays_within_the_bound_stays_as_it_is():
    reference, *clients = honest(6)
    for start in (None, pairs([reference])[0]):
        plain = fedrot.aggregate(pairs(clients), reference=start)
        result = fedrot.aggregate(pairs(clients), reference=start, clip=1e6)
        assert all(torch.equal(result.state_dict[key], x) for key, x in plain.state_dict.items())
        assert result.report.choice.clipped == {} and result.report.choice.kept == 0


@pytest.mark.parametrize("start", [False, True])
def test_no_basis_changes_what_is_clipped(start):
    reference, *clients = honest(7)
    reference = pairs([reference])[0] if start else None
    first, again = (
        fedrot.aggregate(pairs(c), reference=reference, clip="median", method="flexlora") for c in (clients, turned(clients))
    )
    assert again.report.choice.changes == pytest.approx(first.report.choice.changes, rel=1e-9)
    torch.testing.assert_close(update_of(again), update_of(first), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("method", ["flexlora", "fedex-lora", "fedrot", "fedrot-consensus"])
def test_clients_of_unequal_ranks_and_scalings(start, method):
    clients = unequal_pairs(UNEQUAL)
    X = torch.stack([flat(k, c) for k, (c, _) in zip(UNEQUAL, clients, strict=True)])
    reference = unequal_pairs([WIDE if "fedrot" in method else UNEQUAL[2]], 9)[0] if start else None
    result = fedrot.aggregate(clients, WEIGHTS, reference, clip="median", method=method, report_error=True)
    choice = result.report.choice
    if not start:
        assert choice.changes == pytest.approx(X.norm(dim=1).tolist(), rel=1e-9)
    squares = torch.stack([(X - x).square().sum(1) for x in X])
    others = torch.stack([torch.stack([(c[HEAD] - d[HEAD]).square().sum() for d, _ in clients]) for c, _ in clients])
    # The biases of the head are others too; their share is what is left.
    rest = torch.tensor(choice.distances, dtype=torch.float64).square() - squares
    assert (rest >= choice.other_weight * others - 1e-9).all()
    assert choice.clipped and result.report.clients == ("client 0", "client 1", "client 2")


def test_a_reference_of_another_rank_and_scaling_keeps_its_update():
    clients, (reference,) = unequal_pairs(UNEQUAL), unequal_pairs(UNEQUAL[:1], 9)
    X = torch.stack([flat(k, c) for k, (c, _) in zip(UNEQUAL, clients, strict=True)])
    W0 = flat(UNEQUAL[0], reference[0])
    result = fedrot.aggregate(clients, WEIGHTS, reference, clip="median", method="flora")
    choice = result.report.choice
    left = torch.tensor([choice.clipped.get(c, 1.0) for c in choice.clients], dtype=torch.float64)
    shares = WEIGHTS / WEIGHTS.sum()
    assert choice.kept == pytest.approx(float(shares @ (1 - left))) and choice.kept > 0
    lora = (X - W0).square().sum(1)
    assert (torch.tensor(choice.changes).square() > lora - 1e-3).all()
    base = [result.base_update[b] @ result.base_update[a] for a, b in factor_keys(result.base_update)]
    expected = shares @ (W0 + left[:, None] * (X - W0))
    torch.testing.assert_close(torch.cat([x.flatten() for x in base]), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["fedrot", "fedit", "fedrot-least-error", "lora-fair"])
def test_the_average_of_factors_is_that_of_clipped_clients(method):
    """The reported error is the distance to the mean of the clipped updates, which these methods approximate."""
    reference, *clients = honest(6)
    clients[0] = {key: x * 4 for key, x in clients[0].items()}
    result = fedrot.aggregate(
        pairs(clients), reference=pairs([reference])[0], clip="median", method=method, report_error=True
    )
    choice = result.report.choice
    start, X = vectors([reference], heads=False), vectors(clients, heads=False)
    mean = torch.tensor(choice.weights, dtype=torch.float64) @ X + choice.kept * start[0]
    lost = float((update_of(result) - mean).norm())
    assert lost == pytest.approx(2 * result.report.error, rel=1e-6)  # which leaves out s = 2


def test_clipping_comes_after_the_rule():
    clients = attacked(7, 2, -5)
    choice = fedrot.aggregate(pairs(clients), robust="multi-krum", clip="median").report.choice
    assert choice.refused.keys() == {"client 5", "client 6"} and not choice.clipped.keys() & choice.refused.keys()
    norms = sorted(vectors(clients, heads=False).norm(dim=1).tolist())
    assert choice.bound == pytest.approx(norms[3])  # of all that were compared
