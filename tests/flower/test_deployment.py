"""A real deployment on loopback: a SuperLink, three SuperNodes, and runs of the template app submitted with ``flwr run``."""

import shutil

import pytest

from fedrot.simulation import SimulationConfig

from .app_runs import APP, config_of
from .deployment import federation
from .test_example import QUICK, check_against_simulator, in_both_precisions, rows

pytestmark = pytest.mark.slow

# It sends back what it was sent, at once; but client 2 is never done with round 2. A process of its own starts for every
# message: without Torch and Transformers that takes a second, not six.
IDLE_CLIENT = """
import time

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    client, round = context.node_config["partition-id"], message.content["config"]["server-round"]
    print(f"client {client} trains in round {round}", flush=True)
    if (client, round) == (2, 2):
        time.sleep(3600)
    records = {
        "arrays": message.content["arrays"],
        "metrics": MetricRecord({"num-examples": 1 + client, "train-loss": client}),
        "client": ConfigRecord({"name": f"client {client}"}),
    }
    return Message(RecordDict(records), reply_to=message)
"""


@pytest.fixture(scope="module")
def tasks():
    """The digits in float32 and float64; also puts the pretrained model into the cache, where the nodes find it."""
    return in_both_precisions(SimulationConfig(**QUICK))


@pytest.fixture(scope="module")
def deployed(tasks, tmp_path_factory):
    with federation(tmp_path_factory.mktemp("federation"), 3) as started:
        yield started


def test_a_deployed_run_ends_with_the_simulators_adapter(tasks, deployed, tmp_path):
    log = deployed.run(APP, output=str(tmp_path / "run"), **QUICK).finish()
    assert "2 of 2: accuracy 0." in log and "3 clients, 0 dropped" in log
    check_against_simulator(tmp_path / "run", config_of(3, **QUICK), tasks, tmp_path)


# The last one: it leaves a federation of two.
def test_a_round_completes_without_the_supernode_that_is_killed_in_it(deployed, tmp_path):
    app = tmp_path / "app"
    shutil.copytree(APP, app)
    (app / "fedrot_flower_app/client_app.py").write_text(IDLE_CLIENT)
    # Flower itself takes up to a minute to notice that a node is gone.
    run = deployed.run(app, output=str(tmp_path / "run"), round_timeout=25.0, **QUICK)
    deployed.nodes[2].wait_for("client 2 trains in round 2")
    deployed.nodes[2].kill()
    assert "round 2: dropped client 2: no reply in time" in run.finish()
    first, second = rows(tmp_path / "run")
    assert first["clients"] == ["client 0", "client 1", "client 2"] and first["dropped"] == {}
    assert second["clients"] == ["client 0", "client 1"] and second["dropped"] == {"client 2": "no reply in time"}
    assert [first["train_loss"], second["train_loss"]] == pytest.approx([(2 + 2 * 3) / 6, 2 / 3])
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()
