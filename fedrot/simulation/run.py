"""One simulation: rounds of local training, aggregation and evaluation, and the files that it leaves behind."""

import copy
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from tqdm import tqdm

from ..adapters.files import check_new, new_folder
from ..methods.registry import METHODS
from ..options import refuse_old_spellings
from ..robust.choice import Choice
from ..server.checkpoint import load_checkpoint, save_checkpoint
from .clients import Clients
from .config import EMBEDDED, SimulationConfig
from .distances import plot_distances, read_distances, write_distances
from .metrics import SCORES, read_metrics, write_metrics
from .partition import histograms, plot_partition, small_clients
from .plots import plot_geometry, plot_run
from .server import Server
from .tasks import Task, load_task

_log = logging.getLogger(__name__)

CONFIG, METRICS, CURVES, DISTANCES = "config.yaml", "metrics.jsonl", "curves.png", "distances.csv"
PARTITION_PLOT, BASE_MODEL, FOLDED_MODEL = "partition.png", "base_model", "folded_model"


@dataclass(frozen=True)
class SimulationResult:
    """A finished run.

    Attributes:
        config: what was run.
        folder: where its files are.
        metrics: a row per round, whose "round" counts from 1. "aggregation_error" and "relative_error" are None in a run
            without ``report_error``. So is "plain_relative_error", that of the plain average of the same updates, where the
            method does not tell. "norm_A" and "norm_B" are the Frobenius norms of the global adapter's factors after the
            aggregation, over all layers; None for a factor that clients do not share. With ``robust`` or ``clip``, "refused"
            are the numbers of the clients that had no weight, "clipped" is client → what was left of its change, and
            "client_weights" are the weights by client.
    """

    config: SimulationConfig
    folder: Path
    metrics: list[dict[str, Any]]

    @property
    def accuracy(self) -> float:
        """The accuracy of the final adapter."""
        return float(self.metrics[-1]["accuracy"])


def simulate(
    config: SimulationConfig,
    folder: Path,
    *,
    task: Task | None = None,
    resume: bool = False,
    progress: bool = True,
    title: str | None = None,
    on_round: Callable[[int], object] | None = None,
) -> SimulationResult:
    """Run a simulation, or what is left of it.

    Args:
        config: what to run; to resume, the configuration that was saved.
        folder: for the run's files; must not exist, unless resuming.
        task: data and base model, if loaded already.
        resume: go on from the folder's last checkpoint. The result is that of an uninterrupted run, bit for bit.
        progress: show a progress bar.
        title: the progress bar's title; by default method, start and seed.
        on_round: called with the number of rounds done after each, whose metrics and checkpoint are written by then. What
            it raises ends the run, which can be resumed.

    Raises:
        FileExistsError: the folder exists.
        ValueError: a configuration that does not fit the data or the model, or not the run to resume, or a run of fedrot
            0.1 to resume, whose options or rounds have changed since.
        UpdateError: a client's factors hold NaN or Inf (``on_invalid="raise"``).
    """
    if not resume:
        check_new(folder)
    saved_model = folder / BASE_MODEL
    if task is None:
        task = load_task(config, saved_model if saved_model.exists() else None)
    clients = Clients(task, config)
    server = Server(clients, config)
    server.check()  # what cannot be aggregated, or not be encoded, is refused before anything is written
    task.collate(task.train, np.arange(1), clients.device)
    if resume:
        _check_same(config, folder)
    else:
        with new_folder(folder) as temporary:  # whenever it is interrupted, it can be resumed
            config.save(temporary / CONFIG)
    table = histograms(clients.examples, task.labels, task.classes, clients.column)
    if said := small_clients(table, config.batch_size):
        _log.warning("%s", said)
    if not (folder / PARTITION_PLOT).exists():
        table.to_csv(folder / "partition.csv")
        plot_partition(table, folder / PARTITION_PLOT)
    if config.model in EMBEDDED and not saved_model.exists():
        with new_folder(saved_model) as temporary:
            task.base_model.save_pretrained(temporary)

    tensors, rounds_done = load_checkpoint(folder)
    metrics = read_metrics(folder / METRICS, rounds_done)
    if tensors is not None:
        server.restore(tensors, rounds_done)
    in_round = config.local_steps * len(clients.sample(0))
    with tqdm(
        total=config.rounds * in_round,
        initial=rounds_done * in_round,
        desc=title or f"{config.method}, {config.start} start, seed {config.seed}",
        unit="client step",
        disable=not progress,
    ) as bar:
        for round in range(rounds_done, config.rounds):
            row, choice = _run_round(round, clients, server, bar)
            metrics.append(row)
            if choice is not None:
                write_distances(choice, folder / DISTANCES)
            write_metrics(folder / METRICS, metrics)
            save_checkpoint(folder, server.checkpoint(), round + 1)
            bar.set_postfix(_shown(metrics[-1], config.rounds))
            if on_round is not None:
                on_round(round + 1)

    plot_run(metrics, config, folder / CURVES)
    if config.geometry:
        plot_geometry(pd.DataFrame(metrics), folder / "geometry.png")
    if (folder / DISTANCES).exists():
        plot_distances(read_distances(folder / DISTANCES), metrics[-1].get("refused", []), folder / "distances.png")
    _save_adapters(server, folder)
    return SimulationResult(config, folder, metrics)


def _check_same(config: SimulationConfig, folder: Path) -> None:
    """Refuse to resume a run with another configuration than the one it was saved with."""
    saved = yaml.safe_load((folder / CONFIG).read_text("utf-8"))
    refuse_old_spellings(saved)
    saved = asdict(SimulationConfig()) | saved  # what an earlier version did not save had its default
    if changed := [name for name, value in asdict(config).items() if saved[name] != value]:
        raise ValueError(f"{folder} was run with another {', '.join(changed)}; resume it as it was, or start another run")


def _run_round(round: int, clients: Clients, server: Server, bar: tqdm) -> tuple[dict[str, Any], Choice | None]:
    """Train, aggregate and evaluate the round of this index; return its row, which counts rounds from 1, and the choice."""
    config = clients.config
    chosen = clients.sample(round)
    trained = clients.train(round, chosen, [server.start_of(c) for c in chosen], bar.update, server.trained())
    result, geometry = server.aggregate(chosen, [state for state, _ in trained])
    losses = {f"client {c}": loss for c, (_, loss) in zip(chosen, trained, strict=True)}
    row = {
        "round": round + 1,
        "method": config.method,
        "clients": chosen,
        "dropped": {name.removeprefix("client "): why for name, why in result.report.dropped.items()},
        "train_loss": sum(w * losses[name] for w, name in zip(result.report.weights, result.report.clients, strict=True)),
        "aggregation_error": result.report.error,
        "relative_error": result.report.relative_error,
        "plain_relative_error": result.report.plain_relative_error,
        "rotation_angle": result.report.angle,
        **_describe_choice(result.report.choice),
        **server.norms(),
        **geometry,
    }
    if (round + 1) % config.eval_every == 0 or round + 1 == config.rounds:
        row |= server.evaluate()
    return row, result.report.choice


def _describe_choice(choice: Choice | None) -> dict[str, Any]:
    """Describe which clients were refused or clipped, for a round's row; nothing where clients are not compared."""
    if choice is None:
        return {}
    return {
        "refused": [int(name.removeprefix("client ")) for name in choice.refused],
        "clipped": {name.removeprefix("client "): left for name, left in (choice.clipped or {}).items()},
        "client_weights": {name.removeprefix("client "): w for name, w in zip(choice.clients, choice.weights, strict=True)},
    }


def _shown(row: dict[str, Any], rounds: int) -> dict[str, str]:
    """The part of a round's row that the progress bar shows."""
    numbers = {name: row.get(name) for name in (*SCORES, "relative_error")}
    return {"round": f"{row['round']}/{rounds}"} | {name: f"{x:.3f}" for name, x in numbers.items() if x is not None}


def _save_adapters(server: Server, folder: Path) -> None:
    """Save the final adapter, or every client's, and the base model under it where the method changed that."""
    clients = server.clients
    for name, state in server.adapters().items():
        if not (folder / name).exists():
            clients.load(state)
            with new_folder(folder / name) as temporary:
                clients.model.save_pretrained(str(temporary))
    if METHODS[clients.config.method].updates_base and not (folder / FOLDED_MODEL).exists():
        with new_folder(folder / FOLDED_MODEL) as temporary:
            base: Any = copy.deepcopy(clients.model)
            base.unload().save_pretrained(str(temporary))
