"""The order of alignment, clipping and noise, and what is refused, with Flower's strategies in this process."""

import pytest
import torch
from flwr.app import ConfigRecord
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)
from peft import get_peft_model_state_dict

from fedrot.adapters.keys import factor_of
from fedrot.flower import FedRot, align_mod, from_arrays, to_arrays

from ..peft_models import KINDS, factor_keys, turned_clients
from .local_grid import LocalGrid, client_app, fresh_model
from .privacy_apps import CLIENTS, KEYS, KIND, message_app
from .privacy_rounds import (
    ALONE,
    BINDING,
    EQUAL,
    FEDAVG,
    ROUNDS,
    START,
    accountant,
    aligned_of,
    distance,
    each_round,
    furthest,
    mean,
    rounding,
    run,
)


def early():
    """An adapter as PEFT makes it, whose B has hardly moved: what B says of the basis is mostly noise."""
    state = {key: x.clone() for key, x in get_peft_model_state_dict(fresh_model(KIND)).items()}
    return moved(state, 0, 0, [key_B for _, key_B in factor_keys(state)])


def moved(state, client, round, keys=KEYS):
    """A short step, the same at every call."""
    generator = torch.Generator().manual_seed(100 * round + client)
    return {k: x + (k in keys) * 1e-3 * torch.randn(x.shape, generator=generator) for k, x in state.items()}


@pytest.mark.parametrize(
    ("mods", "inner", "bounded"),
    [
        ([align_mod], FedAvg, True),
        ([fixedclipping_mod, align_mod], FedAvg, True),
        ([], FedRot, False),
        ([align_mod, fixedclipping_mod], FedAvg, False),
    ],
    ids=["aligned, clipped by the server", "aligned, clipped", "clipped, aligned by the server", "clipped, aligned"],
)
def test_a_client_contributes_at_most_the_norm_if_it_aligns_before_clipping(mods, inner, bounded):
    """Afterwards, the rotation that brings B closer takes A further away than noise is calibrated for."""
    clip, start = 0.01, early()
    wrapper = DifferentialPrivacyClientSideFixedClipping
    if fixedclipping_mod not in mods:
        wrapper = DifferentialPrivacyServerSideFixedClipping
    grid = LocalGrid({0: message_app(KIND, mods, moved)})
    result = run(wrapper(inner(**ALONE), 0.0, clip, 1), grid, "", [1], start).adapters[1]
    alone = distance(moved(start, 0, 1), start)
    assert clip < alone < 2 * clip
    slack = rounding(start) * sum(x.numel() for x in start.values()) ** 0.5
    if bounded:
        assert distance(result, start) <= clip + slack
    else:
        assert distance(result, start) > 5 * clip


def test_the_accountant_refuses_alignment_on_the_server():
    with pytest.raises(ValueError, match=r"FedAvg\.aggregate_train"):
        DifferentialPrivacyServerSideFixedClipping(FedRot(**FEDAVG), 1.0, BINDING, CLIENTS, accountant=accountant())


@pytest.mark.parametrize(
    ("wrapper", "mods"),
    [
        (DifferentialPrivacyServerSideFixedClipping, [align_mod]),
        (DifferentialPrivacyClientSideFixedClipping, [fixedclipping_mod, align_mod]),
    ],
    ids=["server side", "client side"],
)
def test_bfloat16_is_widened_for_privacy(wrapper, mods):
    """Clients answer in the dtype that they are sent."""
    kind = KINDS["bfloat16"]
    start = turned_clients(kind, 0)[0]
    strategy = wrapper(FedAvg(**FEDAVG), 0.0, BINDING, CLIENTS)
    grid = LocalGrid({client: message_app(kind, mods) for client in range(CLIENTS)})
    for round, sent, result in each_round(run(strategy, grid, "", EQUAL, start)):
        expected = mean(aligned_of(sent, round, BINDING, dtype=torch.bfloat16), dict(enumerate(EQUAL)))
        assert all(x.dtype == torch.float32 for x in result.values())
        assert furthest(result, expected) <= rounding(expected)
    with pytest.raises(TypeError, match="safetensors"):
        strategy.start(grid, to_arrays(start), 1, train_config=ConfigRecord({"weights": EQUAL}))


@pytest.mark.parametrize(
    ("method", "config", "own"),
    [("ffa-lora", {"trained-factors": "B", "personal-factors": "A"}, "A"), ("fedsa-lora", {"personal-factors": "B"}, "B")],
)
def test_methods_that_leave_a_factor_out_run_on_plain_fedavg(method, config, own):
    """The server has no such factor, so that no noise is added to it; clients begin with the one of their model."""
    start = {key: x for key, x in START.items() if factor_of(key) != own}
    whole = get_peft_model_state_dict(fresh_model(KIND)) | start
    found = []
    for strategy, arrays, options in (
        (FedAvg(**ALONE), start, {"train_config": ConfigRecord(config)}),
        (FedRot(method=method, **ALONE), whole, {}),
    ):
        grid = LocalGrid({client: client_app(KIND) for client in range(3)})
        found.append(from_arrays(strategy.start(grid, to_arrays(arrays), ROUNDS, **options).arrays))
    on_client, on_server = found
    assert on_client.keys() == start.keys()
    assert furthest(on_client, {key: on_server[key] for key in start}) <= ROUNDS * rounding(on_server)
