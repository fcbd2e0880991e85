"""The reference simulator: federated LoRA fine-tuning of a Transformers model, in one process."""

from .config import SimulationConfig
from .run import SimulationResult, simulate
from .tasks import Task, load_task

__all__ = ["SimulationConfig", "SimulationResult", "Task", "load_task", "simulate"]
