"""The tasks of a comparison's runs: which runs share data and base model, and in which order each is loaded once."""

from collections.abc import Mapping
from pathlib import Path

from ...options import OPTION_NAMES
from ..config import EMBEDDED, SimulationConfig
from ..run import BASE_MODEL
from ..tasks import Task, load_task
from .comparison import Run

# Runs that differ in these alone share the data and the base model.
NOT_OF_THE_TASK = {
    *("lora", "lora_scaling", "partition", "dirichlet_alpha", "clients", "clients_per_round", "clients_per_pass"),
    *("rounds", "local_steps", "batch_size", "optimizer", "lr", "momentum", "weight_decay", "max_grad_norm"),
    *(*OPTION_NAMES, "client_weights", "server_optimizer", "server_lr", "start", "seed", "device"),
    *("eval_every", "eval_batch_size"),
}


def task_fields(config: SimulationConfig) -> str:
    """A key that configurations have in common whose runs share data and base model."""
    return repr({name: value for name, value in vars(config).items() if name not in NOT_OF_THE_TASK})


def by_task(runs: list[Run]) -> list[Run]:
    """Order the runs so that every task is loaded once."""
    order = {fields: number for number, fields in reversed(list(enumerate(task_fields(run.config) for run in runs)))}
    return sorted(runs, key=lambda run: order[task_fields(run.config)])


def saved_models(runs: list[Run], folder: Path) -> dict[str, Path]:
    """Find the weights of embedded models that earlier runs in the comparison's folder saved: ``task_fields`` → folder."""
    found: dict[str, Path] = {}
    for run in runs:
        if (path := folder / run.name / BASE_MODEL).exists():
            found.setdefault(task_fields(run.config), path)
    return found


def load_run_task(run: Run, saved: Mapping[str, Path]) -> Task:
    """Load the run's task, with the weights of an embedded model if an earlier run of the task saved them.

    Args:
        run: the run.
        saved: what ``saved_models`` returned before any run of the task went on.
    """
    return load_task(run.config, saved.get(task_fields(run.config)))


def cache_models(runs: list[Run], saved: Mapping[str, Path]) -> None:
    """Load each embedded model that no run saved, which puts it into the cache before several processes look for it.

    The first run's has been loaded already.
    """
    known = {*saved, task_fields(runs[0].config)}
    for run in runs:
        if run.config.model in EMBEDDED and (fields := task_fields(run.config)) not in known:
            load_run_task(run, saved)
            known.add(fields)
