"""Values of wrong types: refused by field and value, wherever a configuration comes from."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from fedrot.simulation import SimulationConfig, simulate
from fedrot.simulation.clients import _lora_config
from fedrot.simulation.sweep.comparison import Comparison

from .test_run import QUICK

FIELDS = [field.name for field in dataclasses.fields(SimulationConfig)]


class Foreign:
    """A value that no field takes."""

    def __repr__(self):
        return "<foreign>"


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_takes_a_foreign_object(name):
    with pytest.raises(ValueError, match=rf"{name}\b.*<foreign>"):
        SimulationConfig(**{name: Foreign()})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "x"}, "lr must be a number, got 'x'"),
        ({"lr": None}, "lr must be a number, got None"),
        ({"lr": True}, "lr must be a number, got True"),
        ({"rounds": 2.5}, "rounds must be a whole number, got 2.5"),
        ({"rounds": "3"}, "rounds must be a whole number, got '3'"),
        ({"clients_per_round": "3"}, "clients_per_round must be a whole number or left out, got '3'"),
        ({"clients_per_pass": "all"}, "clients_per_pass must be a whole number or auto or left out, got 'all'"),
        ({"optimizer": "adam"}, "optimizer must be one of sgd, adamw, got 'adam'"),
        ({"partition": "class"}, "partition must be one of dirichlet, iid, column or left out, got 'class'"),
        ({"geometry": 1}, "geometry must be true or false, got 1"),
        ({"lora": ["r", 4]}, r"lora must be a mapping, got \['r', 4\]"),
        ({"text_column": ["text"]}, r"text_column must be text or left out, got \['text'\]"),
    ],
)
def test_a_value_of_a_wrong_type_is_named_with_its_field(options, message):
    with pytest.raises(ValueError, match=message):
        SimulationConfig(**options)


def test_what_is_as_good_as_the_type_is_taken_and_can_be_saved(tmp_path):
    config = SimulationConfig(lr=np.float32(0.5), rounds=np.int64(2), model=Path("m"), dataset=Path("d.csv"), momentum=0)
    config.save(tmp_path / "config.yaml")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert [saved[name] for name in ("lr", "rounds", "model", "dataset")] == [0.5, 2, "m", "d.csv"]
    assert SimulationConfig(**saved) == config


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"r": "x"}, r"lora\.r must be a whole number, got 'x'"),
        ({"r": 2.5}, r"lora\.r must be a whole number, got 2\.5"),
        ({"lora_dropout": "a"}, r"lora\.lora_dropout must be a number, got 'a'"),
        ({"target_modules": ["q_proj", 3]}, r"lora\.target_modules must be a list or text or left out, got \['q_proj', 3\]"),
        ({"task_type": "X"}, "lora: Invalid task type: 'X'"),
    ],
)
def test_options_of_lora_have_types_too(task, tmp_path, lora, message):
    with pytest.raises(ValueError, match=message):
        simulate(SimulationConfig(**QUICK, lora=lora), tmp_path / "run", task=task, progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "lora",
    [{"r": 2, "lora_alpha": 2.5}, {"r": 2, "init_lora_weights": "gaussian"}, {"r": 2, "target_modules": {"fc1"}}],
)
def test_what_peft_takes_is_taken(task, tmp_path, lora):
    simulate(SimulationConfig(**QUICK | {"rounds": 1}, lora=lora), tmp_path / "run", task=task, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": "fedit"}, "methods must be a list, got 'fedit'"),
        ({"methods": [1]}, "methods must be names, got 1"),
        ({"seeds": 0}, "seeds must be a list, got 0"),
        ({"strengths": 0.5}, r"strengths must be a list, got 0\.5"),
        ({"vary": ["clients"]}, r"vary must be a mapping, got \['clients'\]"),
        ({"per_method": {"fedit": 3}}, r"per_method\.fedit must map fields to values, got 3"),
        ({"variants": "both"}, "variants must be a mapping, got 'both'"),
        ({"fields": {"lr": "x"}}, "lr.*'?x'?"),
        ({"vary": {"lr": [0.1, "x"]}}, "lr.*'?x'?"),
    ],
)
def test_a_comparison_names_wrong_types_too(options, message):
    with pytest.raises(ValueError, match=message):
        Comparison(**options).runs()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("datasets", "fedrot.simulation needs datasets: pip install 'fedrot[simulate]'"),
        ("peft", "fedrot.simulation needs peft: pip install 'fedrot[simulate]'"),
        ("fedrot.methods.registry", "No module named"),
    ],
)
def test_a_missing_extra_is_named(missing, message):
    program = f"""
import sys
class Missing:
    def find_spec(self, name, *rest):
        if name == {missing!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Missing())
try:
    import fedrot.simulation
except ModuleNotFoundError as error:
    assert error.name == {missing!r}, error.name
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert message in done.stdout and ("pip install" in message or "pip install" not in done.stdout)


def test_a_name_of_an_initialisation_that_holds_a_number_has_the_right_type():
    assert _lora_config({"r": 2, "init_lora_weights": "pissa_niter_4"}).init_lora_weights == "pissa_niter_4"
