"""LoRA on the parameters of experts: an adapter and a rotation per expert, against ΔW as PEFT computes it in float64."""

import pytest
import torch
from peft import LoraConfig, PeftModel

import fedrot

from ..mixtures import EXPERTS, adapted, base_weights, clients, deltas, mixtral, qwen
from ..refusals import refused

SHARES = [1 / 8, 2 / 8, 5 / 8]
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following"),  # PEFT names patterns of parameters as unmatched
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized"),
]
every_model = pytest.mark.parametrize(("base", "config", "count"), EXPERTS.values(), ids=EXPERTS)
FIRST = EXPERTS["Qwen3-MoE, all linear"]


def mean_delta(base, config, updates):
    each = [deltas(adapted(base, config, u)) for u in updates]
    return {name: sum(p * d[name] for p, d in zip(SHARES, each, strict=True)) for name in each[0]}


def relative(found, expected):
    lost = sum(float((found[name] - x).square().sum()) for name, x in expected.items())
    return (lost / sum(float(x.square().sum()) for x in expected.values())) ** 0.5


def split(model, update):
    """The adapters of all experts in plain pairs, as a state dict: what a client with a module per expert would send."""
    pairs = {}
    for name, layer in model.named_modules():
        if "default" not in getattr(layer, "lora_A", {}):
            continue
        A, B, E = update[f"{name}.lora_A.weight"], update[f"{name}.lora_B.weight"], getattr(layer, "num_experts", 1)
        for e in range(E):  # the expert slowest in A and fastest in B, as get_delta_weight has it
            pairs[f"{name}.e{e}.lora_A.weight"] = A[e * len(A) // E : (e + 1) * len(A) // E]
            pairs[f"{name}.e{e}.lora_B.weight"] = B[:, e::E].contiguous()
    return pairs


@every_model
@pytest.mark.parametrize("align_on", ["A", "B", "joint"])
def test_alignment_leaves_every_expert_its_own_update(base, config, count, align_on):
    lora, (reference, update) = clients(base, config, 2)
    aligned = fedrot.align((update, lora), reference, strength=1.0, align_on=align_on)
    assert list(aligned) == list(update) and any(not torch.equal(aligned[key], x) for key, x in update.items())
    assert relative(deltas(adapted(base, config, aligned)), deltas(adapted(base, config, update))) < 1e-14


@every_model
@pytest.mark.parametrize("method", ["fedit", "fedrot", "fedrot-consensus", "fedrot-least-error", "flexlora", "lora-fair"])
def test_methods_take_each_expert_as_an_adapter(base, config, count, method):
    lora, (reference, *updates) = clients(base, config, 4)
    result = fedrot.aggregate(updates, SHARES, reference, method=method, configs=lora)
    assert list(result.state_dict) == list(updates[0]) and len(result.report.adapters) == count
    # The same as for clients that have a module for each expert.
    model = adapted(base, config)
    alone = fedrot.aggregate([split(model, u) for u in updates], SHARES, split(model, reference), method=method)
    for key, x in split(model, result.state_dict).items():
        torch.testing.assert_close(x, alone.state_dict[key], rtol=1e-12, atol=1e-12)
    # The report's error is that of the product of both factors, of every expert; s is left out of it.
    mean = mean_delta(base, config, updates)
    if len({layer.scaling["default"] for layer in model.modules() if hasattr(layer, "lora_A")}) == 1:
        assert result.report.relative_error == pytest.approx(
            relative(deltas(adapted(base, config, result.state_dict)), mean)
        )


@every_model
@pytest.mark.parametrize(("method", "lost"), [("flora", 1e-12), ("fedex-lora", 1e-12), ("fedmomentum", 0.01)])
def test_what_goes_into_the_base_is_the_mean_update(base, config, count, method, lost):
    lora, updates = clients(base, config, 3)
    result = fedrot.aggregate(updates, SHARES, updates[0], method=method, configs=lora)
    model, untouched = adapted(base, config, result.state_dict), base_weights(adapted(base, config))
    kept = deltas(model)
    fedrot.fold(model, result)
    changed = base_weights(model)
    total = {name: (changed[name] - untouched[name]).double() + kept[name] for name in kept}
    assert relative(total, mean_delta(base, config, updates)) < lost
    assert all(torch.equal(x, kept[name]) for name, x in deltas(model).items()) and set(model.peft_config) == {"default"}


@every_model
def test_streams_and_servers_give_what_a_whole_round_gives(base, config, count, tmp_path):
    lora, (reference, *updates) = clients(base, config, 4)
    whole = fedrot.aggregate(updates, SHARES, reference, configs=lora)
    first, second = (fedrot.FedRotAggregator(reference, configs=lora) for _ in range(2))
    first.add(updates[0], SHARES[0])
    for i in (1, 2):
        second.add(updates[i], SHARES[i], f"client {i}")
    second.partial().save(tmp_path / "part.safetensors")
    first.merge(tmp_path / "part.safetensors")
    result = first.finish()
    assert list(result.state_dict) == list(whole.state_dict)
    for key, x in whole.state_dict.items():
        torch.testing.assert_close(result.state_dict[key], x, rtol=1e-12, atol=1e-12)


@every_model
@pytest.mark.parametrize("method", ["flexlora", "fedrot-least-error"])
def test_merged_adapters_load(base, config, count, method, tmp_path):
    lora, updates = clients(base, config, 3)
    pairs = [(u, lora) for u in updates]
    mean = mean_delta(base, config, updates)
    for rank in (None, 40):
        result = fedrot.merge(pairs, SHARES, method=method, rank=rank)
        result.save(tmp_path / f"rank {rank}")
        torch.manual_seed(0)
        model = PeftModel.from_pretrained(base().double(), tmp_path / f"rank {rank}", autocast_adapter_dtype=False)
        error = relative(deltas(model), mean)
        assert result.report.relative_error == pytest.approx(error, abs=1e-7)
        assert method != "flexlora" or (error < 1e-12) == (rank == 40)


def test_ranks_that_differ_are_padded_expert_by_expert():
    base, config, _ = EXPERTS["Mixtral, one parameter"]
    kinds = [config | {"r": r, "lora_alpha": 3 * r} for r in (2, 5, 3)]
    loras, updates = zip(*(clients(base, kind, 1, seed) for seed, kind in enumerate(kinds)), strict=True)
    updates = [u for (u,) in updates]
    result = fedrot.aggregate(updates, SHARES, method="flexlora", configs=list(loras))
    each = [deltas(adapted(base, kind, u)) for kind, u in zip(kinds, updates, strict=True)]
    mean = {name: sum(p * d[name] for p, d in zip(SHARES, each, strict=True)) for name in each[0]}
    best = {}
    for name, x in mean.items():
        U, S, Vh = torch.linalg.svd(x)
        best[name] = (U[..., :5] * S[..., None, :5]) @ Vh[..., :5, :]
    wide = config | {"r": 5, "lora_alpha": 15}
    assert relative(deltas(adapted(base, wide, result.state_dict)), best) < 1e-12


def test_the_order_of_two_parameters_is_found_by_their_ranks():
    lora, (update,) = clients(FIRST[0], FIRST[1], 1)
    assert lora.rank_pattern  # PEFT gives the fused parameter twice the rank
    report = fedrot.aggregate([(update, lora)], method="fedit").report
    ranks = {a.module.removeprefix("base_model.model.model.layers.0.mlp."): a.rank for a in report.adapters}
    assert ranks["experts.gate_up_proj[0]"] == 8 and ranks["experts.down_proj[2]"] == 4 and ranks["gate.weight"] == 4
    assert "experts.gate_up_proj × 3 " in str(report) and str(report).count("experts.") == 2


@pytest.mark.parametrize("method", ["fedit", "fedrot"])
@pytest.mark.parametrize("name", ["Qwen3-MoE, all linear", "JetMoE, no name of experts"])
def test_without_a_configuration_experts_are_refused_with_the_cure(name, method):
    base, config, _ = EXPERTS[name]
    lora, updates = clients(base, config, 2)
    with refused("client 0", "lora_A", "target_parameters", "configs="):
        fedrot.aggregate(updates, method=method)
    with refused("the update", "target_parameters"):
        fedrot.align(updates[0], updates[1])
    fedrot.aggregate(updates, method=method, configs=lora)  # the cure works


def test_configurations_that_do_not_fit_experts_are_refused():
    lora, (update,) = clients(FIRST[0], FIRST[1], 1)
    known = lora.to_dict()
    with refused("client 0", "experts", "(24, 16)", "gate_up_proj"):
        fedrot.aggregate([(update, known | {"rank_pattern": {".*gate_up_proj": 5}})])
    with refused("client 0", "target_parameters"):
        fedrot.aggregate([(update, known | {"target_parameters": [3]})])
    other, (fewer,) = clients(mixtral, {"r": 4, "target_modules": [], "target_parameters": ["experts.down_proj"]}, 1)
    with refused("client 1"):
        fedrot.aggregate([(update, lora), (fewer, other)])


def test_two_adapters_of_unlike_numbers_of_experts_are_refused():
    config = {"r": 2, "target_modules": [], "target_parameters": ["experts.down_proj"]}
    pairs = [(clients(base, config, 1)[1][0], LoraConfig(peft_type="LORA", **config)) for base in (qwen, mixtral)]
    with refused("client 0", "client 1", "(6, 12)"):
        fedrot.merge(pairs)


def test_folding_into_layers_of_a_mixture_that_peft_wraps_by_leaf_names():
    """PEFT makes leaf names of the names of single layers in a mixture, and wraps more than the update has."""

    def two_layers():
        model = mixtral()
        return type(model)(type(model.config)(**model.config.to_dict() | {"num_hidden_layers": 2}))

    config = {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1]}
    lora, updates = clients(two_layers, config, 2)
    result = fedrot.aggregate(updates, method="flora", configs=lora)
    model, untouched = adapted(two_layers, config, result.state_dict), adapted(two_layers, config)
    trained = [p.requires_grad for p in model.parameters()]
    fedrot.fold(model, result)
    each = [deltas(adapted(two_layers, config, u)) for u in updates]
    ((name, weight),) = base_weights(untouched).items()
    torch.testing.assert_close(base_weights(model)[name] - weight, sum(d[name] for d in each) / 2, rtol=1e-9, atol=1e-9)
    assert [p.requires_grad for p in model.parameters()] == trained


def test_experts_beside_an_adapter_with_dropout_load(tmp_path):
    lora, (update,) = clients(mixtral, {"r": 2, "target_modules": [], "target_parameters": ["experts.down_proj"]}, 1)
    dense, (other,) = clients(mixtral, {"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.05}, 1)
    fedrot.merge([(other, dense), (update, lora)]).save(tmp_path / "merged")
    torch.manual_seed(0)
    assert len(deltas(PeftModel.from_pretrained(mixtral().double(), tmp_path / "merged"))) == 2


def test_parameters_of_one_rank_and_unlike_alpha_are_told_by_their_names():
    config = {"r": 2, "target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    base, config = mixtral, config | {"alpha_pattern": {"down_proj": 3}}
    lora, updates = clients(base, config, 3)
    result = fedrot.merge([(u, lora) for u in updates], SHARES, rank=8)
    fields = ("r", "lora_alpha", "target_modules", "target_parameters")
    merged = adapted(base, {field: result.config[field] for field in fields}, result.state_dict)
    assert relative(deltas(merged), mean_delta(base, config, updates)) < 1e-12


def test_one_of_two_parameters_that_the_ranks_do_not_tell_is_refused():
    """Targets without a module's name leave open which of them a single pair of factors is of."""
    config = {"r": 2, "target_modules": [], "target_parameters": ["experts.down_proj"]}
    lora, (update,) = clients(mixtral, config, 1)
    vague = lora.to_dict() | {"target_parameters": ["down_proj", "gate_up_proj"], "alpha_pattern": {"down_proj": 3}}
    with refused("client 0", "more than one order", "experts.lora_A"):
        fedrot.aggregate([(update, vague)])
