"""Running the parts of a long benchmark in processes of their own, each with a time limit."""

import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from .record import ROOT


@dataclass(frozen=True)
class Finished:
    """How a part ended: its exit status (negative: the signal that ended it) and the last lines that it printed."""

    status: int
    timed_out: bool
    seconds: float
    last_lines: list[str]


def say(text: str) -> None:
    """Print with the time, at once."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def portable(text: str) -> str:
    """Paths within the checkout, which may lie anywhere, relative to it."""
    return text.replace(f"{ROOT}/", "")


def run_part(name: str, command: Sequence[str], limit: float, **environment: str) -> Finished:
    """Run a command from the checkout's root, its output passed on with the time, for at most ``limit`` seconds."""
    say(f"{name}: {' '.join(command)} (at most {limit:.0f} s)")
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    variables.pop("TRITON_INTERPRET", None)  # interpreted kernels are not what runs on a GPU
    lines: deque[str] = deque(maxlen=200)
    start, timed_out = time.monotonic(), threading.Event()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that what the part has started ends with it
    )

    def stop() -> None:
        timed_out.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, stop)
    timer.start()
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            lines.append(portable(line.rstrip()))
            say(f"{name}: {lines[-1]}")
    status = process.wait()
    timer.cancel()
    seconds = time.monotonic() - start
    say(f"{name}: {'timed out' if timed_out.is_set() else f'exit status {status}'} after {seconds:.0f} s")
    return Finished(status, timed_out.is_set(), seconds, list(lines))
