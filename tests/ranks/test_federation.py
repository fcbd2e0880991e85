"""Clients of unequal ranks aligned to each other, and over rounds: truncated down to the client, padded up to the server."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

import fedrot

from ..dense import UNEQUAL, WEIGHTS, WIDE, best, dense, mean_update, modules, pairs
from ..peft_models import factor_keys
from .isometries import expected

pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter 'default'"),  # PEFT takes the bias of lora_B for a broken factor
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "fedrot-consensus"},
        {"method": "fedrot-least-error"},
        {"method": "fedrot-least-error", "reflections": True},
        {"method": "fedrot-adaptive", "align_on": "joint"},
    ],
)
def test_alignment_of_all_clients_takes_padded_ones(options):
    clients = pairs([*UNEQUAL[:2], WIDE])
    result = fedrot.aggregate(clients, WEIGHTS.tolist(), **options)
    wide = replace(WIDE, config=WIDE.config)
    mean = mean_update([*UNEQUAL[:2], WIDE], [update for update, _ in clients])
    s = {name: s for name, (_, _, s) in modules(wide, result.state_dict).items()}
    plain = fedrot.aggregate(clients, WEIGHTS.tolist(), strength=0).report
    for (name, got), report, before in zip(
        dense(wide, result.state_dict).items(), result.report.adapters, plain.adapters, strict=True
    ):
        error = float((mean[name] - got).norm() / s[name])
        assert report.error == pytest.approx(error, rel=1e-5) and report.error < before.error
        assert report.update_norm == pytest.approx(float(mean[name].norm() / s[name]), rel=1e-6)
        assert all(0 <= angle <= 180 for angle in report.angles)


def test_the_angles_of_padded_clients_are_those_of_their_own_rows():
    """Clients without a weight in the consensus turn towards the only one that has, by both factors."""
    clients = pairs([*UNEQUAL[:2], WIDE])
    options = {"weights": [0, 0, 1], "strength": 1}
    found = fedrot.aggregate(clients, method="fedrot-consensus", **options).report
    expected = fedrot.aggregate(clients, reference=clients[2], align_on="joint", **options).report
    assert found.adapters
    for a, b in zip(found.adapters, expected.adapters, strict=True):
        assert a.angles == pytest.approx(b.angles, abs=1e-4) and min(b.angles[:2]) > 20


def test_a_federation_of_unequal_ranks():
    """Truncated download, PEFT's own training, padded upload, three rounds; every B·A in dense float64 on the way."""

    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10)).double()

    def adapted(r, alpha):
        return get_peft_model(
            base(), LoraConfig(r=r, lora_alpha=alpha, target_modules=["0", "2"]), autocast_adapter_dtype=False
        )

    def products(model):
        layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
        return {n: m.get_delta_weight("default").detach() for n, m in layers.items()}

    globe = adapted(8, 8)
    models = [adapted(2, 8), adapted(4, 2), adapted(8, 16)]
    aggregator = fedrot.FedRotAggregator((get_peft_model_state_dict(globe), globe.peft_config["default"]), strength=1)
    x, y = torch.randn(3, 30, 12).double(), torch.randint(10, (3, 30))
    losses = []
    for _ in range(3):
        config = globe.peft_config["default"]
        for i, model in enumerate(models):
            own = model.peft_config["default"]
            set_peft_model_state_dict(model, fedrot.truncate((get_peft_model_state_dict(globe), config), own))
            for name, product in products(model).items():
                torch.testing.assert_close(product, best(products(globe)[name], own.r), rtol=1e-9, atol=1e-12)
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
            for _ in range(5):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[i]), y[i]).backward()
                optimizer.step()
            aggregator.add((get_peft_model_state_dict(model), own), i + 1)
        before = (get_peft_model_state_dict(globe), config)
        result = aggregator.finish()
        clients = [(get_peft_model_state_dict(m), m.peft_config["default"]) for m in models]
        ratios = {key: [8 / 2, 2 / 4, 16 / 8] for key, _ in factor_keys(before[0])}
        on = "A" if result.report.round % 2 else "B"
        mean, _ = expected(clients, before[0], ratios.__getitem__, on, False, 1.0, [1 / 6, 1 / 3, 1 / 2])
        for key, value in mean.items():
            torch.testing.assert_close(result.state_dict[key], value, rtol=1e-7, atol=1e-9)
        assert result.config["r"] == 8 and result.config["lora_alpha"] == 8
        set_peft_model_state_dict(globe, result.state_dict)
        with torch.no_grad():
            losses.append(sum(float(nn.functional.cross_entropy(globe(x[i]), y[i])) for i in range(3)))
    assert losses[-1] < losses[0]
