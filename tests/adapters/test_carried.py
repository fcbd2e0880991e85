"""Tensors that are no LoRA factors and not plain weights: counters, empty tensors, α in tensors, VeLoRA's projections."""

import pytest
import torch
from peft import LoraConfig, VeloraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

import fedrot

from ..peft_models import KINDS, bert, client_updates, factor_keys
from ..refusals import CONFIG_FILE, HEAD, WEIGHTS_FILE, refused

COUNTER, MEAN = "base_model.model.head.0.num_batches_tracked", "base_model.model.head.0.running_mean"


class Normed(nn.Module):
    """A body to adapt, and a head with a BatchNorm that is saved whole."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 3))

    def forward(self, x):
        return self.head(self.body(x))


def normed_client(steps, seed=0):
    """What a client sends after some steps of training."""
    torch.manual_seed(0)
    model = get_peft_model(Normed(), LoraConfig(r=4, target_modules=["body"], modules_to_save=["head"]))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(steps):
        model(torch.randn(6, 8, generator=generator)).square().mean().backward()
        optimizer.step()
    return model, {key: x.clone() for key, x in get_peft_model_state_dict(model).items()}


@pytest.mark.parametrize("method", [name for name in fedrot.METHODS if name not in ("ffa-lora", "fedsvd", "rolora")])
def test_counters_are_carried_and_running_statistics_averaged(method):
    updates = [normed_client(steps, steps)[1] for steps in (3, 7, 5)]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    result = fedrot.aggregate(updates, [1, 2, 5], updates[0], method=method, configs=config)
    assert result.state_dict[COUNTER].item() == 7 and result.state_dict[COUNTER].dtype == torch.int64
    mean = (updates[0][MEAN] + 2 * updates[1][MEAN] + 5 * updates[2][MEAN]) / 8
    torch.testing.assert_close(result.state_dict[MEAN], mean)
    if not result.personal:
        model, _ = normed_client(0)
        set_peft_model_state_dict(model, result.state_dict)
        assert get_peft_model_state_dict(model)[COUNTER] == 7
    assert all(u[COUNTER].item() == steps for u, steps in zip(updates, (3, 7, 5), strict=True))  # inputs stay


def test_counters_of_clients_that_do_not_count_do_not_count():
    updates = [normed_client(steps, steps)[1] for steps in (3, 7, 5)]
    broken = updates[1] | {MEAN: updates[1][MEAN] * torch.nan}
    assert fedrot.aggregate(updates, [1, 0, 1]).state_dict[COUNTER] == 5
    assert fedrot.aggregate([updates[0], broken], on_invalid="drop").state_dict[COUNTER] == 3


def test_counters_of_streams_servers_and_optimizers(tmp_path):
    reference, *updates = (normed_client(steps, steps)[1] for steps in (2, 3, 7, 5))
    first, second = (fedrot.FedRotAggregator(reference) for _ in range(2))
    first.add(updates[0])
    second.add(updates[1], name="b")
    second.add(updates[2], 0, name="c")
    second.partial().save(tmp_path / "part.safetensors")
    first.merge(tmp_path / "part.safetensors")
    whole = fedrot.aggregate(updates, [1, 1, 0], reference)
    result = first.finish().state_dict
    assert result[COUNTER] == whole.state_dict[COUNTER] == 7 and list(result) == list(reference)
    optimizer = fedrot.ServerOptimizer("momentum", 0.5)
    stepped = fedrot.FedRotAggregator(reference, server_optimizer=optimizer)
    for _ in range(2):
        assert stepped.aggregate(updates).state_dict[COUNTER] == 7
    assert all(COUNTER not in name for name in optimizer.state_dict())
    merged = fedrot.merge([(u, {"peft_type": "LORA", "r": 4, "modules_to_save": ["head"]}) for u in updates])
    assert merged.state_dict[COUNTER] == 7 and merged.config["modules_to_save"] == ["head"]
    merged.save(tmp_path / "merged")
    assert fedrot.read_adapter(tmp_path / "merged")[0][COUNTER] == 7


def test_integers_that_are_no_counter_must_agree():
    first, second = (normed_client(1, i)[1] | {"base_model.model.head.places": torch.tensor([0, 1, i])} for i in (2, 3))
    with refused("client 1", "head.places", "(3,)", "int64"):
        fedrot.aggregate([first, second])
    assert fedrot.aggregate([first, first]).state_dict["base_model.model.head.places"].tolist() == [0, 1, 2]
    with refused("client 1", "head.places", "(3,)", "(2,)"):
        fedrot.aggregate([first, first | {"base_model.model.head.places": torch.tensor([0, 1])}])


EMPTY = [HEAD, *factor_keys(client_updates(KINDS["modules to save"], 1)[0])[0]]


@pytest.mark.parametrize("key", EMPTY)
@pytest.mark.parametrize("shape", [(0,), (0, 16)])
def test_tensors_that_sharded_training_left_empty_are_refused(key, shape, tmp_path):
    good, update = client_updates(KINDS["modules to save"], 2)
    update = update | {key: torch.empty(shape)}
    with refused("client 1", key, shape, "gathered"):
        fedrot.aggregate([good, update])
    (tmp_path / CONFIG_FILE).write_text('{"peft_type": "LORA", "r": 4}', "utf-8")
    save_file(update, tmp_path / WEIGHTS_FILE)
    with refused(tmp_path, key, shape, "gathered"):
        fedrot.aggregate([tmp_path])


def test_slices_of_sharded_factors_are_refused():
    good, update = client_updates(KINDS["modules to save"], 2)
    key_A, key_B = factor_keys(update)[0]
    halves = {key_A: update[key_A][:2], key_B: update[key_B][:8]}  # of two processes, along the first axis
    for own in (halves, {key_A: update[key_A].flatten()[:32]}):
        with refused("client 1", key_A, "gathered"):
            fedrot.aggregate([good, update | own])
    both = {key: x[: len(x) // 2] for key, x in update.items()}
    with refused("client 0", key_A, "rank 4", "gathered"):
        fedrot.aggregate([({**both, key_B: both[key_B][:, :2]}, {"peft_type": "LORA", "r": 4})])


@pytest.mark.parametrize("alpha", [torch.tensor(4.0), torch.tensor(4), torch.tensor([4.0])], ids=str)
@pytest.mark.parametrize("where", ["to_q", "to_q.default", "to_q.other"])
def test_alpha_in_a_tensor_is_refused_with_the_cure(alpha, where, tmp_path):
    module, _, name = where.partition(".")
    A, B = (f"{module}.lora_{factor}{'.' + name if name else ''}.weight" for factor in "AB")
    update = {A: torch.randn(4, 16), B: torch.randn(16, 4), f"{module}.alpha": alpha}
    with refused("client 0", "to_q.alpha", "lora_alpha", "alpha / rank"):
        fedrot.aggregate([update])
    # A module of that name is none.
    head = {key: x for key, x in update.items() if "lora" in key} | {"mixer.alpha": torch.tensor(0.5)}
    assert fedrot.aggregate([head, head]).state_dict["mixer.alpha"] == 0.5


def velora(seed, init_type):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["query"], velora_config=VeloraConfig(num_groups=2, init_type=init_type))
    model = get_peft_model(bert(), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("init_type", ["random", "batch_average_once"])
def test_velora_is_plain_lora_by_what_it_does(init_type, tmp_path):
    models = [velora(seed, init_type) for seed in range(3)]
    updates = [{key: x.clone() for key, x in get_peft_model_state_dict(model).items()} for model in models]
    assert any("lora_velora_embed" in key for key in updates[0])
    plain = [{key: x for key, x in u.items() if "velora" not in key} for u in updates]
    result, expected = fedrot.aggregate(updates), fedrot.aggregate(plain)
    assert all(torch.equal(result.state_dict[key], x) for key, x in expected.state_dict.items())
    set_peft_model_state_dict(models[0], result.state_dict)
    folders = [tmp_path / str(i) for i in range(3)]
    for model, update, folder in zip(models, updates, folders, strict=True):
        set_peft_model_state_dict(model, update)
        model.save_pretrained(folder)
    fedrot.aggregate(folders)
    merged = fedrot.merge(folders, rank=12)
    assert merged.report.relative_error < 1e-6 and not merged.config["velora_config"]
    assert not any("velora" in key for key in merged.state_dict)
