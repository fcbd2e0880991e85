"""Attackers in a federation: accuracy by round under Flower's rules on raw factors and ours on distances of updates.

python -m benchmarks.attacks --output docs/results/attacks
"""

import argparse
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from matplotlib.figure import Figure
from tqdm import tqdm

from fedrot.adapters.files import new_folder
from fedrot.simulation import SimulationConfig
from fedrot.simulation.clients import Clients
from fedrot.simulation.panels import RoundLocator, finish_figure, line_styles, make_panels
from fedrot.simulation.tasks import Task, load_task

from .attack_clients import FACTORS, NOISE, SCENARIOS, Scenario, flip_labels, sent
from .attack_rules import RULES, Replies

FEDERATIONS = ((10, 2), (20, 5))  # clients, of which the last are attackers
TRAINING: dict[str, Any] = {"rounds": 5, "local_steps": 10, "batch_size": 16, "lr": 1e-2, "dirichlet_alpha": 1.0}
_MIXED = 1e-3  # of an equal share: a smaller weight counts as refused


@cache
def _load() -> Task:
    torch.set_num_threads(1)
    return load_task(SimulationConfig())


def _run_case(case: tuple[Scenario, str, int, int, int, int]) -> list[dict[str, Any]]:
    return run(_load(), *case)


def run(task: Task, scenario: Scenario, rule: str, n: int, f: int, seed: int, rounds: int) -> list[dict[str, Any]]:
    """Run a federation; return a row per round."""
    config = SimulationConfig(clients=n, seed=seed, clients_per_pass=None, **TRAINING | {"rounds": rounds})
    clients, attackers = Clients(task, config), range(n - f, n) if scenario.attack != "none" else range(0)
    if scenario.attack == "label flip":
        flip_labels(clients, attackers)
    state, rows = clients.state(), []
    for round in range(rounds):
        chosen = clients.sample(round)
        trained = clients.train(round, chosen, [state] * n, lambda _: None)
        states = [
            sent(scenario, c, theirs, state, attacks=c in attackers, seed=(seed, round))
            for c, (theirs, _) in zip(chosen, trained, strict=True)
        ]
        state, weights = RULES[rule](Replies(states, state, round, f, clients.lora))
        row = {"clients": n, "attackers": f, "scenario": scenario.name, "rule": rule, "seed": seed, "round": round + 1}
        finite = all(bool(x.isfinite().all()) for x in state.values())
        row |= {"accuracy": clients.evaluate(state)["accuracy"] if finite else math.nan}
        if weights is not None:
            refused = [w < _MIXED / n for w in weights]
            row |= {
                "honest_refused": sum(refused[c] for c in chosen if c not in attackers),
                "attackers_kept": sum(not refused[c] for c in attackers),
                "attackers_weight": sum(weights[c] for c in attackers),
            }
        rows.append(row)
    return rows


def tables(rows: pd.DataFrame) -> str:
    """Tables in Markdown, for each federation: the last round's accuracy, and what weight attackers and honest had."""
    text = []
    for (n, f), some in rows.groupby(["clients", "attackers"], sort=False):
        last = some[some["round"] == some["round"].max()]
        accuracy = last.pivot_table("accuracy", "scenario", "rule", "mean", sort=False).map("{:.3f}".format)
        kept = some.pivot_table("attackers_weight", "scenario", "rule", "mean", sort=False).map("{:.3f}".format)
        honest = some.pivot_table("honest_refused", "scenario", "rule", "mean", sort=False).map("{:.1f}".format)
        for title, table in (
            (f"Accuracy after the last round, {f} attackers of {n}", accuracy),
            (f"Weight of the attackers in the mean, all rounds, {f} of {n}", kept),
            (f"Honest clients refused per round, {f} attackers of {n}", honest),
        ):
            text.append(f"### {title}\n\n{_markdown(table)}\n")
    return "\n".join(text)


def _markdown(table: pd.DataFrame) -> str:
    lines = ["| " + " | ".join([str(table.index.name), *map(str, table.columns)]) + " |"]
    lines.append("|" + " --- |" * (len(table.columns) + 1))
    lines += ["| " + " | ".join([str(name), *row]) + " |" for name, row in zip(table.index, table.to_numpy(), strict=True)]
    return "\n".join(lines)


def plot(rows: pd.DataFrame, path: Path) -> Figure:
    """Plot accuracy by round: a row of panels per scenario, a column per federation, the mean over seeds."""
    federations = list(rows.groupby(["clients", "attackers"], sort=False).groups)
    scenarios = list(dict.fromkeys(rows["scenario"]))
    styles = line_styles(rows.rename(columns={"rule": "method"}))
    figure, axes = make_panels(len(scenarios), len(federations), height=2.1)
    for place, (n, f) in enumerate(federations):
        column = axes[:, place]
        for axis, scenario in zip(column, scenarios, strict=True):
            some = rows[(rows["clients"] == n) & (rows["attackers"] == f) & (rows["scenario"] == scenario)]
            for rule, group in some.groupby("rule", sort=False):
                mean = group.groupby("round")["accuracy"].mean()
                axis.plot(mean.index, mean, markersize=3, **styles[str(rule)])
            axis.set(ylim=(0, 1), ylabel=scenario.replace(", ", ",\n") if place == 0 else "")
            axis.xaxis.set_major_locator(RoundLocator())
        column[0].set_title(f"accuracy, {f} attackers of {n}")
    return finish_figure(figure, axes, "round", path)


def main(argv: Sequence[str] | None = None) -> None:
    """Run all scenarios under all rules, and write table, plot and configuration into a new folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="processes, with the same results")
    parser.add_argument("--rounds", type=int, default=TRAINING["rounds"])
    parser.add_argument("--scenarios", nargs="+", default=[s.name for s in SCENARIOS])
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    args = parser.parse_args(argv)
    scenarios = [s for s in SCENARIOS if s.name in args.scenarios]
    cases = [
        (s, r, n, f, seed, args.rounds) for n, f in FEDERATIONS for s in scenarios for r in args.rules for seed in args.seeds
    ]
    config = SimulationConfig(clients_per_pass=None, **TRAINING | {"rounds": args.rounds})
    load_task(config)  # which pretrains the model once
    with new_folder(args.output) as folder, ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        runs = tqdm(pool.map(_run_case, cases), total=len(cases), unit="run")
        table = pd.DataFrame([row for rows in runs for row in rows])
        table.to_csv(folder / "results.csv", index=False, float_format="%.6g")
        (folder / "table.md").write_text(tables(table), "utf-8")
        plot(table, folder / "attacks.png")
        recorded = {
            "simulation": asdict(config) | {"clients": None, "seed": None},
            "federations": [list(pair) for pair in FEDERATIONS],
            "seeds": args.seeds,
            "rules": args.rules,
            "scenarios": [asdict(s) for s in scenarios],
            "factors": FACTORS | {"random": NOISE},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(recorded, sort_keys=False, allow_unicode=True), "utf-8")
    print(tables(table))


if __name__ == "__main__":
    main()
