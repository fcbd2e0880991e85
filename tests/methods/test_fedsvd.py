"""FedSVD against the dense SVD of the mean update: its bases, what has no row space, streams and trees of servers."""

import pytest
import torch

import fedrot
from fedrot.methods.fedsvd import to_orthonormal_rows

from ..definitions import assert_same_bits
from ..dense import KIND, WEIGHTS, dense, mean_update, modules, with_frozen
from ..peft_models import KINDS, client_updates, factor_keys
from ..refusals import refused
from ..streams import TREES, grown, inputs
from ..streams import WEIGHTS as SEVEN


def orthonormality(A):
    A = A.double().flatten(1)
    return (A @ A.T - torch.eye(len(A), dtype=A.dtype)).abs().max()


def test_the_factors_are_those_of_the_svd_of_the_mean(updates):
    updates = with_frozen(updates, "A")
    result = fedrot.aggregate(updates, WEIGHTS.tolist(), updates[1], method="fedsvd")
    assert result.report.relative_error < 1e-7
    seen = 0
    for name, M in mean_update([KIND] * 3, updates).items():
        A, B, s = modules(KIND, result.state_dict)[name]
        torch.testing.assert_close(s * B @ A, M, rtol=1e-12, atol=1e-12)
        assert orthonormality(A) < 1e-14
        S = torch.linalg.svdvals(M)[: len(A)] / s
        torch.testing.assert_close(B.T @ B, torch.diag(S.square()), rtol=1e-12, atol=1e-12 * float(S[0]) ** 2)
        seen += 1
    assert seen == 2


@pytest.mark.parametrize("name", ["convolution", "embedding", "DoRA", "LoRA bias", "float16", "bfloat16", "linear"])
def test_the_product_is_the_mean_of_every_kind(name):
    """Of float32 and less: the mean and the factors made of it are each rounded once."""
    kind = KINDS[name]
    updates = with_frozen(client_updates(kind, 3), "A")
    result = fedrot.aggregate(updates, method="fedsvd").state_dict
    wide = {key: sum(u[key].double() for u in updates) / 3 for key in result}
    eps = max(torch.finfo(kind.dtype).eps, 2e-6)
    for key_A, key_B in factor_keys(result):
        got, mean = (x[key_B].double().flatten(1) @ x[key_A].double().flatten(1) for x in (result, wide))
        assert (got - mean).norm() < 2 * eps * wide[key_B].norm() * wide[key_A].norm()
        assert orthonormality(result[key_A]) < 2 * eps and result[key_A].shape == updates[0][key_A].shape
    for key in result.keys() - {key for pair in factor_keys(result) for key in pair}:
        torch.testing.assert_close(result[key].double(), wide[key], rtol=eps, atol=eps * float(wide[key].abs().max()))


@pytest.mark.parametrize(("r", "d_in", "d_out"), [(8, 5, 20), (8, 20, 3), (4, 4, 4), (6, 30, 40)])
def test_ranks_larger_than_the_matrix(r, d_in, d_out):
    generator = torch.Generator().manual_seed(r)
    A, B = (torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in ((r, d_in), (d_out, r)))
    new_A, new_B = to_orthonormal_rows(A, B)
    torch.testing.assert_close(new_B @ new_A, B @ A, rtol=1e-12, atol=1e-12)
    k = min(r, d_in)
    torch.testing.assert_close(new_A[:, :k] @ new_A[:, :k].mT, torch.eye(k, dtype=A.dtype).expand(2, k, k))
    assert not new_A[:, k:].any() and not new_B[:, :, k:].any()
    zero_A, zero_B = to_orthonormal_rows(A, torch.zeros_like(B))
    assert not zero_B.any() and max(orthonormality(x[:k]) for x in zero_A) < 1e-14


def test_a_factor_of_zero_gets_a_row_space_by_the_seed():
    """PEFT begins embeddings with A = 0, from which clients that train B only would never come away."""
    updates = with_frozen(client_updates(KIND, 3), "A")
    (key_A, key_B), (other_A, _) = factor_keys(updates[0])
    updates = [u | {key_A: torch.zeros_like(u[key_A])} for u in updates]
    results = [
        fedrot.aggregate(updates, method="fedsvd", seed=seed, round=index).state_dict
        for seed, index in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert_same_bits(results[0], results[1])
    assert not results[0][key_B].any() and max(orthonormality(result[key_A]) for result in results) < 1e-14
    assert all((results[0][key_A] - result[key_A]).norm() > 0.1 for result in results[2:])
    assert all(torch.equal(result[other_A], results[0][other_A]) for result in results)


def test_a_trained_A_is_refused(updates):
    key_A = factor_keys(updates[0])[0][0]
    with refused("client 1", key_A, "fedsvd"):
        fedrot.aggregate(updates, method="fedsvd")


@pytest.mark.parametrize("size", [1e20, 3e38])
def test_a_product_that_overflows_is_named(size):
    updates = with_frozen(client_updates(KINDS["linear"], 2), "A")
    key_A, key_B = factor_keys(updates[0])[0]
    updates = [u | {key_A: u[key_A] * 1e20, key_B: u[key_B].sign() * size} for u in updates]
    with refused("the average", "overflow", key_A):
        fedrot.aggregate(updates, method="fedsvd")


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_any_tree_of_servers_has_the_product_of_the_batch(tree):
    kind = KINDS["modules to save"]
    reference, clients = inputs("fedsvd", kind)
    at_once = dense(kind, fedrot.aggregate(clients, SEVEN, reference, method="fedsvd", round=1).state_dict)
    merged = dense(kind, grown(tree, reference, clients, method="fedsvd").finish().state_dict)
    assert at_once
    for name, product in at_once.items():
        assert (merged[name] - product).norm() < 1e-5 * product.norm()


def test_rounds_go_on_from_the_new_basis(updates):
    """B of the second round is trained on the first round's Vᵀ."""
    updates = with_frozen(updates, "A")
    aggregator = fedrot.FedRotAggregator(updates[0], method="fedsvd")
    start = aggregator.aggregate(updates).state_dict
    moved = [{key: x + (i + 1) * ("lora_B" in key) for key, x in start.items()} for i in range(3)]
    result = aggregator.aggregate(moved)
    for name, M in mean_update([KIND] * 3, moved, [1 / 3] * 3).items():
        torch.testing.assert_close(dense(KIND, result.state_dict)[name], M, rtol=1e-11, atol=1e-11)
    with refused("client 0", "lora_A", "fedsvd"):
        aggregator.aggregate(moved)
