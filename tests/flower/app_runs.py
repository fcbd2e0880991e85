"""The template app in tests: runs of it in the test's own process and on Flower's simulation engine."""

import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.common.config import flatten_dict, fuse_dicts

from fedrot.simulation import SimulationConfig

from . import deployment
from .local_grid import LocalGrid

APP = Path(__file__).parents[2] / "examples" / "flower"
sys.path.insert(0, str(APP))  # as Flower does with the folder of an app


def run_config(**options: str | float) -> dict[str, Any]:
    """The app's run configuration, with options that override it; Flower refuses those that the app does not have."""
    app = tomllib.loads((APP / "pyproject.toml").read_text("utf-8"))["tool"]["flwr"]["app"]
    return fuse_dicts(flatten_dict(app["config"]), options)


def config_of(nodes: int, **options: str | float) -> SimulationConfig:
    """What the app makes of its run configuration."""
    from fedrot_flower_app.task import configure

    return configure(run_config(**options), nodes)


class AppGrid(LocalGrid):
    """Nodes with the app's client, without an engine.

    Args:
        nodes: how many there are.
        config: the run configuration.
    """

    def __init__(self, nodes: int, config: dict[str, Any]):
        from fedrot_flower_app.client_app import app

        super().__init__(dict.fromkeys(range(nodes), app))
        for context in self.contexts.values():
            context.run_config = config


def run_locally(output: Path, nodes: int, grid: type[AppGrid] = AppGrid, **options: str | float) -> Path:
    """Run the app in this process, and return the folder of its results.

    Args:
        output: that folder.
        nodes: how many clients there are.
        grid: what takes messages to them.
        options: of the run configuration.
    """
    from fedrot_flower_app.server_app import app

    config = run_config(output=str(output), **options)
    # Another run than the clients' contexts have: server and clients share no model, as on an engine.
    app(grid(nodes, config), Context(0, 0, {}, RecordDict(), config))
    return output


class Engine(deployment.Federation):
    """A SuperLink with Flower's simulation engine, whose folder Ray has files in."""

    def start(self, nodes: int) -> None:
        """Start the SuperLink, and set how many nodes its runs have; they share one process."""
        (port,) = deployment.free_ports(1)
        self._environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(self.folder)}
        connection = f'[superlink.loopback]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        (self.folder / "config.toml").write_text(connection)
        superlink = self._start("superlink", "flower-superlink", "--insecure", "--simulation", "--port", port)
        superlink.wait_for("Application startup complete")
        size = ["--num-supernodes", nodes, "--client-resources-num-cpus", 1, "--init-args-num-cpus", 1]
        self._start("size", "flwr", "federation", "simulation-config", "@none/default", "loopback", *size).finish()


@contextmanager
def engine(nodes: int) -> Iterator[Engine]:
    """The engine with so many nodes. Nothing of it outlives the context, nor a killed test."""
    folder = Path(tempfile.mkdtemp(prefix="fedrot"))  # the names of Ray's sockets must be short
    try:
        with deployment.federation(folder, nodes, Engine) as started:
            yield started
    finally:
        shutil.rmtree(folder)
