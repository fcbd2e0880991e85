"""One simulation: rounds of local training, aggregation and evaluation, with everything it leaves behind."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from ..aggregation import FedRotAggregator
from ..folders import check_new, new_folder
from ..updates import open_updates
from .checkpoint import load_checkpoint, read_metrics, save_checkpoint, write_metrics
from .clients import Clients, State
from .config import SimulationConfig
from .plots import plot_run
from .task import Task, load_task

CONFIG, METRICS, CURVES, ADAPTER, BASE_MODEL = "config.yaml", "metrics.jsonl", "curves.png", "adapter", "base_model"


@dataclass(frozen=True)
class SimulationResult:
    """A finished run.

    Attributes:
        config: what was run.
        folder: where its files are.
        metrics: a row per round.
    """

    config: SimulationConfig
    folder: Path
    metrics: list[dict[str, Any]]

    @property
    def accuracy(self) -> float:
        """Of the final adapter."""
        return self.metrics[-1]["accuracy"]


def simulate(
    config: SimulationConfig,
    folder: Path,
    *,
    task: Task | None = None,
    resume: bool = False,
    progress: bool = True,
    title: str | None = None,
) -> SimulationResult:
    """Run a simulation, or what is left of it.

    Args:
        config: what to run; to resume, the configuration that was saved.
        folder: for the run's files; must not exist, unless resuming.
        task: data and base model, if loaded already.
        resume: go on from the folder's last checkpoint. The result is that of an uninterrupted run, bit for bit.
        progress: show a progress bar.
        title: what the progress bar says; by default method, start and seed.

    Raises:
        FileExistsError: the folder exists.
        ValueError: a configuration that does not fit the data or the model, or not the run to resume.
        UpdateError: a client's factors hold NaN or Inf (``on_invalid="raise"``).
    """
    if not resume:
        check_new(folder)
    saved_model = folder / BASE_MODEL
    if task is None:
        task = load_task(config, saved_model if saved_model.exists() else None)
    clients = Clients(task, config)
    open_updates([clients.state()])  # what cannot be aggregated, or not be encoded, is refused before anything is written
    task.collate(task.train, np.arange(1), clients.device)
    if resume and (saved := yaml.safe_load((folder / CONFIG).read_text("utf-8"))) != asdict(config):
        changed = [name for name, value in asdict(config).items() if saved.get(name) != value]
        raise ValueError(f"{folder} was run with another {', '.join(changed)}; resume it as it was, or start another run")
    if not resume:
        folder.mkdir(parents=True)
        config.save(folder / CONFIG)
    if config.model == "digits" and not saved_model.exists():
        with new_folder(saved_model) as temporary:
            task.base_model.save_pretrained(temporary)

    state, rounds_done = load_checkpoint(folder)
    metrics = read_metrics(folder / METRICS, rounds_done)
    if state is not None:
        state = {name: x.to(clients.device) for name, x in state.items()}
    elif config.start == "shared":
        state = clients.state()
    aggregator = FedRotAggregator(
        state,
        method=config.method,
        align_on=config.align_on,
        round=rounds_done,
        strength=config.strength,
        group=config.group,
        on_invalid=config.on_invalid,
    )
    steps = config.local_steps * -(-len(clients.sample(0)) // (config.clients_per_pass or len(clients.examples)))
    with tqdm(
        total=config.rounds * steps,
        initial=rounds_done * steps,
        desc=title or f"{config.method}, {config.start} start, seed {config.seed}",
        unit="step",
        disable=not progress,
    ) as bar:
        for round in range(rounds_done, config.rounds):
            row, state = _run_round(round, clients, state, aggregator, bar)
            metrics.append(row)
            write_metrics(folder / METRICS, metrics)
            save_checkpoint(folder, state, round + 1)
            bar.set_postfix({k: f"{v:.3f}" for k, v in metrics[-1].items() if k in ("accuracy", "relative_error")})

    plot_run(metrics, config, folder / CURVES)
    if not (folder / ADAPTER).exists():
        assert state is not None  # there was at least one round
        clients.load(state)
        with new_folder(folder / ADAPTER) as temporary:
            clients.model.save_pretrained(str(temporary))
    return SimulationResult(config, folder, metrics)


def _run_round(
    round: int, clients: Clients, start: State | None, aggregator: FedRotAggregator, bar: tqdm
) -> tuple[dict[str, Any], State]:
    config = clients.config
    chosen = clients.sample(round)
    trained = clients.train(round, chosen, start, bar.update)
    weights = [len(clients.examples[c]) for c in chosen]
    result = aggregator.aggregate([state for state, _ in trained], weights)
    losses = {f"client {i}": loss for i, (_, loss) in enumerate(trained)}
    row = {
        "round": round,
        "method": config.method,
        "clients": chosen,
        "dropped": {str(chosen[int(name.split()[1])]): why for name, why in result.report.dropped.items()},
        "train_loss": sum(w * losses[name] for w, name in zip(result.report.weights, result.report.clients, strict=True)),
        "aggregation_error": result.report.error,
        "relative_error": result.report.relative_error,
        "rotation_angle": result.report.angle,
    }
    if (round + 1) % config.eval_every == 0 or round + 1 == config.rounds:
        row |= clients.evaluate(result.state_dict)
    return row, result.state_dict
