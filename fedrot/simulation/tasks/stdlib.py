"""The embedded language task, which needs no network: Python's standard library, byte by byte, a package per client."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ..config import SimulationConfig
from .cache import cached_model, digest
from .columns import check_names
from .data import class_numbers, draw_subset
from .fits import check_positions
from .language import LanguageTask
from .pretrained import prepare

# The clients: packages of 30 kB to 700 kB that Python 3.11 and 3.12 have. The base model is not pretrained on them.
PACKAGES = (
    "asyncio",
    "concurrent",
    "ctypes",
    "email",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "xml",
)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# How many windows of each package are evaluated, evenly spaced over its held-out files.
TEST_WINDOWS = 32
_STEPS, _BATCH, _WINDOW = 500, 16, 128
_SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
}


def load_stdlib_task(config: SimulationConfig, base_model: Path | None) -> LanguageTask:
    """Load windows of ``max_length`` bytes, and the Llama: from ``base_model`` if given, from the cache, or pretrained."""
    model = prepare(LlamaForCausalLM.from_pretrained(base_model) if base_model else stdlib_model(), config)
    check_positions(model, config)
    train, test = stdlib_data(config.max_length)
    train, test = draw_subset(train, config.max_train_examples), draw_subset(test, config.max_test_examples)
    if config.partition_column is not None:
        check_names(train, config.partition_column, "the training data")
    labels, classes = class_numbers(train, config.label_column)
    defaults = {"task_type": "CAUSAL_LM", "target_modules": TARGETS}
    return LanguageTask(train, test, labels, classes, model, defaults)


def stdlib_data(length: int) -> tuple[Dataset, Dataset]:
    """Cut the packages into training and test examples of ``length`` bytes; every fifth file of a package is held out.

    The columns are input_ids, prompt_tokens (always 0) and package.

    Raises:
        ValueError: this Python has no source of its standard library.
    """
    train: dict[str, list[Any]] = {"input_ids": [], "package": []}
    test: dict[str, list[Any]] = {"input_ids": [], "package": []}
    found = [package for package in PACKAGES if (stdlib_folder() / package).is_dir()]
    if not found:
        raise ValueError(f"the source of Python's standard library is not at {stdlib_folder()}; use another dataset")
    for package in found:
        files = [path.read_bytes() for path in _sources(stdlib_folder() / package)]
        held_out = _windows(files[2::5], length)
        spaced = np.linspace(0, len(held_out), min(len(held_out), TEST_WINDOWS), endpoint=False).astype(int)
        kept = _windows([file for i, file in enumerate(files) if i % 5 != 2], length)
        for part, windows in ((train, kept), (test, held_out[spaced])):
            part["input_ids"] += windows.tolist()
            part["package"] += [package] * len(windows)
    return _dataset(train), _dataset(test)


def stdlib_model() -> PreTrainedModel:
    """Load a byte-level Llama of 395,000 parameters, or pretrain it on the library's other modules. Deterministic."""
    data = b"".join(path.read_bytes() for path in sorted(stdlib_folder().glob("*.py")))
    key = {"sizes": _SIZES, "steps": _STEPS, "batch": _BATCH, "window": _WINDOW, "data": digest(data)}
    return cached_model("stdlib", LlamaForCausalLM, key, lambda: _pretrain(data))


def stdlib_folder() -> Path:
    """Return the folder of this Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def _sources(package: Path) -> list[Path]:
    """List the package's source files in a fixed order, without its tests."""
    return [path for path in sorted(package.rglob("*.py")) if not {"test", "tests"} & set(path.relative_to(package).parts)]


def _windows(files: list[bytes], length: int) -> np.ndarray:
    """Cut the files, one after another, into windows (n, length), without a rest that fills none."""
    content = np.frombuffer(b"".join(files), np.uint8)
    return content[: len(content) // length * length].reshape(-1, length)


def _dataset(columns: dict[str, list[Any]]) -> Dataset:
    return Dataset.from_dict({**columns, "prompt_tokens": [0] * len(columns["package"])})


def _pretrain(data: bytes) -> PreTrainedModel:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**_SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=_STEPS, pct_start=0.1)
    windows = torch.from_numpy(_windows([data], _WINDOW).astype(np.int64))
    for batch in tqdm(
        _batches(len(windows)), total=_STEPS, desc="pretraining the Llama on Python", unit="step", leave=False
    ):
        tokens = windows[batch]
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def _batches(examples: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    for _ in range(_STEPS):
        yield rng.choice(examples, _BATCH, replace=False)
