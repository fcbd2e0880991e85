"""Input that cannot be aggregated: refused, with a message that says which client, which tensor and why."""

import json
import math
import os
import pickle
from contextlib import contextmanager

import peft
import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig, MontecloraConfig
from safetensors.torch import save_file

import fedrot
from fedrot import UpdateError

from .peft_models import KINDS, Layers, Mixture, bert, client_updates, llama, save_clients

pytestmark = [
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups"),
]
LINEAR = KINDS["modules to save"]
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"
A, B, HEAD = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight", "base_model.model.classifier.weight"
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def clients():
    return client_updates(LINEAR, 3)


@pytest.fixture
def folders(tmp_path):
    return save_clients(LINEAR, tmp_path, 2)


@contextmanager
def refused(*parts, error=UpdateError):
    """The error, and everything its message must name."""
    with pytest.raises(error) as caught:
        yield
    for part in parts:
        assert str(part) in str(caught.value)


def with_value(x, value):
    x = x.clone()
    x.view(-1)[-1] = value
    return x


# What is done to an update, and what the error must name besides the client.
UNLIKE_THE_FIRST = {
    "key missing": (lambda u: u.pop(HEAD), [HEAD, "client 0"]),
    "factor missing": (lambda u: u.pop(B), [B, "client 0"]),
    "adapter missing": (lambda u: (u.pop(A), u.pop(B)), [A, "client 0", "1 more"]),
    "key too many": (lambda u: u.update(extra=torch.zeros(2)), ["extra", "client 0"]),
    "shape": (lambda u: u.update({HEAD: torch.zeros(5, 16)}), [HEAD, "(5, 16)", "(3, 16)", "client 0"]),
    "rank": (lambda u: u.update({A: torch.ones(2, 16), B: torch.ones(16, 2)}), [A, "(2, 16)", "(4, 16)", "client 0"]),
    "dtype of a factor": (lambda u: u.update({A: u[A].half(), B: u[B].half()}), [A, "float16", "float32", "client 0"]),
    "dtype of a head": (lambda u: u.update({HEAD: u[HEAD].double()}), [HEAD, "float64", "float32", "client 0"]),
}
NO_PAIR = {
    "A alone": (lambda u: u.pop(B), [A, B, "(4, 16)"]),
    "B alone": (lambda u: u.pop(A), [A, B, "(16, 4)"]),
    "ranks that differ": (lambda u: u.update({B: torch.ones(16, 5)}), [A, B, "(4, 16)", "(16, 5)"]),
    "dtypes that differ": (lambda u: u.update({B: u[B].double()}), [A, B, "float32", "float64"]),
    "empty factor": (lambda u: u.update({A: torch.ones(0)}), [A, "(0,)"]),
    "flat factor": (lambda u: u.update({B: torch.ones(64)}), [B, "(64,)"]),
    "B with a kernel": (lambda u: u.update({B: torch.ones(16, 4, 3, 3)}), [A, B, "(16, 4, 3, 3)"]),
    "no adapter": (lambda u: [u.pop(key) for key in list(u) if "lora_" in key], ["lora_A"]),
}
NOT_NUMBERS = {
    "integers": (lambda u: u.update({HEAD: u[HEAD].long()}), [HEAD, "int64", "(3, 16)"]),
    "complex numbers": (lambda u: u.update({A: u[A].to(torch.complex64)}), [A, "complex64", "(4, 16)"]),
    "8 bits": (lambda u: u.update({B: u[B].to(torch.float8_e4m3fn)}), [B, "float8_e4m3fn", "(16, 4)"]),
    "an array": (lambda u: u.update({A: u[A].numpy()}), [A, "ndarray"]),
    "None": (lambda u: u.update({HEAD: None}), [HEAD, "NoneType"]),
}
NOT_FINITE = {
    f"{value} in {key}": (
        lambda u, key=key, value=value: u.update({key: with_value(u[key], value)}),
        [key, shape, "NaN or Inf"],
    )
    for key, shape in ((A, "(4, 16)"), (B, "(16, 4)"), (HEAD, "(3, 16)"))
    for value in (math.nan, math.inf, -math.inf)
}
UNFIT, BROKEN = UNLIKE_THE_FIRST | NOT_NUMBERS | NOT_FINITE, NO_PAIR | NOT_NUMBERS | NOT_FINITE


@pytest.mark.parametrize("method", ["fedrot", "fedit"])
@pytest.mark.parametrize(("spoil", "named"), UNFIT.values(), ids=UNFIT)
def test_an_update_that_does_not_fit_is_refused(clients, spoil, named, method):
    spoil(clients[1])
    with refused("client 1", *named):
        fedrot.aggregate(clients, reference=clients[0], method=method)


@pytest.mark.parametrize(("spoil", "named"), UNFIT.values(), ids=UNFIT)
def test_an_update_that_does_not_fit_leaves_the_stream_usable(clients, spoil, named):
    stream, reference = fedrot.FedRotAggregator(clients[0]), clients[0]
    stream.add(clients[0], 2)
    good = dict(clients[1])
    spoil(clients[1])
    with refused("client 1", *named):
        stream.add(clients[1])
    stream.add(good)
    expected = fedrot.FedRotAggregator(reference)
    expected.add(clients[0], 2)
    expected.add(good)
    result, whole = stream.finish(), expected.finish()
    assert result.report == whole.report
    assert all(torch.equal(x, whole.state_dict[key]) for key, x in result.state_dict.items())


@pytest.mark.parametrize(("spoil", "named"), BROKEN.values(), ids=BROKEN)
def test_a_broken_update_is_refused_alone_and_by_align(clients, spoil, named):
    good = dict(clients[0])
    spoil(clients[0])
    with refused("client 0", *named):
        fedrot.aggregate(clients[:1])
    with refused("the update", *named):
        fedrot.align(clients[0], good)
    stream = fedrot.FedRotAggregator(good)
    with refused("client 0", *named):
        stream.add(clients[0])
    stream.add(good)
    assert stream.finish().report.clients == ("client 0",)


SPOILED_REFERENCE = {
    "shape": (lambda u: u.update({A: torch.ones(4, 8)}), [A, "(4, 8)", "(4, 16)"]),
    "rank": (lambda u: u.update({A: torch.ones(2, 16), B: torch.ones(16, 2)}), [A, "(2, 16)", "(4, 16)"]),
    "adapter missing": (lambda u: (u.pop(A), u.pop(B)), [A]),
    "factor missing": (lambda u: u.pop(B), [B]),
    "adapter too many": (lambda u: u.update({"new.lora_A.weight": u[A], "new.lora_B.weight": u[B]}), ["new.lora_A"]),
    **{name: case for name, case in NOT_FINITE.items() if HEAD not in name},
    **NOT_NUMBERS,
}


@pytest.mark.parametrize(("spoil", "named"), SPOILED_REFERENCE.values(), ids=SPOILED_REFERENCE)
def test_a_reference_that_does_not_fit_is_refused(clients, spoil, named):
    reference = dict(clients[2])
    spoil(reference)
    for call in (
        lambda: fedrot.aggregate(clients, reference=reference),
        lambda: fedrot.align(clients[0], reference),
        lambda: fedrot.FedRotAggregator(reference).add(clients[0]),
    ):
        with refused("the reference", *named):
            call()


def test_the_plain_tensors_of_a_reference_do_not_matter(clients):
    reference = {key: x for key, x in clients[0].items() if "lora_" in key} | {HEAD: torch.full((7,), math.nan)}
    expected = fedrot.aggregate(clients, reference=clients[0]).state_dict
    result = fedrot.aggregate(clients, reference=reference).state_dict
    assert all(torch.equal(x, expected[key]) for key, x in result.items())


WEIGHTS = {
    "negative": ([1, -1, 1], ["client 1", "-1"]),
    "NaN": ([1, 1, math.nan], ["client 2", "nan"]),
    "infinite": ([math.inf, 1, 1], ["client 0", "inf"]),
    "all zero": ([0, 0, 0], ["zero"]),
    "too few": ([1, 1], ["2 weights", "3 updates"]),
    "too many": ([1] * 4, ["4 weights", "3 updates"]),
    "none": ([], ["0 weights", "3 updates"]),
}


@pytest.mark.parametrize(("weights", "named"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_that_make_no_mean_are_refused(clients, weights, named):
    with refused(*named):
        fedrot.aggregate(clients, weights)


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf])
def test_a_bad_weight_leaves_the_stream_usable(clients, weight):
    stream = fedrot.FedRotAggregator(clients[0])
    with refused("client 0", weight):
        stream.add(clients[1], weight)
    stream.add(clients[1])
    assert stream.finish().report.clients == ("client 0",)


@pytest.mark.parametrize("updates", [[], (), iter(())])
def test_no_updates_are_refused(updates):
    with refused("no updates"):
        fedrot.aggregate(updates)


def test_one_update_that_is_not_in_a_list_is_refused(clients, folders):
    for single in (clients[0], str(folders[0]), folders[0]):
        with refused("sequence", "list"):
            fedrot.aggregate(single)
    for not_an_update in ([1], [list(clients[0].items())], [None]):
        with refused("client 0", "state dict", type(not_an_update[0]).__name__):
            fedrot.aggregate(not_an_update)


OPTIONS = {
    "method": ["fedRot", "", None],
    "align_on": ["a", "both", None],
    "group": ["so", "U", None],
    "on_invalid": ["ignore", None],
    "backend": ["cuda", None],
    "strength": [-0.1, 1.1, math.nan, math.inf],
    "round": [-1, 1.0, "1", None, True],
}
EVERY_OPTION = [(name, value) for name, values in OPTIONS.items() for value in values]


@pytest.mark.parametrize(("name", "value"), EVERY_OPTION)
def test_an_unknown_option_is_refused_and_the_known_ones_named(clients, name, value):
    known = {"method": "fedit, fedrot", "align_on": "A, B, alternate, joint", "group": "SO, O", "on_invalid": "raise, drop"}
    with refused(name, known.get(name, ""), value, error=ValueError):
        fedrot.aggregate(clients, **{name: value})
    with refused(name, value, error=ValueError):
        fedrot.FedRotAggregator(clients[0], **{name: value})
    if name in ("align_on", "group", "strength"):
        with refused(name, value, error=ValueError):
            fedrot.align(clients[0], clients[1], **{name: value})


def test_dropping_everyone_is_an_error_that_says_why(clients):
    bad = [client | {A: with_value(client[A], math.nan)} for client in clients]
    with refused("client 0", "client 1", "client 2", A, "(4, 16)"):
        fedrot.aggregate(bad, on_invalid="drop")
    with refused("client 0", "client 1", A):  # what is left has no weight
        fedrot.aggregate([*bad[:2], clients[2]], [1, 1, 0], on_invalid="drop")
    stream = fedrot.FedRotAggregator(clients[0], on_invalid="drop")
    stream.add(bad[0])
    with refused("client 0", A):
        stream.finish()
    stream.add(clients[1])  # the round begins anew
    assert stream.finish().report.clients == ("client 0",)


def test_a_stream_that_lacks_something_says_what(clients):
    with refused("no updates", "add"):
        fedrot.FedRotAggregator(clients[0]).finish()
    with refused("reference"):
        fedrot.FedRotAggregator(method="fedrot").add(clients[0])
    stream = fedrot.FedRotAggregator(clients[0])
    stream.add(clients[0], 0)
    with refused("positive weight"):
        stream.finish()
    stream.add(clients[1])
    with refused("finish", error=RuntimeError):
        stream.aggregate(clients)
    stream.finish()
    with refused("no updates"):
        stream.finish()


@pytest.mark.parametrize("targets", [(["query"], ["query"]), (["query"], ["value"])])
def test_two_adapters_in_one_state_dict_are_refused(targets):
    first, second = (peft.LoraConfig(r=4, target_modules=modules) for modules in targets)
    model = peft.get_peft_model(bert(), first)
    model.add_adapter("second", second)
    both = {key: x for key, x in model.state_dict().items() if "lora_" in key}
    with refused("client 0", "lora_A.default", "lora_A.second", "two adapters"):
        fedrot.aggregate([both])


ATTENTION = {"r": 4, "target_modules": ["query", "value"]}
# The base model, what PEFT makes of it, and what the error must name: for the state dict, and for the folder.
OTHER_TUNERS = {
    "grouped convolution": (Layers, peft.LoraConfig(r=4, target_modules=["grouped"]), "(8, 1, 1, 1)", "(8, 1, 1, 1)"),
    "experts": (Mixture, peft.LoraConfig(r=4, target_parameters=["experts.up"]), "expert", "target_parameters"),
    "KaSA": (bert, peft.LoraConfig(**ATTENTION, kasa_config=peft.KasaConfig()), "query.lora_diag", "kasa_config"),
    "MonteCLoRA": (
        bert,
        peft.LoraConfig(**ATTENTION, monteclora_config=MontecloraConfig()),
        "query.lora_monteclora_sampler",
        "monteclora_config",
    ),
    "block-diagonal": (
        bert,
        peft.LoraConfig(**ATTENTION, use_bdlora=BdLoraConfig(target_modules_bd_b=["query", "value"], nblocks=2)),
        "(16, 2)",
        "use_bdlora",
    ),
    "AdaLoRA": (bert, peft.AdaLoraConfig(init_r=4, target_modules=["query"], total_step=10), "query.lora_E", "ADALORA"),
    "IA3": (bert, peft.IA3Config(target_modules=["query"], feedforward_modules=[]), "lora_A", "IA3"),
    "VeRA": (bert, peft.VeraConfig(**ATTENTION), "lora_A", "VERA"),
    "LoHa": (bert, peft.LoHaConfig(**ATTENTION), "lora_A", "LOHA"),
    "LoKr": (bert, peft.LoKrConfig(**ATTENTION), "lora_A", "LOKR"),
    "prompt tuning": (
        llama,
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "lora_A",
        "PROMPT_TUNING",
    ),
}


@pytest.mark.parametrize(("base", "config", "in_update", "in_folder"), OTHER_TUNERS.values(), ids=OTHER_TUNERS)
def test_what_other_tuners_train_is_refused(base, config, in_update, in_folder, tmp_path):
    model = peft.get_peft_model(base(), config)
    update = peft.get_peft_model_state_dict(model)
    with refused("client 0", in_update):
        fedrot.aggregate([update, update])
    model.save_pretrained(tmp_path / "adapter")
    with refused("client 0", tmp_path / "adapter", in_folder):
        fedrot.aggregate([tmp_path / "adapter"] * 2)


def test_experts_of_any_name_are_refused_in_a_folder(tmp_path):
    peft.get_peft_model(Mixture(), peft.LoraConfig(target_parameters=["input_linear.up"])).save_pretrained(tmp_path)
    with refused(tmp_path, "target_parameters"):
        fedrot.aggregate([tmp_path])


class WritesAFile:
    """What a hostile client would send: a pickle that acts when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(size):
    return lambda folder: os.truncate(folder / WEIGHTS_FILE, size(os.path.getsize(folder / WEIGHTS_FILE)))


def tensors(**changed):
    return lambda folder: save_file(fedrot.read_adapter(folder)[0] | changed, folder / WEIGHTS_FILE)


BROKEN_FOLDERS = {
    "no configuration": (lambda folder: (folder / CONFIG_FILE).unlink(), [CONFIG_FILE]),
    "no weights": (lambda folder: (folder / WEIGHTS_FILE).unlink(), [WEIGHTS_FILE]),
    "not there": (lambda folder: folder.rename(folder.with_name("gone")), ["there is no folder"]),
    "last byte missing": (cut(lambda size: size - 1), [WEIGHTS_FILE]),
    "half missing": (cut(lambda size: size // 2), [WEIGHTS_FILE]),
    "header cut": (cut(lambda size: 20), [WEIGHTS_FILE]),
    "empty": (cut(lambda size: 0), [WEIGHTS_FILE]),
    "header of 2⁶³ bytes": (write(WEIGHTS_FILE, b"\xff" * 7 + b"\x7f" + b"{}"), [WEIGHTS_FILE]),
    "configuration not JSON": (write(CONFIG_FILE, "peft_type: LORA"), [CONFIG_FILE, "not JSON"]),
    "configuration empty": (write(CONFIG_FILE, ""), [CONFIG_FILE, "not JSON"]),
    "configuration not text": (write(CONFIG_FILE, b"\xff\xfe\x00"), [CONFIG_FILE, "not JSON"]),
    "configuration nested": (write(CONFIG_FILE, "[" * 500_000), [CONFIG_FILE, "not JSON"]),
    "configuration a list": (write(CONFIG_FILE, '["LORA"]'), [CONFIG_FILE]),
    "configuration a word": (write(CONFIG_FILE, '"LORA"'), [CONFIG_FILE]),
    "configuration huge": (write(CONFIG_FILE, '{"peft_type": "LORA"' + " " * (1 << 20) + "}"), [CONFIG_FILE, "larger"]),
    "integers": (tensors(steps=torch.ones(3, dtype=torch.int64)), ["steps", "I64", "(3,)"]),
    "8 bits": (tensors(head=torch.ones(3).to(torch.float8_e4m3fn)), ["head", "F8_E4M3", "(3,)"]),
    "adapter's name in a key": (tensors(**{"x.lora_A.default.weight": torch.ones(2, 3)}), ["x.lora_A.default.weight"]),
    "NaN": (tensors(**{A: torch.full((4, 16), math.nan)}), [A, "(4, 16)", "NaN"]),
}


@pytest.mark.parametrize(("spoil", "named"), BROKEN_FOLDERS.values(), ids=BROKEN_FOLDERS)
def test_a_broken_folder_is_refused(folders, spoil, named):
    reference = fedrot.read_adapter(folders[0])[0]
    spoil(folders[1])
    for updates in (folders[::-1], [reference, folders[1]]):
        with refused(f"client {updates.index(folders[1])}", folders[1], *named):
            fedrot.aggregate(updates, reference=reference)
    with refused(f"the reference ({folders[1]})", *named):
        fedrot.align(folders[0], folders[1])


@pytest.mark.parametrize("name", ["adapter_model.bin", WEIGHTS_FILE])
def test_a_pickle_is_refused_and_never_run(folders, name, tmp_path):
    (folders[1] / WEIGHTS_FILE).unlink()
    (folders[1] / name).write_bytes(pickle.dumps(WritesAFile(tmp_path / "ran")))
    with refused("client 1", folders[1] / name, "safetensors"):
        fedrot.aggregate(folders)
    with refused(folders[1] / name, "safetensors"):
        fedrot.read_adapter(folders[1])
    assert not (tmp_path / "ran").exists()
    pickle.loads((folders[1] / name).read_bytes())
    assert (tmp_path / "ran").exists()


SCALING = {"lora_alpha": 32, "use_rslora": True, "alpha_pattern": {"query": 1}, "use_dora": True, "r": 2}


@pytest.mark.parametrize(("field", "value"), SCALING.items())
def test_folders_whose_factors_mean_different_updates_are_refused(folders, field, value):
    config = json.loads((folders[1] / CONFIG_FILE).read_text("utf-8"))
    (folders[1] / CONFIG_FILE).write_text(json.dumps(config | {field: value}), "utf-8")
    with refused("client 1", "client 0", *folders, field, repr(value), repr(config[field])):
        fedrot.aggregate(folders)
    with refused("the reference", folders[1], "client 0", field):
        fedrot.aggregate(folders[:1], reference=folders[1])
    with refused("the reference", "the update", field):
        fedrot.align(folders[0], folders[1])
    stream = fedrot.FedRotAggregator(fedrot.read_adapter(folders[0])[0])
    stream.add(folders[0])
    with refused("client 1", field):
        stream.add(folders[1])
    assert stream.finish().report.clients == (f"client 0 ({folders[0]})",)


def test_what_is_not_an_update_is_named(clients):
    with refused("client 0", "expected tensors by name"):
        fedrot.aggregate([{0: torch.zeros(2, 2)}])
    for strange in (clients[0][A].to("meta"), clients[0][A].to_sparse()):
        with refused("client 1", A, "(4, 16)", "dense"):
            fedrot.aggregate([clients[0], clients[1] | {A: strange}])
    with refused("sequence"):
        fedrot.aggregate(None)
    for weights in (3, [None, 1, 1], ["a", 1, 1]):
        with refused("weight"):
            fedrot.aggregate(clients, weights)
    for option in ({"strength": "a"}, {"strength": None}, {"method": ["fedrot"]}):
        with refused(error=ValueError):
            fedrot.aggregate(clients, **option)
