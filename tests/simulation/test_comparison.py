"""What a comparison runs: methods, strengths, starts, seeds and what varies, said in layers, by runs that share a task."""

import dataclasses

import pytest

from fedrot.methods.registry import METHODS
from fedrot.simulation import SimulationConfig
from fedrot.simulation.parser import make_parser
from fedrot.simulation.sweep.comparison import Comparison
from fedrot.simulation.sweep.layers import overlay, split_options, without
from fedrot.simulation.sweep.shared_tasks import NOT_OF_THE_TASK, by_task, task_fields


def names(**options):
    return [run.name for run in Comparison(**options).runs()[0]]


def test_what_is_compared_unless_told_otherwise():
    args = make_parser("compare").parse_args([])
    assert args.methods == ["fedit", "fedrot"]
    assert names(methods=args.methods, strengths=args.strengths, starts=args.starts, seeds=args.seeds) == names() == [
        f"{start}-{method}-seed{seed}"
        for start in ("shared", "independent")
        for method, seed in [("fedit", 0), ("fedit", 1), ("fedit", 2)]
        + [(f"fedrot-{strength}", seed) for seed in range(3) for strength in ("0.5", "1")]
    ]  # fmt: skip


def test_a_run_of_every_value_with_what_is_the_methods_own():
    runs, _ = Comparison(
        {"rounds": 3, "lora": {"r": 4, "lora_alpha": 8}},
        methods=["fedit", "fedrot"],
        strengths=[1],
        starts=["shared"],
        seeds=[7],
        vary={"clients": [3, 5], "align_on": ["A", "joint"]},
        per_method={"fedrot": {"lr": 1, "lora.lora_alpha": 2}},
    ).runs()
    assert [run.name for run in runs] == [
        f"shared-{name}-seed7"
        for n in (3, 5)
        # Which factor is aligned plays no part in a plain average: once is enough.
        for name in (f"fedit-clients={n}", f"fedrot-1-clients={n}-align_on=A", f"fedrot-1-clients={n}-align_on=joint")
    ]
    assert [run.config.clients for run in runs] == [3, 3, 3, 5, 5, 5]
    assert [run.config.align_on for run in runs] == ["alternate", "A", "joint"] * 2
    assert [run.config.lr for run in runs] == [0.01, 1.0, 1.0] * 2
    assert [run.config.lora["lora_alpha"] for run in runs] == [8, 2, 2] * 2
    assert all((run.config.rounds, run.config.seed, run.config.lora["r"]) == (3, 7, 4) for run in runs)


def test_a_method_has_its_own_values_of_what_is_varied():
    runs, _ = Comparison(
        methods=["fedit", "rolora"],
        starts=["shared"],
        seeds=[7],
        vary={"clients": [3, 5], "lr": [0.005, 0.02]},
        per_method={"rolora": {"lr": ["5e-4", 0.001]}, "fedrot": {"momentum": 0.5}},
        variants={"in turn": {"method": "rolora", "momentum": 0.25}, "O": {"reflections": True}},
    ).runs()
    found = {run.name: run.config for run in runs}
    rates = {"fedit": (0.005, 0.02), "rolora": (0.0005, 0.001), "in_turn": (0.0005, 0.001), "O": (0.005, 0.02)}
    assert {name: (c.clients, c.lr) for name, c in found.items()} == {
        f"shared-{name}-clients={n}-lr={rate}-seed7": (n, rate)
        for name, some in rates.items()
        for n in (3, 5)
        for rate in some
    }
    assert {run.columns["lr"] for run in runs if run.columns["method"] == "rolora"} == {0.0005, 0.001}
    assert {config.momentum for name, config in found.items() if "in_turn" in name} == {0.25}


def test_alpha_follows_the_rank_by_a_scaling():
    runs, _ = Comparison({"lora_scaling": "2"}, methods=["fedit"], starts=["shared"], vary={"lora.r": [2, 24]}).runs()
    assert {(run.config.lora["r"], run.config.lora["lora_alpha"]) for run in runs} == {(2, 4), (24, 48)}
    assert {frozenset(run.columns) for run in runs} == {frozenset({"start", "method", "seed", "strength", "lora.r"})}
    config = SimulationConfig(lora={"target_modules": ["q_proj"]}, lora_scaling=0.5)
    assert config.lora == {"target_modules": ["q_proj"], "lora_alpha": 4.0}  # PEFT's rank is 8
    assert SimulationConfig(**dataclasses.asdict(config)) == config
    given = {"lora": {"r": 4}, "lora_scaling": 2.0}
    assert without(given, ["lora.lora_alpha"]) == {"lora": {"r": 4}} and without(given, ["lora.r"])["lora_scaling"] == 2.0
    own = {"lora": {"r": 4, "lora_alpha": 16}}
    assert overlay(given, own) == own and overlay(given, own | {"lora_scaling": 3.0}) == own | {"lora_scaling": 3.0}
    with pytest.raises(ValueError, match=r"lora\.r must be a whole number, got 'x'"):
        SimulationConfig(lora={"r": "x"}, lora_scaling=2)


@pytest.mark.parametrize(
    ("method", "vary", "per_value", "strengths"),
    [
        ("fedit", {"align_on": ["A", "joint"], "reflections": [False, True]}, 1, {None}),
        ("fedrot", {"align_on": ["A", "joint"], "reflections": [False, True]}, 4, {0.5, 1.0}),
        ("fedrot-consensus", {"align_on": ["A", "joint"]}, 2, {0.5, 1.0}),
        ("fedrot-least-error", {"align_on": ["A", "joint"]}, 1, {0.5, 1.0}),
        ("fedrot-adaptive", {"align_on": ["A", "joint"]}, 2, {None}),
        ("random-rotation", {"align_on": ["A", "joint"], "reflections": [False, True]}, 2, {0.5, 1.0}),
        ("scalar", {"align_on": ["A", "joint"], "reflections": [False, True]}, 2, {None}),
        ("flora", {"clients": [3, 5], "reflections": [False, True]}, 2, {None}),
    ],
)
def test_a_method_is_run_once_for_options_that_it_does_not_use(method, vary, per_value, strengths):
    runs, _ = Comparison(methods=[method], strengths=[0.5, 1.0], starts=["shared"], seeds=[0], vary=vary).runs()
    assert len(runs) == per_value * len(strengths) and {run.config.strength for run in runs} == strengths
    used = {name for name in vary if name in METHODS[method].uses | {"clients"}}
    assert {frozenset(run.columns) - {"start", "method", "seed", "strength"} for run in runs} == {frozenset(used)}


def test_all_methods():
    runs, notes = Comparison(methods=list(METHODS), seeds=[0], strengths=[0.5]).runs()
    needing = [name for name, kind in METHODS.items() if kind.needs_shared_start]
    assert len(runs) == 2 * len(METHODS) - len(needing)
    assert [note.split()[0] for note in notes] == needing


def test_what_is_said_later_replaces_what_was_said_before():
    lower = {"clients": 3, "lr": 1, "vary": {"lora.r": [2, 4]}, "per_method": {"rolora": {"lr": 2, "momentum": 3}}}
    assert overlay(lower, {"vary": {"clients": [5, 6]}}) == {
        "lr": 1,
        "vary": {"lora.r": [2, 4], "clients": [5, 6]},
        "per_method": {"rolora": {"lr": 2, "momentum": 3}},
    }
    assert overlay(lower, {"lr": 9, "lora": {"r": 8}}) == {
        "clients": 3,
        "lr": 9,
        "lora": {"r": 8},
        "per_method": {"rolora": {"momentum": 3}},
    }
    assert overlay(lower, {"per_method": {"rolora": {"lr": 5}}})["per_method"] == {"rolora": {"lr": 5, "momentum": 3}}
    assert without({"lora": {"r": 4, "lora_alpha": 8}, "vary": {"lora.r": [2]}}, ["lora.r"]) == {"lora": {"lora_alpha": 8}}
    assert overlay({"seeds": [1, 2]}, {"seed": 3}) == {"seeds": [3]}
    assert overlay({}, {"seed": 3, "seeds": [4, 5]}) == {"seeds": [4, 5]}
    assert overlay({"strengths": [0.5]}, {"strength": None, "method": "fedit"}) == {"strengths": [0.5], "methods": ["fedit"]}
    with pytest.raises(ValueError, match="clients is both set and varied"):
        overlay({}, {"clients": 3, "vary": {"clients": [3, 4]}})


def test_options_of_the_command_line():
    argv = ["--preset", "p", "--vary.lora.r", "2", "4", "--vary.lr=[1e-3,2]", "--per_method.ffa_lora.lr", "0.5"]
    argv += ["--seeds", "1", "2", "--lora.r", "3"]
    assert split_options(argv) == (
        {"preset": "p", "vary": {"lora.r": [2, 4], "lr": [0.001, 2]}, "per_method": {"ffa-lora": {"lr": 0.5}}},
        ["--seeds", "1", "2", "--lora.r", "3"],
        ["seeds", "lora.r"],
    )


def test_runs_share_data_and_model_where_they_can():
    fields = {f.name for f in dataclasses.fields(SimulationConfig)}
    assert fields >= NOT_OF_THE_TASK
    assert not NOT_OF_THE_TASK & {
        "model",
        "dataset",
        "max_length",
        "max_train_examples",
        "test_fraction",
        "partition_column",
    }
    runs, _ = Comparison(methods=["fedit"], vary={"clients": [3, 5], "max_length": [8, 9]}, seeds=[0]).runs()
    ordered = by_task(runs)
    assert [run.config.max_length for run in ordered] == [8, 8, 8, 8, 9, 9, 9, 9]
    assert len({task_fields(run.config) for run in ordered}) == 2
    assert sorted(run.name for run in ordered) == sorted(run.name for run in runs)
