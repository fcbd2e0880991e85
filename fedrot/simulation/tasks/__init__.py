"""The tasks that clients learn: the data, the model, and how examples become the model's inputs."""

from pathlib import Path

from ..config import SimulationConfig
from .base import Task
from .causal_lm import load_causal_lm
from .classification import load_image_classification, load_text_classification
from .digits import load_digits_task
from .stdlib import load_stdlib_task

__all__ = ["Task", "load_task"]


def load_task(config: SimulationConfig, base_model: Path | None = None) -> Task:
    """Load data and model as configured.

    Args:
        config: the run's configuration.
        base_model: a folder to take an embedded model's weights from, as saved with an earlier run.

    Raises:
        ValueError: data or a model that is missing or does not fit the task.
    """
    _check_options(config)
    if config.dataset == "digits":
        return load_digits_task(config, base_model)
    if config.dataset == "stdlib":
        return load_stdlib_task(config, base_model)
    if config.task == "causal-lm":
        return load_causal_lm(config)
    if config.task == "image-classification":
        return load_image_classification(config)
    return load_text_classification(config)


def _check_options(config: SimulationConfig) -> None:
    """Refuse options that the task would ignore."""
    for name in ("prompt_template", "response_template", "score"):
        if getattr(config, name) is not None and (config.task != "causal-lm" or config.dataset == "stdlib"):
            raise ValueError(f"{name} is for causal-lm on a dataset of your own, not for {config.task} on {config.dataset}")
