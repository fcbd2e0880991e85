"""What other libraries write of LoRA: what it is, by keys, configuration or first bytes, and how it becomes PEFT's."""

import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

_PAIR = 'pass it as a pair of the state dict and its configuration, {"peft_type": "LORA", "r": …, "lora_alpha": …}'
# In the order in which they are tried: what a key looks like, whose it is, and what to do. Orientations and scales were
# checked against the update that each library itself computes.
_KEYS = (
    (
        r"(lycoris|lora)_.*\.(hada_.*|lokr_.*|oft_.*|lora_mid\.weight|diff|diff_b|on_input|[ab][12]\.weight)|.*\.dora_scale",
        "LyCORIS's (LoHa, LoKr, OFT, full, IA3, GLoRA, or DoRA in its form)",
        "there is no plain pair of low-rank factors in them; train and send plain LoRA",
    ),
    (
        r".*\.lora_(down|up)\.weight|(lycoris|lora_(unet|te\d?|transformer))_.*\.alpha",
        "kohya's or LyCORIS's",
        "lora_down is A and lora_up is B: rename them to MODULE.lora_A.weight and MODULE.lora_B.weight, leave alpha out and "
        "give it as lora_alpha of the configuration (the rank, if there is none)",
    ),
    (
        r".*lora(_linear_layer|\d)?\.(down|up)\.weight",
        "those of diffusers",
        "lora.down is A and lora.up is B: rename them to MODULE.lora_A.weight and MODULE.lora_B.weight; lora_alpha is the "
        "rank",
    ),
    (
        r".*\.weight\.lora_[ab]",
        "llama.cpp's (GGUF)",
        "send the PEFT folder that the file was converted from",
    ),
    (
        r".*\.lora_[ab]\.weight",
        "torchtune's",
        "rename lora_a to lora_A and lora_b to lora_B",
    ),
    (
        r".*\.lora_[ab]",
        "those of MLX",
        "transpose the factors of linear layers: MODULE.lora_A.weight is lora_a.T and MODULE.lora_B.weight is lora_b.T; "
        "lora_alpha is scale × rank",
    ),
    (r".*\.loras\.[^.]+\.lora_[AB]", "AdapterHub's", _PAIR),
    (r".*\.lora_[AB]", "loralib's", _PAIR),
)
_RULES = tuple((re.compile(pattern), whose, cure) for pattern, whose, cure in _KEYS)
_FACTOR_OF_PEFT = re.compile(r".*\.lora_(embedding_)?[AB](\.weight)?")

_LFS, _PICKLES, _MOST_ENTRIES = b"version https://git-lfs", {".bin", ".pt", ".pth", ".ckpt", ".pkl"}, 1000
_WEIGHTS = {".safetensors", ".gguf", ".npz", *_PICKLES}


def explain_keys(keys: Iterable[str]) -> str | None:
    """Say whose keys these are and how their tensors become PEFT's; None for keys of PEFT and for unknown ones.

    Args:
        keys: the keys of one state dict.
    """
    keys = list(keys)
    for pattern, whose, cure in _RULES:
        if key := next((key for key in keys if pattern.fullmatch(key)), None):
            return f"keys such as {key} are {whose}, not PEFT's: {cure}"
    return None


def explain_config(config: Any) -> str | None:
    """Say whose adapter_config.json this is and what to do; None for PEFT's and for unknown ones.

    Args:
        config: the content of the file.
    """
    if not isinstance(config, Mapping) or "peft_type" in config:
        return None
    if "lora_parameters" in config or "fine_tune_type" in config:
        return (
            "is a configuration of MLX: rename lora_a and lora_b of linear layers to lora_A and lora_B, transpose them, and "
            f"{_PAIR}; lora_alpha is scale × rank"
        )
    if isinstance(inner := config.get("config"), Mapping) and ("architecture" in inner or "model_class" in config):
        return f"is a configuration of AdapterHub (adapters): if it is of plain LoRA, read the tensors and {_PAIR}"
    return None


def explain_file(file: Path) -> str | None:
    """Say what a file is that should be a safetensors file or a folder of PEFT, and what to do; None if that is unknown.

    Args:
        file: a file. Only its first bytes are read, and of safetensors the names of the tensors.
    """
    try:
        with file.open("rb") as opened:
            first = opened.read(64)
    except OSError:
        return None
    if first.startswith(_LFS):
        return "is a Git LFS pointer, which stands for a file that was not downloaded: fetch it with git lfs pull"
    if first.startswith(b"GGUF"):
        return "is a GGUF file of llama.cpp: send the PEFT folder that it was converted from"
    if first.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        return "is a web page, such as a download saves that was not allowed: download the file again"
    if file.suffix == ".npz":
        return "holds NumPy arrays, as MLX wrote them once: save the adapter with PEFT, as safetensors"
    # A safetensors file may begin with the same bytes, which are the length of its header, from { on.
    if file.suffix in _PICKLES or (first.startswith((b"\x80", b"PK\x03\x04")) and first[8:9] != b"{"):
        return "is a pickle, which could run code: save the adapter as safetensors (save_pretrained does by default)"
    if file.suffix != ".safetensors":
        return None
    try:
        with safe_open(file, framework="pt") as tensors:
            keys = list(tensors.keys())
    except (SafetensorError, OSError):
        return None
    if why := explain_keys(keys):
        return f"is no file of PEFT: {why}"
    if not any(map(_FACTOR_OF_PEFT.fullmatch, keys)):
        return None
    return f"holds lora_A and lora_B, but not how they are scaled: read it with safetensors.torch.load_file, and {_PAIR}"


def explain_folder(folder: Path) -> str | None:
    """Say what the first file of tensors in a folder is that has none of PEFT's; None if there is none that is known."""
    files = sorted(file for file in islice(folder.iterdir(), _MOST_ENTRIES) if file.suffix in _WEIGHTS and file.is_file())
    return next((f"{file} {why}" for file in files if (why := explain_file(file))), None)
