"""What a run leaves in its folder."""

import logging
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from flwr.app import ArrayRecord
from safetensors.torch import save_file

from fedrot.adapters.files import check_new, new_folder
from fedrot.flower import FedRot, from_arrays
from fedrot.simulation import SimulationConfig
from fedrot.simulation.clients import Clients
from fedrot.simulation.config import EMBEDDED
from fedrot.simulation.metrics import read_metrics, write_metrics
from fedrot.simulation.plots import plot_run

from . import task

log = logging.getLogger("flwr")


class Results:
    """A run's folder: ``config.yaml``, ``metrics.jsonl`` with a row per round, ``curves.png`` and the final ``adapter``.

    Args:
        folder: a new folder, or the one to go on in, relative to the folder in which Flower's SuperLink was started. If
            empty, a new one in ``runs``.
        config: the run's configuration.
        resume: whether to go on.

    Raises:
        FileExistsError: the folder exists, and the run is not to go on.
        ValueError: the folder was run with another configuration.
    """

    def __init__(self, folder: str, config: SimulationConfig, resume: bool):
        self.config = config
        self.folder = Path(folder or f"runs/flower-{datetime.now():%Y%m%d-%H%M%S}").expanduser().resolve()
        self.metrics, saved = self.folder / "metrics.jsonl", self.folder / "config.yaml"
        if not (resume and saved.exists()):
            check_new(self.folder)
            self.folder.mkdir(parents=True)
            config.save(saved)
        elif (before := yaml.safe_load(saved.read_text("utf-8"))) != asdict(config):
            now = asdict(config)
            if unknown := sorted(before.keys() - now.keys()):
                raise ValueError(
                    f"{self.folder} is a run of another fedrot, which had {', '.join(unknown)}; name another output"
                )
            changed = ", ".join(name for name, value in now.items() if name not in before or before[name] != value)
            raise ValueError(f"{self.folder} was run with another {changed}; resume it as it was, or name another output")
        log.info("results go to %s", self.folder)

    def add(self, row: dict[str, Any]) -> None:
        """Write a round's row, whose "round" counts from 1, and log it in one line."""
        write_metrics(self.metrics, [*read_metrics(self.metrics, row["round"] - 1), row])
        numbers = ", ".join(f"{name.replace('_', ' ')} {x:.4g}" for name, x in row.items() if isinstance(x, float))
        averaged, dropped = len(row["clients"]), len(row["dropped"])
        log.info("%d of %d: %s, %d clients, %d dropped", row["round"], self.config.rounds, numbers, averaged, dropped)

    def finish(self, clients: Clients, strategy: FedRot, arrays: ArrayRecord) -> None:
        """Plot and tabulate the rounds, and save what is left of training."""
        rows = read_metrics(self.metrics, self.config.rounds)
        plot_run(rows, self.config, self.folder / "curves.png")
        table = pd.DataFrame(rows).drop(columns=["method", "clients", "dropped"])
        for line in table.to_string(index=False, float_format="%.3f").splitlines():
            log.info(line)
        if self.config.model in EMBEDDED:
            self._save("base_model", clients.task.base_model.save_pretrained)
        if strategy.method.returns() == ("A", "B"):
            model = task.global_model(clients, strategy, arrays)
            self._save("adapter", model.save_pretrained)
            if strategy.base_updates:
                self._save("folded_model", model.unload().save_pretrained)
        else:  # an adapter lacks the factor that every client has of its own
            save_file(from_arrays(arrays), self.folder / "shared.safetensors")
        log.info("results are in %s", self.folder)

    def _save(self, name: str, save: Any) -> None:
        """Write a folder, whole or not at all, unless an earlier run has."""
        if not (self.folder / name).exists():
            with new_folder(self.folder / name) as temporary:
                save(temporary)
