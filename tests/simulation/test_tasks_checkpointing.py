"""Gradient checkpointing within the pass of all clients: the same numbers, and activations that are computed again."""

import pytest
import torch

from fedrot.simulation import load_task
from fedrot.simulation.clients import Clients

from ..language_models import train_two
from .test_tasks_language import configure  # noqa: F401, a fixture

LORAS = {
    "factors": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "dropout": {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.3},
    "under vmap": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "whole module": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("lora", LORAS)
def test_the_clients_train_as_without_it(configure, lora):  # noqa: F811
    trained = []
    for checkpointing in (False, True):
        options = {"local_steps": 3, "batch_size": 2, "optimizer": "sgd", "lr": 1.0, "max_length": 200}
        config = configure(gradient_checkpointing=checkpointing, **options, lora={"r": 2, **LORAS[lora]})
        clients = Clients(load_task(config), config)
        clients.model.double()
        torch.manual_seed(3)
        passes = count_passes(clients.model)
        trained.append((*train_two(clients), passes))
    (plain, losses, once), (checkpointed, again, twice) = trained
    assert (len(once), len(twice)) == (3, 6), "a block's activations are computed anew in the backward pass"
    torch.testing.assert_close(again, losses, rtol=1e-12, atol=0)
    for mine, other in zip(plain, checkpointed, strict=True):
        moved = 0
        for name, value in mine.items():
            torch.testing.assert_close(other[name], value, rtol=1e-10, atol=1e-12, msg=name)
            moved += int((value - clients.parameters[name]).abs().max() > 1e-5)
        assert moved > len(mine) / 2, "nothing trained: nothing was compared"


def count_passes(model):
    """A list that grows with every forward pass through the first block's feed-forward layer."""
    passes = []
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp"))
    layer.register_forward_pre_hook(lambda *_: passes.append(1))
    return passes
