"""Running code that a model wrote, in a process of its own, with limits.

The limits keep a careless program from taking up the machine. They do not hold off a malicious program, which could read
files and use the network with the user's permissions: run evaluations in a container if that matters.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS, MEMORY = 10, 1 << 30
# An exit status that programs do not end with by themselves: a program that exits early, with status 0, has not passed.
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

    The program runs isolated (``python -I``), in an empty folder that is removed, without environment, input or output, and
    without subprocesses unless the user is root. It fails at the limit of time or memory.

    Args:
        source: the program's source.
        seconds: the limit on CPU time, and on wall time.
        memory: the limit on the address space in bytes.

    Raises:
        ValueError: the system has no resource limits.
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
        finally:  # the program, and every process that it started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
