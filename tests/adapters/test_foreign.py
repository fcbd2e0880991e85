"""What other libraries write is named, with what makes an adapter of PEFT of it.

The keys, shapes and configurations are those that diffusers 0.42, lycoris-lora 4.1, loralib 0.1, adapters 1.3 and
mlx-lm 0.32 wrote for small models.
"""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

import fedrot
from fedrot.adapters.foreign import explain_keys

from ..peft_models import KINDS, client_updates
from ..refusals import CONFIG_FILE, WEIGHTS_FILE, refused

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'"),  # PEFT takes the bias of lora_B for a broken factor
]

r, n, m = 2, 6, 4
ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = f"lora_unet_{ATTENTION.replace('.', '_')}"
QUERY = "encoder.layer.0.attention.self.query"

# The file's name, key → shape, and words of the error.
FORMATS = {
    "kohya": (
        "last.safetensors",
        {f"{KOHYA}.alpha": (), f"{KOHYA}.lora_down.weight": (r, n), f"{KOHYA}.lora_up.weight": (m, r)},
        ["kohya", "lora_down is A", "alpha"],
    ),
    "LyCORIS": (
        "lora.safetensors",
        {"lycoris_0.alpha": (), "lycoris_0.lora_down.weight": (r, n), "lycoris_0.lora_up.weight": (m, r)},
        ["LyCORIS", "lora_down is A"],
    ),
    "LoHa": (
        "loha.safetensors",
        {"lycoris_0.alpha": (), **{f"lycoris_0.hada_{x}": (m, r) for x in ("w1_a", "w1_b", "w2_a", "w2_b")}},
        ["lycoris_0.hada_w1_a", "LoHa", "plain LoRA"],
    ),
    "LoKr": (
        "lokr.safetensors",
        {"lycoris_0.alpha": (), "lycoris_0.lokr_w1": (m, m), "lycoris_0.lokr_w2": (m, m)},
        ["lokr_w1", "LoKr", "plain LoRA"],
    ),
    "OFT": ("oft.safetensors", {"lycoris_0.alpha": (), "lycoris_0.oft_blocks": (1, m, m)}, ["oft_blocks", "OFT"]),
    "full": ("full.safetensors", {"lycoris_0.diff": (m, n), "lycoris_0.diff_b": (m,)}, ["lycoris_0.diff", "full"]),
    "IA3": ("ia3.safetensors", {"lycoris_0.on_input": (), "lycoris_0.weight": (m,)}, ["lycoris_0.on_input", "IA3"]),
    "GLoRA": ("glora.safetensors", {"lycoris_0.a1.weight": (r, n), "lycoris_0.a2.weight": (m, r)}, ["a1.weight", "GLoRA"]),
    "Tucker": (
        "tucker.safetensors",
        {f"{KOHYA}.lora_down.weight": (r, n), f"{KOHYA}.lora_up.weight": (m, r), f"{KOHYA}.lora_mid.weight": (r, r)},
        ["lora_mid", "plain LoRA"],
    ),
    "DoRA of LyCORIS": (
        "dora.safetensors",
        {f"{KOHYA}.lora_down.weight": (r, n), f"{KOHYA}.lora_up.weight": (m, r), f"{KOHYA}.dora_scale": (m, 1)},
        ["dora_scale", "DoRA"],
    ),
    "diffusers": (
        "pytorch_lora_weights.safetensors",
        {f"unet.{ATTENTION}.lora.down.weight": (r, n), f"unet.{ATTENTION}.lora.up.weight": (m, r)},
        ["diffusers", "lora.down is A"],
    ),
    "diffusers, attention processors": (
        "pytorch_lora_weights.safetensors",
        {"unet.x.processor.to_q_lora.down.weight": (r, n), "unet.x.processor.to_q_lora.up.weight": (m, r)},
        ["diffusers", "lora.down is A"],
    ),
    "torchtune": ("adapter.safetensors", {"q_proj.lora_a.weight": (r, n), "q_proj.lora_b.weight": (m, r)}, ["torchtune"]),
    "GGUF's keys": (
        "lora.safetensors",
        {"blk.0.attn_q.weight.lora_a": (r, n), "blk.0.attn_q.weight.lora_b": (m, r)},
        ["GGUF", "PEFT folder"],
    ),
    "MLX": (
        "adapters.safetensors",
        {"layers.0.self_attn.lora_a": (n, r), "layers.0.self_attn.lora_b": (r, m)},
        ["MLX", "lora_a.T", "scale × rank"],
    ),
}
# Of these the factors are PEFT's in all but name: they are averaged as state dicts, and need a configuration as files.
PAIRS = {
    "diffusers, of PEFT's factors": (
        "pytorch_lora_weights.safetensors",
        {f"unet.{ATTENTION}.lora_A.weight": (r, n), f"unet.{ATTENTION}.lora_B.weight": (m, r)},
        ["load_file", "lora_alpha"],
    ),
    "AdapterHub": (
        "adapter.safetensors",
        {f"{QUERY}.loras.task.lora_A": (r, n), f"{QUERY}.loras.task.lora_B": (m, r)},
        ["AdapterHub", "lora_alpha"],
    ),
    "loralib": ("lora.safetensors", {"0.lora_A": (r, n), "0.lora_B": (m, r)}, ["loralib", "lora_alpha"]),
}
ALL = FORMATS | PAIRS


def tensors(shapes):
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


@pytest.mark.parametrize(("name", "shapes", "said"), ALL.values(), ids=ALL)
def test_a_file_of_another_library_is_named(name, shapes, said, tmp_path):
    save_file(tensors(shapes), tmp_path / name)
    with refused("client 0", tmp_path, CONFIG_FILE, name, *said):
        fedrot.aggregate([tmp_path])
    with refused("client 0", tmp_path / name, *said):
        fedrot.aggregate([tmp_path / name])


@pytest.mark.parametrize(("name", "shapes", "said"), FORMATS.values(), ids=FORMATS)
def test_so_are_its_keys_in_a_folder_of_peft(folders, name, shapes, said):
    save_file(tensors(shapes), folders[1] / WEIGHTS_FILE)
    with refused("client 1", folders[1], *said):
        fedrot.aggregate(folders)


@pytest.mark.parametrize(("name", "shapes", "said"), PAIRS.values(), ids=PAIRS)
def test_pairs_are_averaged_as_their_error_says(name, shapes, said):
    state_dict = tensors(shapes)
    A, B = (x.double() for x in state_dict.values())
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 6}
    result = fedrot.aggregate([(state_dict, config)], method="flexlora")
    new_A, new_B = (x.double() for x in result.state_dict.values())
    torch.testing.assert_close(new_B @ new_A, B @ A, rtol=1e-5, atol=1e-5)
    assert result.config["lora_alpha"] / result.config["r"] == 3


def test_what_the_errors_say_gives_the_update_of_the_library():
    """ΔW as kohya's scripts, diffusers and MLX compute it, and of the adapter that their errors describe."""
    x = tensors({"down": (r, n), "up": (m, r), "a": (n, r), "b": (r, m)})
    alpha, scale = 3.0, 10.0
    for A, B, lora_alpha, expected in (
        (x["down"], x["up"], alpha, alpha / r * x["up"] @ x["down"]),
        (x["down"], x["up"], r, x["up"] @ x["down"]),
        (x["a"].T, x["b"].T, scale * r, scale * (x["a"] @ x["b"]).T),
    ):
        config = {"peft_type": "LORA", "r": r, "lora_alpha": lora_alpha}
        renamed = {"layer.lora_A.weight": A.contiguous(), "layer.lora_B.weight": B.contiguous()}
        result = fedrot.aggregate([(renamed, config)] * 2, method="flexlora")
        new_A, new_B = result.state_dict.values()
        s = result.config["lora_alpha"] / result.config["r"]
        torch.testing.assert_close(s * new_B @ new_A, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_keys_of_peft_are_nobody_elses(kind):
    (update,) = client_updates(kind, 1)
    assert explain_keys(update) is None


def test_keys_that_nobody_knows():
    assert explain_keys(["model.layers.0.weight", "lora.weight", "alpha", "up.weight"]) is None


CONFIGS = {
    "MLX": ({"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}, "num_layers": 16}, ["scale × rank"]),
    "AdapterHub": ({"config": {"architecture": "lora", "r": 4, "alpha": 8}, "model_class": "BertModel"}, ["lora_alpha"]),
    "nobody": ({"r": 4}, ["peft_type None"]),
}


@pytest.mark.parametrize("whose", CONFIGS)
def test_a_configuration_of_another_library_is_named(folders, whose):
    config, said = CONFIGS[whose]
    (folders[1] / CONFIG_FILE).write_text(json.dumps(config), "utf-8")
    with refused("client 1", folders[1] / CONFIG_FILE, *said, *([whose] if whose != "nobody" else [])):
        fedrot.aggregate(folders)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
FILES = {
    "Git LFS pointer": (POINTER, ["Git LFS pointer", "git lfs pull"]),
    "web page": (b"<!DOCTYPE html><html><title>Log in</title>", ["web page", "download"]),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(64), ["GGUF", "PEFT folder"]),
    "pickle": (pickle.dumps({"x": 1}), ["pickle", "run code", "safetensors"]),
    "torch.save": (b"PK\x03\x04" + bytes(64), ["pickle", "run code", "safetensors"]),
}


@pytest.mark.parametrize("what", FILES)
@pytest.mark.parametrize("name", [WEIGHTS_FILE, CONFIG_FILE])
def test_another_file_in_place_of_one_of_peft(folders, what, name):
    content, said = FILES[what]
    (folders[1] / name).write_bytes(content)
    with refused("client 1", folders[1] / name, *said):
        fedrot.aggregate(folders)


@pytest.mark.parametrize("name", ["adapter.gguf", "adapter_model.bin", "model.pt", "model.ckpt", "x.pth", "adapters.npz"])
def test_a_folder_with_files_that_are_not_read(tmp_path, name):
    (tmp_path / name).write_bytes(FILES["GGUF"][0] if name.endswith("gguf") else FILES["torch.save"][0])
    said = {"adapter.gguf": "GGUF", "adapters.npz": "MLX"}.get(name, "pickle")
    for path in (tmp_path, tmp_path / name):
        with refused("the adapter", tmp_path / name, said):
            fedrot.read_adapter(path)


@pytest.mark.parametrize("name", [WEIGHTS_FILE, CONFIG_FILE])
def test_a_file_of_the_folder_instead_of_the_folder(folders, name):
    with refused("the adapter", folders[1] / name, "is a file", f"pass the folder that holds it, {folders[1]}"):
        fedrot.read_adapter(folders[1] / name)


def test_an_unknown_file(tmp_path):
    (tmp_path / "notes.txt").write_text("lora")
    with refused("the adapter", "notes.txt", "is a file", "save_pretrained"):
        fedrot.read_adapter(tmp_path / "notes.txt")
    with refused("the adapter", tmp_path, CONFIG_FILE, "save_pretrained"):
        fedrot.read_adapter(tmp_path)


@pytest.mark.parametrize("key", ["base_model.model.classifier.weight", "base_model.model.x.lora_A.weight"])
def test_a_tensor_without_elements(folders, key):
    state_dict = fedrot.read_adapter(folders[1])[0] | {key: torch.zeros(0)}
    save_file(state_dict, folders[1] / WEIGHTS_FILE)
    with refused("client 1", folders[1], key, "(0,)", "gathered"):
        fedrot.aggregate(folders)
