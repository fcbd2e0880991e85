"""Running code that a model wrote: in a process of its own, with limits.

The limits keep a careless program from taking the machine along. They are no wall against a malicious one, which could
read files and use the network with the user's permissions: run evaluations in a container if that matters.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS, MEMORY = 10, 1 << 30
# No ordinary end of a program: one that leaves early, with status 0, has not passed.
_PASSED = 87
_LAUNCHER = f"""
import os, resource, sys
seconds, memory = int(sys.argv[2]), int(sys.argv[3])
limits = [("CPU", seconds), ("AS", memory), ("FSIZE", 1 << 20), ("CORE", 0), ("NOFILE", 64), ("NPROC", 0)]
for name, limit in limits:
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
with open(sys.argv[1], encoding="utf-8") as file:
    source = file.read()
exec(compile(source, "generated.py", "exec"), {{"__name__": "__main__"}})
os._exit({_PASSED})
"""


def passes(source: str, seconds: int = SECONDS, memory: int = MEMORY) -> bool:
    """Whether a Python program runs to its end without an error.

    It runs isolated (``python -I``), in an empty folder that is removed, without environment, input or output, and without
    subprocesses unless the user is root; at the limit of time or memory it has failed.

    Args:
        source: of the program.
        seconds: of CPU time, and of wall time.
        memory: bytes of address space.

    Raises:
        ValueError: on a system without resource limits.
    """
    if os.name != "posix":
        raise ValueError("generated code runs only where its time and memory can be limited (POSIX); leave pass_at_1 out")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        work.mkdir()
        program = Path(folder) / "generated.py"
        program.write_text(source, "utf-8", errors="replace")
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _LAUNCHER, str(program), str(seconds), str(memory)],
            cwd=work,
            env={},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=seconds) == _PASSED
        except subprocess.TimeoutExpired:
            return False
        finally:  # with whatever it started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
