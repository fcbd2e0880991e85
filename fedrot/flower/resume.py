"""The checkpoint that a run goes on from after an interrupt."""

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import Result

from ..adapters.checks import check_update
from ..adapters.layout import Layout
from ..adapters.update import Update, open_update
from ..server.aggregator import FedRotAggregator
from ..server.checkpoint import load_checkpoint, read_metadata, save_checkpoint
from .protocol import State, complete_adapter, find_personal_factors

Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]
_log = logging.getLogger("flwr")
_ADAPTER, _OPTIMIZER, _BASE = "adapter", "optimizer", "base-"
# Options without which a run that goes on would be another one; a checkpoint of fedrot 0.1 has two more.
_OPTIONS, _OLD_OPTIONS = ("method", "align_on", "reflections", "seed"), ("group", "reference")


class Checkpoint:
    """The state of an aggregator after every round, in a folder, with the changes of the base weights.

    Args:
        folder: made by the first ``save``.
        resume: whether ``restore`` may go on from what is there.
        aggregator: the run's aggregator.
    """

    def __init__(self, folder: Path, resume: bool, aggregator: FedRotAggregator):
        self.folder, self.resume = folder, resume
        self._aggregator = aggregator

    def save(self, base_updates: Sequence[State]) -> None:
        """Replace the checkpoint by the aggregator's state, whole or not at all.

        Args:
            base_updates: every change of the base weights so far.
        """
        state = self._aggregator.state_dict()
        parts: dict[str, State] = {_ADAPTER: state["reference"], _OPTIMIZER: state["server_optimizer"]}
        parts |= {f"{_BASE}{number}": update for number, update in enumerate(base_updates)}
        tensors = {f"{part}/{key}": x for part, tensors in parts.items() for key, x in tensors.items()}
        texts = {"options": json.dumps(self._describe_run()), "config": json.dumps(state["config"])}
        save_checkpoint(self.folder, tensors, state["round"], **texts)

    def restore(self, start: Update) -> list[State]:
        """Bring the aggregator to where the checkpoint left it; leave it as it is if there is none.

        Args:
            start: the whole adapter that the run started from.

        Returns:
            Every change of the base weights so far.

        Raises:
            FileExistsError: there is a checkpoint, and the run is not to be resumed.
            ValueError: the checkpoint is of fedrot 0.1 or of a run with other options, or clients have factors of their own.
            UpdateError: the checkpoint is of another adapter.
        """
        if not self.resume:
            self.check_new_run()
            return []
        metadata = read_metadata(self.folder)
        if not metadata:
            _log.info("no checkpoint in %s: starting anew", self.folder)
            return []
        self._check_run(json.loads(metadata.get("options", "{}")))
        tensors, rounds_done = load_checkpoint(self.folder)
        parts: dict[str, State] = {_ADAPTER: {}, _OPTIMIZER: {}}
        for full, x in (tensors or {}).items():
            part, key = full.split("/", 1)
            parts.setdefault(part, {})[key] = x
        base_updates = [parts[f"{_BASE}{number}"] for number in range(len(parts) - 2)]
        self._check_adapter(parts[_ADAPTER], start, changed_base=bool(base_updates))
        self._aggregator.load_state_dict(
            {
                "round": rounds_done,
                "reference": parts[_ADAPTER],
                "config": json.loads(metadata["config"]),
                "server_optimizer": parts[_OPTIMIZER],
            }
        )
        _log.info("resuming after round %d; Flower counts the rounds that are left", rounds_done)
        return base_updates

    def check_new_run(self) -> None:
        """Check that a run may begin without ``restore``.

        Raises:
            ValueError: the run is to be resumed.
            FileExistsError: there is a checkpoint, which the run would overwrite.
        """
        if self.resume:
            raise ValueError("resume works through FedRot.start, which a strategy that wraps this one does not call")
        if rounds_done := read_metadata(self.folder).get("rounds_done"):
            raise FileExistsError(
                f"{self.folder} has a checkpoint, of round {rounds_done}; go on from it with resume=True, or name another "
                "folder"
            )

    def _describe_run(self) -> dict[str, Any]:
        """List the options with which a checkpoint must be resumed."""
        method, optimizer = self._aggregator.method, self._aggregator.server_optimizer
        options = {name: getattr(self._aggregator.options, name) for name in _OPTIONS} | {"strength": method.strength}
        return options | {"server_optimizer": optimizer and [optimizer.name, optimizer.lr, optimizer.beta]}

    def _check_run(self, saved: dict[str, Any]) -> None:
        """Raise ValueError unless a run with the saved options can go on with this one's."""
        if any(name in saved for name in _OLD_OPTIONS):
            raise ValueError(
                f"{self.folder} has a checkpoint of fedrot 0.1, whose options were others; finish that run with fedrot 0.1, "
                "or start another in a folder of its own"
            )
        options = self._describe_run()
        if changed := [f"{name} {saved.get(name)}" for name in options if saved.get(name) != options[name]]:
            raise ValueError(f"{self.folder} was run with {', '.join(changed)}; resume it as it was, or start another run")
        if find_personal_factors(self._aggregator.method):
            raise ValueError(f"{saved['method']} cannot resume: clients' own factors end with Flower's run")

    def _check_adapter(self, saved: State, start: Update, *, changed_base: bool) -> None:
        tensors = {key: x.to(start.device) for key, x in saved.items()}
        adapter = open_update(tensors, f"the checkpoint in {self.folder}", start, start.config)
        # Base weights that the method changes are not part of its adapter.
        expected = complete_adapter(adapter, start, self._aggregator.method) if changed_base else start
        check_update(adapter, expected, Layout(expected.specs, expected.name))


def make_checkpoint(folder: str | os.PathLike[str] | None, resume: bool, aggregator: FedRotAggregator) -> Checkpoint | None:
    """Make a run's checkpoint, if it has a folder for one.

    Raises:
        ValueError: a run that is to be resumed from nowhere.
    """
    if resume and folder is None:
        raise ValueError("resume needs checkpoint, the folder of the run to go on with")
    return None if folder is None else Checkpoint(Path(folder), resume, aggregator)


def shift_evaluation(evaluate: Evaluate, rounds_done: int) -> Evaluate:
    """Make a server's evaluation count the rounds before a restart, without evaluating the checkpoint's round again."""

    def shifted(round: int, arrays: ArrayRecord) -> MetricRecord | None:
        return None if rounds_done and round == 0 else evaluate(rounds_done + round, arrays)

    return shifted


def shift_rounds(result: Result, rounds_done: int) -> None:
    """Make the metrics of a run, in place, count the rounds before a restart."""
    for field in ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp"):
        setattr(result, field, {rounds_done + round: metrics for round, metrics in getattr(result, field).items()})
