"""A real deployment on loopback: a SuperLink, three SuperNodes, and the template app submitted with ``flwr run``."""

import shutil

import pytest

from .app_results import QUICK, distance, outcome, rows
from .app_runs import APP, AppGrid, run_locally
from .deployment import federation

pytestmark = pytest.mark.slow

# The template's client, but client 2 is never done with round 2.
CLIENT = """
import time

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    if (context.node_config["partition-id"], message.content["config"]["server-round"]) == (2, 2):
        print("client 2 trains in round 2", flush=True)
        time.sleep(3600)
    from fedrot_flower_app.template_client import app as template

    return template(message, context)
"""


class WithoutOne(AppGrid):
    """Client 2 does not answer in round 2."""

    def send_and_receive(self, messages, *, timeout=None):
        gone = [node for node, context in self.contexts.items() if context.node_config["partition-id"] == 2]
        rest = [m for m in messages if (m.content["config"]["server-round"], [m.metadata.dst_node_id]) != (2, gone)]
        return super().send_and_receive(rest, timeout=timeout)


def test_a_deployed_run_is_the_local_one_and_completes_without_the_supernode_that_is_killed_in_it(tmp_path):
    local = run_locally(tmp_path / "local", 3, WithoutOne, **QUICK)  # the simulator's, as tests of the template show
    app = tmp_path / "app"
    shutil.copytree(APP, app, ignore=shutil.ignore_patterns("__pycache__", "runs"))
    modules = app / "fedrot_flower_app"
    (modules / "client_app.py").rename(modules / "template_client.py")
    (modules / "client_app.py").write_text(CLIENT)
    (tmp_path / "federation").mkdir()
    with federation(tmp_path / "federation", 3) as deployed:
        # No time decides anything: Flower takes up to a minute to notice that a node is gone.
        run = deployed.run(app, output=str(tmp_path / "run"), round_timeout=3600.0, **QUICK)
        deployed.nodes[2].wait_for("client 2 trains in round 2")
        deployed.nodes[2].kill()
        log = run.finish()
    assert "1 of 2: accuracy 0." in log and "3 clients, 0 dropped" in log
    assert "2 of 2: accuracy 0." in log and "2 clients, 1 dropped" in log
    first, second = found = rows(tmp_path / "run")
    assert first["clients"] == ["client 0", "client 1", "client 2"] and first["dropped"] == {}
    assert second["clients"] == ["client 0", "client 1"] and second["dropped"].keys() == {"client 2"}
    assert f"round 2: dropped client 2: {second['dropped']['client 2']}" in log
    expected = rows(local)
    assert expected[1]["dropped"] == {"client 2": "no reply in time"}
    for row, other in zip(found, expected, strict=True):
        measures = row.keys() - {"method", "clients", "dropped"}
        assert measures == other.keys() - {"method", "clients", "dropped"} and measures >= {"loss", "train_loss"}
        for name in measures:
            assert row[name] == pytest.approx(other[name], rel=1e-5), name
    # The same arithmetic in other processes, whose memory may be aligned otherwise.
    assert distance(outcome(tmp_path / "run"), outcome(local)) <= 1e-5
