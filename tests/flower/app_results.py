"""What a run of the template app ended with, held to the simulator's run of the same configuration."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedrot import METHODS
from fedrot.adapters.keys import factor_of
from fedrot.simulation import SimulationConfig, Task, load_task, simulate

# Plain SGD: Adam's division by the size of a gradient turns the rounding of a small one into a step.
QUICK = {"rounds": 2, "local_steps": 3, "batch_size": 8, "optimizer": "sgd", "lr": 0.1, "max_test_examples": 100}


def in_both_precisions(config: SimulationConfig) -> tuple[Task, Task]:
    single, double = load_task(config), load_task(config)
    double.base_model.double()
    return single, double


def outcome(folder: Path, method: str = "fedrot") -> dict[str, torch.Tensor]:
    """What a run ended with, in float64: the adapter, and what the method changed in the base weights."""
    if (folder / "shared.safetensors").exists():
        found = load_file(folder / "shared.safetensors")
    elif method == "fedsa-lora":
        clients = load_file(folder / "adapters/client0/adapter_model.safetensors")
        found = {key: x for key, x in clients.items() if factor_of(key) != "B"}
    else:
        found = load_file(folder / "adapter/adapter_model.safetensors")
    found = {key: x.double() for key, x in found.items()}
    if method in ("fedmomentum", "fedsvd", "flexlora", "glora"):  # the signs of singular vectors are anybody's choice
        for key_B in [key for key in found if factor_of(key) == "B"]:
            found[key_B] = found[key_B] @ found.pop(key_B.replace("lora_B", "lora_A"))
    if METHODS[method].updates_base:
        base, folded = (load_file(folder / name / "model.safetensors") for name in ("base_model", "folded_model"))
        found |= {f"base {key}": folded[key].double() - x.double() for key, x in base.items()}
    return found


def distance(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> float:
    """‖x − y‖ / ‖y‖, Frobenius, over all tensors."""
    assert x.keys() == y.keys()
    return float(sum((x[key] - y[key]).square().sum() for key in y) / sum(y[key].square().sum() for key in y)) ** 0.5


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_against_simulator(folder: Path, config: SimulationConfig, tasks, tmp_path: Path) -> float:
    """Hold a run of the app to the simulator's own rounding, and return that."""
    single, double = (
        simulate(config, tmp_path / name, task=task, progress=False)
        for name, task in zip(("single", "double"), tasks, strict=True)
    )
    truth = outcome(double.folder, config.method)
    lost = distance(outcome(single.folder, config.method), truth)
    assert lost < 1e-4, "this schedule amplifies rounding: nothing could be said of the app"
    assert distance(outcome(folder, config.method), truth) <= 3 * lost
    assert len(single.metrics) == config.rounds
    for row, simulated in zip(rows(folder), single.metrics, strict=True):
        measures = row.keys() & simulated.keys() - {"method", "clients", "dropped"}
        assert measures >= {"loss", "train_loss", "rotation_angle"}
        for name in measures - {"accuracy"}:
            # The server knows nothing of what FedSA-LoRA's averages lose.
            given = row[name] is not None or config.method != "fedsa-lora"
            assert not given or row[name] == pytest.approx(simulated[name], rel=1e-3, abs=1e-6), name
        assert row.get("accuracy") == pytest.approx(simulated.get("accuracy"), abs=0.01)
    return lost
