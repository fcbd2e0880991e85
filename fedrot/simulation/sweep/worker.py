"""One process of a comparison: it takes the names of runs from a pipe and tells what becomes of them."""

import logging
import signal
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

import torch

from ..quiet import quiet_libraries
from ..run import simulate
from ..tasks import Task
from ..training.memory import share_memory
from .comparison import Run
from .shared_tasks import load_run_task, task_fields

ERRORS: Mapping[str, type[Exception]] = {"value": ValueError, "system": OSError, "failure": RuntimeError}
"""The kinds of messages that tell of an error, and what is raised in the parent. Other kinds are log, round, done and
stopped."""

_LOG = __name__.rsplit(".", 2)[0]  # the simulator's


@dataclass(frozen=True)
class Assignment:
    """What a process needs to know beside the names of its runs.

    Attributes:
        runs: all runs of the comparison.
        folder: the comparison's folder.
        saved: what ``saved_models`` returned.
        threads: the number of threads for PyTorch.
        processes: the number of processes that share the memory.
    """

    runs: list[Run]
    folder: Path
    saved: dict[str, Path]
    threads: int
    processes: int


class _StoppedError(Exception):
    """The parent asked to end after a round."""


class _ToParent(logging.Handler):
    """Sends log messages through the pipe, for the parent to log."""

    def __init__(self, connection: Connection):
        super().__init__()
        self.connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        """See ``logging.Handler.emit``."""
        self.connection.send(("log", (record.name, record.levelno, record.getMessage())))


def work(connection: Connection, assignment: Assignment) -> None:
    """Run what the parent names, until it says None or has ended.

    Args:
        connection: names of runs come in, pairs of a kind and its content go out.
        assignment: what is the same for all runs.
    """
    signal.signal(signal.SIGTERM, _exit)
    torch.set_num_threads(assignment.threads)
    share_memory(assignment.processes)
    quiet_libraries()
    log = logging.getLogger(_LOG)
    log.addHandler(_ToParent(connection))
    log.setLevel(logging.INFO)
    by_name = {run.name: run for run in assignment.runs}
    loaded: tuple[str, Task] | None = None
    try:
        while (name := connection.recv()) is not None:
            try:
                loaded = _load(by_name[name], loaded, assignment)
                _simulate(by_name[name], loaded[1], connection, assignment.folder)
                connection.send(("done", None))
            except _StoppedError:
                connection.send(("stopped", None))
                return
            except BrokenPipeError:
                raise
            except ValueError as error:
                connection.send(("value", str(error)))
            except OSError as error:
                connection.send(("system", str(error)))
            except (
                Exception
            ):  # of any class, which may not travel between processes: the parent raises it with the run's name
                connection.send(("failure", "\n" + traceback.format_exc()))
    except (EOFError, ConnectionError):
        pass  # the parent has ended


def _load(run: Run, loaded: tuple[str, Task] | None, assignment: Assignment) -> tuple[str, Task]:
    """Keep the task that is loaded if it is the run's, or load the run's."""
    fields = task_fields(run.config)
    if loaded is not None and loaded[0] == fields:
        return loaded
    return fields, load_run_task(run, assignment.saved)


def _simulate(run: Run, task: Task, connection: Connection, folder: Path) -> None:
    def on_round(rounds_done: int) -> None:
        connection.send(("round", rounds_done))
        if rounds_done < run.config.rounds:
            check_stopped()

    def check_stopped() -> None:
        if connection.poll():  # during a run nothing but the end of all is told, or the parent has ended
            raise _StoppedError

    check_stopped()
    path = folder / run.name
    simulate(run.config, path, task=task, resume=path.exists(), progress=False, on_round=on_round)


def _exit(signum: int, _: FrameType | None) -> None:
    """End this process as a program ends, so that files that are half written are removed, and only once."""
    signal.signal(signum, signal.SIG_IGN)
    raise SystemExit(128 + signum)
