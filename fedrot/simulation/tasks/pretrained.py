"""Loading pretrained models as configured."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..config import SimulationConfig
from ..storage import TENSOR_DTYPES, round_to_float16


def load_pretrained(auto: Any, config: SimulationConfig, **options: Any) -> PreTrainedModel:
    """Load a model from the hub or a folder; new layers are drawn from a fixed seed.

    Args:
        auto: the ``AutoModelFor…`` class.
        config: its model, dtype and gradient_checkpointing count.
        **options: options of ``from_pretrained``.
    """
    check_model_folder(config.model)
    torch.manual_seed(0)
    return prepare(auto.from_pretrained(config.model, dtype=TENSOR_DTYPES[config.dtype], **options), config)


def prepare(model: PreTrainedModel, config: SimulationConfig) -> PreTrainedModel:
    """Convert the model to the configured dtype, and switch gradient checkpointing on if it is configured."""
    model = model.to(TENSOR_DTYPES[config.dtype])
    if config.dtype == "float16":
        round_to_float16(model.parameters())
    model.config.use_cache = False  # of keys and values: for generation only
    if config.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ValueError(f"{type(model).__name__} has no gradient checkpointing; leave gradient_checkpointing out")
        # Reentrant checkpointing would compute no gradient: no block has an input with one, as the factors are no inputs.
        enable: Any = model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def check_model_folder(model: str) -> None:
    """Refuse an absolute path without a folder, before it is taken for a hub name."""
    if Path(model).is_absolute() and not Path(model).exists():
        raise ValueError(f"there is no model folder {model}")


def keep_head_in_float32(model: PreTrainedModel) -> None:
    """Convert a classifier's head, whose own weights clients train, to float32: bfloat16 would round small steps away."""
    if model.dtype != torch.float32:
        for name in head_modules(model):
            model.get_submodule(name).float().register_forward_pre_hook(_in_float32)


def _in_float32(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)


def head_modules(model: PreTrainedModel) -> list[str]:
    """List the modules beside a classifier's body. They start at random if the classes are new."""
    return [n for n, m in model.named_children() if n != model.base_model_prefix and any(True for _ in m.parameters())]
