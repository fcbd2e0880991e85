"""Alignment on the client: its mean is what the server computes, and no update changes."""

import itertools

import pytest
import torch

import fedrot

from ..definitions import WEIGHTS, assert_close, every_kind, factors, working
from ..peft_models import factor_keys, turned_clients

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'"),  # PEFT takes the bias of lora_B for a broken factor
]


@pytest.mark.parametrize("reflections", [False, True])
@pytest.mark.parametrize("on", ["A", "B", "joint"])
@every_kind
def test_align_keeps_every_update_and_its_mean_is_aggregate(kind, on, reflections):
    reference, clients = turned_clients(kind, 3, reflect=True)
    options = {"align_on": on, "reflections": reflections, "strength": 0.8}
    aligned = [fedrot.align(client, reference, **options) for client in clients]
    for client, rotated in zip(clients, aligned, strict=True):
        assert [(k, x.shape, x.dtype) for k, x in rotated.items()] == [(k, x.shape, x.dtype) for k, x in client.items()]
        for keys in factor_keys(client):
            (A, B), (A_rotated, B_rotated) = factors(client, keys), factors(rotated, keys)
            assert (A - A_rotated).norm() > 0.1 * A.norm() or len(A) == 1
            # Each factor is rounded once to its dtype, and R differs from an orthogonal matrix by a rounding.
            eps = torch.finfo(kind.dtype).eps + 8 * torch.finfo(working(kind.dtype)).eps
            assert (B_rotated @ A_rotated - B @ A).norm() <= eps * A.norm() * B.norm()
        for key in client.keys() - set(itertools.chain(*factor_keys(client))):
            assert torch.equal(rotated[key], client[key])
    mean = fedrot.aggregate(aligned, WEIGHTS, method="fedit").state_dict
    assert_close(mean, fedrot.aggregate(clients, WEIGHTS, reference, **options).state_dict)
