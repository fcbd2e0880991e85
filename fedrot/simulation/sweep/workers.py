"""Runs of a comparison in several processes, which the parent hands one run at a time."""

import logging
import signal
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.resource_tracker import ensure_running
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .comparison import Run
from .worker import ERRORS, Assignment, work


@dataclass
class _Worker:
    """A process, the parent's end of its pipe, and what it runs now.

    Attributes:
        run: the run that it has, or None.
        rounds_done: the number of rounds of that run that are done, as far as the process has told.
    """

    process: BaseProcess
    connection: Connection
    run: Run | None = None
    rounds_done: int = 0


def run_in_processes(
    runs: Sequence[Run], folder: Path, saved: Mapping[str, Path], *, workers: int, progress: bool = True
) -> None:
    """Run everything in processes of its own, or what is left of it.

    Args:
        runs: all runs of a comparison, in an order in which every task is loaded once.
        folder: the comparison's folder; runs that have a folder below it are resumed.
        saved: what ``saved_models`` returned.
        workers: the number of processes. They share this process's number of PyTorch threads, and the free memory.
        progress: show one progress bar for all runs.

    Raises:
        ValueError, OSError: a run could not go on; the message names it. Other runs end after the round that they are in.
        ChildProcessError: a process ended by itself, as one that is out of memory does.
        RuntimeError: a run failed in any other way; the message has its traceback.
        KeyboardInterrupt: all processes have ended by then, and everything can be resumed.
    """
    threads = max(1, torch.get_num_threads() // workers)
    assignment = Assignment(list(runs), folder, dict(saved), threads, workers)
    started: list[_Worker] = []
    with tqdm(total=len(runs), desc=f"{workers} workers", unit="run", disable=not progress) as bar:
        try:
            started.extend(_start(assignment) for _ in range(workers))
            error = _hand_out(deque(runs), started, bar)
        except BaseException:
            for worker in started:
                worker.process.terminate()
            raise
        finally:
            for worker in started:
                worker.connection.close()
                worker.process.join()
    if error is not None:
        raise error


def _start(assignment: Assignment) -> _Worker:
    """Start a process that the terminal's interrupt does not reach, because the parent ends it."""
    context = get_context("spawn")
    own, other = context.Pipe()
    process = context.Process(target=work, args=(other, assignment), daemon=True)
    ensure_running()  # or the first start would do it, and unblock the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        other.close()
    return _Worker(process, own)


def _hand_out(waiting: deque[Run], workers: Sequence[_Worker], bar: tqdm) -> Exception | None:
    """Hand out the runs until all are done, or until one has failed and the others have stopped; return its error."""
    error: Exception | None = None
    for worker in workers:
        _hand_next(worker, waiting)
    while busy := {worker.connection: worker for worker in workers if worker.run is not None}:
        for connection in wait(list(busy)):
            assert isinstance(connection, Connection)
            worker = busy[connection]
            found = _receive(worker, bar)
            if worker.run is None and found is None:
                _hand_next(worker, waiting)
            elif found is not None and error is None:
                error = found
                waiting.clear()
                for other in workers:
                    with suppress(OSError):  # one that has ended too
                        other.connection.send(None)
        bar.set_postfix_str(", ".join(_shown(worker) for worker in workers if worker.run is not None))
    return error


def _hand_next(worker: _Worker, waiting: deque[Run]) -> None:
    if waiting:
        worker.run, worker.rounds_done = waiting.popleft(), 0
        with suppress(OSError):  # a process that has ended, which receiving from it tells
            worker.connection.send(worker.run.name)


def _receive(worker: _Worker, bar: tqdm) -> Exception | None:
    """Take one message of a worker; return the error that it tells of."""
    assert worker.run is not None
    name = worker.run.name
    try:
        kind, content = worker.connection.recv()
    except (EOFError, OSError):
        worker.run = None
        worker.process.join()
        status = worker.process.exitcode
        return ChildProcessError(f"{name}: its process ended with exit status {status}; was there too little memory?")
    if kind == "log":
        logger, level, message = content
        logging.getLogger(logger).log(level, "%s", message)
    elif kind == "round":
        worker.rounds_done = content
    else:
        worker.run = None
        bar.update(kind == "done")
        if kind in ERRORS:
            return ERRORS[kind](f"{name}: {content}")
    return None


def _shown(worker: _Worker) -> str:
    run: Any = worker.run
    return f"{run.name} {worker.rounds_done}/{run.config.rounds}"
