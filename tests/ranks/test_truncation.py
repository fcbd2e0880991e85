"""What a client of smaller rank downloads: the best approximation, with nothing in it that cannot be trained."""

from dataclasses import replace

import pytest
import torch

import fedrot

from ..dense import (
    KIND,
    UNEQUAL,
    WIDE,
    best,
    dense,
    lora_config,
    matrices,
    modules,
    pairs,
    scaling_of,
)
from ..peft_models import KINDS, client_updates, factor_keys
from ..refusals import refused

pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter 'default'"),  # PEFT takes the bias of lora_B for a broken factor
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]


def in_rank(kind, **own):
    return replace(kind, config={**kind.config, "rank_pattern": {}, "alpha_pattern": {}, **own})


@pytest.mark.parametrize(
    "own",
    [
        {"r": 3, "lora_alpha": 5},
        {"r": 1, "use_rslora": True},
        {"r": 2, "rank_pattern": {"value": 6}, "alpha_pattern": {"query": 3}},
    ],
)
def test_a_truncated_adapter_is_the_best_of_its_rank(own):
    (update, config), small = pairs([WIDE])[0], in_rank(KIND, **own)
    truncated = fedrot.truncate((update, config), lora_config(small))
    before = dense(WIDE, update)
    for name, (A, B, s) in modules(small, truncated).items():  # PEFT takes it as an adapter of that configuration
        torch.testing.assert_close(s * B @ A, best(before[name], len(A)), rtol=1e-10, atol=1e-10)
        W = A @ torch.linalg.pinv(update[f"{name}.lora_A.weight"])
        eye = torch.eye(*W.shape, dtype=W.dtype)
        torch.testing.assert_close(W @ W.T, eye[:, : len(W)], rtol=0, atol=1e-10)
        # No other basis of these rows is closer to the first coordinates: W Jᵀ is symmetric and positive.
        H = W @ eye.T
        assert (H - H.T).norm() < 1e-10 and torch.linalg.eigvalsh(H).min() > -1e-10
    for key in truncated.keys() - {key for keys in factor_keys(truncated) for key in keys}:
        assert torch.equal(truncated[key], update[key])


@pytest.mark.parametrize("name", [name for name in KINDS if name != "rank and alpha pattern"])
def test_every_kind_is_truncated_in_its_shapes(name):
    kind, small = (in_rank(KINDS[name], r=r, lora_alpha=alpha) for r, alpha in ((4, 8), (2, 3)))
    update = client_updates(kind, 1)[0]
    truncated = fedrot.truncate((update, lora_config(kind)), lora_config(small))
    loaded = client_updates(small, 1)[0]
    assert [(k, x.shape, x.dtype) for k, x in truncated.items()] == [(k, x.shape, x.dtype) for k, x in loaded.items()]
    (ratio,) = (1 / s for s in scaling_of([small], kind)(factor_keys(update)[0][0]))
    for keys in factor_keys(update):
        (A, B), (A_k, B_k) = matrices(update, keys), matrices(truncated, keys)
        # Both factors are rounded once, and computed in float64, in which LAPACKs differ.
        eps = 2 * torch.finfo(kind.dtype).eps + 8 * torch.finfo(torch.float64).eps
        assert (B_k @ A_k - ratio * best(B @ A, 2)).norm() <= eps * ratio * B.norm() * A.norm()
        if (bias := f"{keys[1].removesuffix('.weight')}.bias") in update:
            torch.testing.assert_close(truncated[bias], ratio * update[bias])


def test_where_nothing_is_to_approximate_everything_can_be_trained():
    update = client_updates(WIDE, 1)[0]
    keys = factor_keys(update)
    fresh = {key: torch.zeros_like(x) if "lora_B" in key else x for key, x in update.items()}
    truncated = fedrot.truncate(fresh, 3)
    for key_A, key_B in keys:
        assert torch.equal(truncated[key_A], update[key_A][:3]) and truncated[key_B].eq(0).all()
    embedding = {key: torch.zeros_like(x) if "lora_A" in key else x for key, x in update.items()}  # PEFT draws B of those
    truncated = fedrot.truncate(embedding, 3)
    assert all(torch.equal(truncated[key_B], update[key_B][:, :3]) for _, key_B in keys)
    of_two = {key: x.clone() for key, x in update.items()}
    for _, key_B in keys:  # only the second and the fifth direction were ever trained
        of_two[key_B][:, [0, 2, 3, 5, 6]] = 0
    truncated = fedrot.truncate(of_two, 4)
    for key_A, key_B in keys:
        A, B = truncated[key_A], truncated[key_B]
        torch.testing.assert_close(B @ A, of_two[key_B] @ of_two[key_A], rtol=1e-10, atol=1e-10)
        W = A @ torch.linalg.pinv(update[key_A])
        kept = W.T @ W
        expected = torch.zeros(7, 7, dtype=W.dtype)
        expected[[1, 4, 0, 2], [1, 4, 0, 2]] = 1  # what was trained, and of what was not the first coordinates
        assert torch.linalg.matrix_rank(B) == 2 and (A.norm(dim=1) > 0.5).all()
        torch.testing.assert_close(kept[[1, 4]], expected[[1, 4]], rtol=0, atol=1e-10)
        assert kept.diagonal()[[0, 2, 3]].sum() == pytest.approx(2, abs=1e-9)


def test_directions_that_only_one_factor_has_are_none():
    update = client_updates(WIDE, 1)[0]
    for key_A, _ in factor_keys(update):
        update[key_A][[0, 2, 3, 5, 6]] = 0
    truncated = fedrot.truncate(update, 4)
    for key_A, key_B in factor_keys(update):
        product = update[key_B] @ update[key_A]
        torch.testing.assert_close(truncated[key_B] @ truncated[key_A], product, rtol=1e-10, atol=1e-10)
        assert torch.linalg.matrix_rank(truncated[key_B]) == 2


def test_what_stays_comes_back_to_the_bit_and_what_cannot_be_is_refused():
    (update, config), (small, small_config) = pairs([WIDE, UNEQUAL[0]])
    key = factor_keys(update)[0][0]
    for to in (config, {"peft_type": "LORA", "r": 7, "lora_alpha": 6.0}, 7, 100):
        same = fedrot.truncate((update, config), to)
        assert list(same) == list(update) and all(torch.equal(x, update[key]) for key, x in same.items())
        assert not {x.data_ptr() for x in same.values()} & {x.data_ptr() for x in update.values()}
    with refused(key, "rank 7", "(2, 16)"):
        fedrot.truncate((small, small_config), config)
    with refused("no LoRA configuration"):
        fedrot.truncate(update, small_config)
    with refused("a rank", "0"):
        fedrot.truncate(update, 0)
    with refused("rank or a LoRA configuration", "str"):
        fedrot.truncate(update, "2")
    with refused("r is '2'"):
        fedrot.truncate((update, config), {"peft_type": "LORA", "r": "2"})
    with refused("peft_type 'IA3'"):
        fedrot.truncate((update, config), {"peft_type": "IA3"})
    with refused(key, "NaN"):
        fedrot.truncate({**update, key: update[key] * torch.nan}, 2)
