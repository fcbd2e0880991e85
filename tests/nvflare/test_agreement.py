"""What sites say of their LoRA configurations, experts and counters, in the aggregator for NVIDIA FLARE."""

import json

import pytest
import torch
from nvflare.app_common.abstract.fl_model import ParamsType

import fedrot
from fedrot.nvflare import FedRotModelAggregator, config_meta

from ..adapters.test_carried import COUNTER, normed_client
from ..mixtures import EXPERTS, clients
from ..peft_models import KINDS, peft_model
from ..refusals import refused
from .rounds import SITES, STEPS, answer, as_arrays, equal, run_round, send

LORA = peft_model(KINDS["modules to save"]).peft_config["default"]
OTHER = LORA.to_dict() | {"trainable_token_indices": [2, 7]}
pytestmark = pytest.mark.filterwarnings("ignore:The following")


def answers(aggregator, start, updates, configs):
    """A round whose sites say what their configurations are; None says nothing."""
    send(aggregator, start)
    for name, update, steps, config in zip(SITES, updates, STEPS, configs, strict=True):
        model = answer(name, update, steps)
        model.meta |= {} if config is None else config_meta(config)
        aggregator.accept_model(model)
    return aggregator.aggregate_model()


def test_a_site_of_another_configuration_is_left_out(start, updates):
    aggregator = FedRotModelAggregator()
    out = answers(aggregator, start, updates, (LORA, OTHER, LORA))
    assert equal(out.params, fedrot.aggregate([updates[0], updates[2]], [STEPS[0], STEPS[2]], start).state_dict)
    why = aggregator.result.report.dropped[SITES[1]]
    assert all(part in why for part in (SITES[1], "trainable_token_indices = [2, 7]", "null", SITES[0])), why
    assert out.metrics["dropped"] == 1
    assert len(answers(aggregator, start, updates, (None, OTHER, None)).params) == len(start)
    with refused(SITES[1], "trainable_token_indices"):
        answers(FedRotModelAggregator(on_invalid="raise"), start, updates, (LORA, OTHER, LORA))


def test_the_servers_configuration_counts_where_there_is_one(start, updates):
    aggregator = FedRotModelAggregator(configs=LORA)
    with refused(SITES[0], "trainable_token_indices", "the server"):
        answers(aggregator, start, updates, (OTHER, OTHER, LORA))
    assert json.dumps(aggregator.configs)  # a job's configuration is JSON
    with refused("peft_type"):
        FedRotModelAggregator(configs={"r": 4})


@pytest.mark.parametrize("params_type", [ParamsType.FULL, ParamsType.DIFF])
@pytest.mark.parametrize("convert", [dict, as_arrays])
def test_experts(params_type, convert):
    base, config, count = EXPERTS["Qwen3-MoE, all linear"]
    lora, (start, *updates) = clients(base, config, 4)
    sent = updates if params_type == ParamsType.FULL else [{k: u[k] - x for k, x in start.items()} for u in updates]
    aggregator = FedRotModelAggregator(configs=lora)
    out = run_round(aggregator, convert(start), [convert(u) for u in sent], params_type=params_type)
    expected = fedrot.aggregate(updates, STEPS, start, configs=lora)
    assert len(aggregator.result.report.adapters) == count and list(out.params) == list(start)
    for key, x in expected.state_dict.items():
        torch.testing.assert_close(torch.as_tensor(out.params[key]), x, rtol=1e-10, atol=1e-10)
    with refused("target_parameters", "configs="):
        run_round(FedRotModelAggregator(), start, updates)


@pytest.mark.parametrize("params_type", [ParamsType.FULL, ParamsType.DIFF])
@pytest.mark.parametrize("convert", [dict, as_arrays])
def test_counters(params_type, convert):
    start, *updates = (normed_client(steps, steps)[1] for steps in (2, 3, 7, 5))
    sent = updates if params_type == ParamsType.FULL else [{k: u[k] - x for k, x in start.items()} for u in updates]
    out = run_round(FedRotModelAggregator(), convert(start), [convert(u) for u in sent], params_type=params_type)
    counter = torch.as_tensor(out.params[COUNTER])
    assert counter == 7 and counter.dtype == torch.int64 and list(out.params) == list(start)
