"""The reference simulator: federated LoRA fine-tuning of a Transformers model, in one process."""

try:
    from .config import SimulationConfig
    from .run import SimulationResult, simulate
    from .tasks import Task, load_task
except ModuleNotFoundError as error:
    if (error.name or "").startswith("fedrot"):
        raise  # a module of fedrot itself, which no extra brings
    advice = f"fedrot.simulation needs {error.name}: pip install 'fedrot[simulate]'"
    raise ModuleNotFoundError(advice, name=error.name) from error

__all__ = ["SimulationConfig", "SimulationResult", "Task", "load_task", "simulate"]
