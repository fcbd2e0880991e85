"""The aggregator in NVFlare's jobs: written into a job's configuration, and run by NVFlare's simulator."""

import json

import pytest
import torch
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.app_opt.pt.file_model_persistor import PTFileModelPersistor
from nvflare.client.config import ExchangeFormat
from nvflare.fuel.utils.component_builder import ComponentBuilder
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import ScriptRunner
from safetensors.torch import load_file, save_file

import fedrot
from fedrot.nvflare import FedRotModelAggregator
from fedrot.options import OF_UNEQUAL_RANKS, OPTION_NAMES

from ..peft_models import KINDS, turned_clients
from ..refusals import B
from .rounds import SITES, STEPS, contiguous, equal

# A client whose training adds the change that a file holds for this site and round, and that keeps what it sends.
CLIENT = """
import sys
from pathlib import Path

import nvflare.client as flare
from nvflare.app_common.abstract.fl_model import FLModel
from safetensors.torch import load_file, save_file

folder, steps = Path(sys.argv[1]), {"site-1": 3, "site-2": 1, "site-10": 2}
flare.init()
site = flare.get_site_name()
while flare.is_running():
    received = flare.receive()
    changes = load_file(folder / f"{site}-{received.current_round}.safetensors")
    params = {key: received.params[key] + change for key, change in changes.items()}
    save_file(params, folder / f"{site}-{received.current_round}-sent.safetensors")
    meta = {"NUM_STEPS_CURRENT_ROUND": steps[site]}
    flare.send(FLModel(params=params, metrics={"loss": float(steps[site])}, meta=meta))
"""


def test_simulator(tmp_path, monkeypatch):
    # bfloat16, a server optimizer, and in the second round a client that sends NaN: FedAvg ends with the adapter of
    # FedRotAggregator, to the bit.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    start, turned = turned_clients(KINDS["bfloat16"], 3)
    torch.save(contiguous(start), tmp_path / "start.pt")
    for site, client in zip(SITES, turned, strict=True):
        for round, size in enumerate((1.0, 0.1)):
            changes = {key: (client[key] - x) * size for key, x in start.items()}
            if (site, round) == ("site-2", 1):
                changes[B][0] = torch.nan
            save_file(contiguous(changes), tmp_path / f"{site}-{round}.safetensors")
    (tmp_path / "client.py").write_text(CLIENT)

    def options():
        optimizer = fedrot.ServerOptimizer("momentum", 0.5)
        return {"align_on": "joint", "strength": 1.0, "reflections": True, "backend": "torch", "server_optimizer": optimizer}

    job = FedJob("fedrot")
    job.set_app_packages(["fedrot"])
    persistor = PTFileModelPersistor(source_ckpt_file_full_name=str(tmp_path / "start.pt"), allow_numpy_conversion=False)
    job.to_server(persistor, id="persistor")
    job.to_server(FedAvg(num_clients=3, num_rounds=2, aggregator=FedRotModelAggregator(**options())))
    script = ScriptRunner(str(tmp_path / "client.py"), str(tmp_path), server_expected_format=ExchangeFormat.PYTORCH)
    for site in SITES:
        job.to(script, site)
    assert job.simulator_run(str(tmp_path / "workspace"), threads=3) == 0

    server = tmp_path / "workspace" / "server"
    saved = torch.load(server / "simulate_job" / "app_server" / "FL_global_model.pt")
    by_hand = fedrot.FedRotAggregator(contiguous(start), on_invalid="drop", **options())
    for round in range(2):
        sent = [load_file(tmp_path / f"{site}-{round}-sent.safetensors") for site in SITES]
        result = by_hand.aggregate(sent, STEPS, names=SITES)
    assert equal(dict(saved["model"]), result.state_dict)
    assert saved["meta_props"]["nr_aggregated"] == 2
    log = (server / "log.txt").read_text()
    assert f"round 2 (current_round 1): dropped site-2: site-2, {B} (16, 4) holds NaN or Inf" in log
    report = result.report
    errors = f"aggregation_error {report.error:.4g}, relative_error {report.relative_error:.4g}"
    errors += f", plain_relative_error {report.plain_relative_error:.4g}"
    assert f"round 2 (current_round 1): loss 2.6, {errors}, rotation_angle {report.angle:.4g}, clients 2, dropped 1" in log


# Another value than the default, for every option but those of unequal ranks, which FLARE's clients do not have.
OTHERS = {
    "method": "fedrot-consensus",
    "align_on": "B",
    "strength": 0.25,
    "reflections": True,
    "on_invalid": "raise",
    "backend": "torch",
    "report_error": False,
    "seed": 7,
    "robust": "multi-krum",
    "byzantine": 1,
    "clip": 0.5,
}


class Builder(ComponentBuilder):
    """Builds components as NVFlare's server does from a job's configuration."""

    def get_module_scanner(self):
        raise NotImplementedError  # for classes without a path


@pytest.mark.parametrize("options", [{}, OTHERS], ids=["defaults", "others"])
def test_a_job_has_every_option(options, tmp_path):
    assert OTHERS.keys() == set(OPTION_NAMES) - set(OF_UNEQUAL_RANKS)
    given = FedRotModelAggregator(fedrot.ServerOptimizer("momentum", 0.5), "examples", **options)
    job = FedJob("fedrot")
    job.set_app_packages(["fedrot"])
    job.to_server(FedAvg(num_clients=1, num_rounds=1, aggregator=given))
    job.export_job(str(tmp_path))
    (file,) = tmp_path.rglob("config_fed_server.json")
    (workflow,) = json.loads(file.read_text())["workflows"]
    built = Builder().build_component(workflow["args"]["aggregator"])
    assert vars(built).keys() == vars(given).keys()
    expected = fedrot.AggregationOptions(**{"on_invalid": "drop"} | options)
    assert {name: getattr(built, name) for name in OPTION_NAMES} == expected.as_dict()
    assert built._aggregator.options == given._aggregator.options == expected
    assert (built.server_optimizer.name, built.server_optimizer.lr, built.weighted_by) == ("momentum", 0.5, "examples")
