"""A federation on loopback for tests: a SuperLink and its SuperNodes, started and submitted to by Flower's own commands."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

_ENVIRONMENT = {
    # Flower starts its own commands by name.
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",  # instead of a second, before every start of an app
    "OMP_NUM_THREADS": "1",
}
_LIMIT = 900.0  # seconds to wait for anything, on a machine that has much else to do


class Command:
    """A running command, in a process group of its own, that writes to a log.

    Attributes:
        process: it.
        log: its output, and that of what it started.
    """

    def __init__(self, arguments: list[str], log: Path, environment: dict[str, str]):
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                arguments, cwd=log.parent, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def text(self) -> str:
        """The log so far."""
        return self.log.read_text("utf-8", "replace")

    def wait_for(self, text: str) -> None:
        """Wait until the log holds a text."""
        deadline = time.monotonic() + _LIMIT
        while True:
            ended = self.process.poll() is not None
            if text in (log := self.text()):
                return
            assert not ended, f"{self.log.name} ended without {text!r}:\n{log}"
            assert time.monotonic() < deadline, f"{self.log.name} has no {text!r} after {_LIMIT:.0f} s:\n{log}"
            time.sleep(0.05)

    def finish(self) -> str:
        """Wait until the command ends well, and return its log."""
        status = self.process.wait(_LIMIT)
        # ``flwr run`` itself ends well whatever becomes of the run.
        assert status == 0 and "ServerApp raised an exception" not in self.text(), self.text()
        return self.text()

    def kill(self) -> None:
        """End the command and its process group at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Federation:
    """A SuperLink and its SuperNodes.

    Attributes:
        nodes: the SuperNodes; their logs hold what ClientApps print, too.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.nodes: list[Command] = []
        self._commands: list[Command] = []
        self._environment = os.environ | _ENVIRONMENT | {"FLWR_HOME": str(folder)}

    def start(self, nodes: int) -> None:
        """Start so many nodes, and return when the SuperLink knows them."""
        port, *ports = free_ports(1 + nodes)
        address = f"127.0.0.1:{port}"
        (self.folder / "config.toml").write_text(f'[superlink.loopback]\naddress = "{address}"\ninsecure = true\n')
        # SuperNodes install nothing unless they are told to.
        self._start(
            "superlink", "flower-superlink", "--insecure", "--port", port, "--disable-runtime-dependency-installation"
        )
        for number, port in enumerate(ports):
            own = f"partition-id={number} num-partitions={nodes}"
            options = ["--insecure", "--superlink", address, "--port", port, "--node-config", own]
            self.nodes.append(self._start(f"supernode-{number}", "flower-supernode", *options))
        for node in self.nodes:
            node.wait_for("SuperNode ID")

    def run(self, app: Path, **options: str | float) -> Command:
        """Submit a run of an app, with options of its run configuration; the command ends with the run and shows its log."""
        name = f"run-{len(self._commands)}"
        overrides = self.folder / f"{name}.toml"
        overrides.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items()))
        return self._start(name, "flwr", "run", app, "loopback", "--stream", "--run-config", overrides)

    def reap(self) -> None:
        """Collect what became of the commands, all of them killed."""
        for command in self._commands:
            command.process.wait(_LIMIT)

    def _start(self, name: str, *arguments: object) -> Command:
        command = Command([str(a) for a in arguments], self.folder / f"{name}.log", self._environment)
        self._commands.append(command)
        return command


@contextlib.contextmanager
def federation(folder: Path, nodes: int, kind: type[Federation] = Federation) -> Iterator[Federation]:
    """A federation whose files are all in a folder of its own. Nothing of it outlives the context, nor a killed test."""
    # A process apart, which acts when its input ends: that happens whatever becomes of this one.
    killer = subprocess.Popen([sys.executable, __file__, str(folder)], stdin=subprocess.PIPE, start_new_session=True)
    started = kind(folder)
    try:
        started.start(nodes)
        yield started
    finally:
        killer.communicate()
        started.reap()


def _kill_all(folder: str) -> None:
    """Kill every process of a federation, known by its environment: what SuperLinks start is in no group of theirs."""
    while found := [p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get("FLWR_HOME") == folder]:
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, timeout=1)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


if __name__ == "__main__":
    sys.stdin.read()
    _kill_all(sys.argv[1])
