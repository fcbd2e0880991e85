"""Merging adapters trained independently, beside PEFT's ``add_weighted_adapter``: ``python -m benchmarks.merging``.

Clients with unlike classes teach the embedded ViT turned digits, each from an adapter of its own; then every way of
merging takes the same adapters. Accuracy is that of the base model with the merged s·B·A added, the relative error is
‖Σ wᵢsᵢBᵢAᵢ − merged‖ / ‖Σ wᵢsᵢBᵢAᵢ‖ over all modules, in float64, and times are medians of three, from state dicts to a
state dict (PEFT: from loaded adapters to a loaded one).
"""

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor
from tqdm import tqdm

import fedrot
from fedrot.simulation import SimulationConfig, Task, load_task
from fedrot.simulation.clients import Clients

from .record import RESULTS, environment, record_path, write

warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT's question, Transformers' answer

Deltas = dict[str, Tensor]  # module → s·B·A in float64
RANKS = {"4": (4,), "2, 4, 8": (2, 4, 8)}
ALPHA, STEPS, SEEDS, CLIENTS = 8, 100, (0, 1, 2), (2, 5, 10)
PLAIN = "fedrot, λ = 0 (FedIT)"
BEST = "fedrot merge, flexlora"
DENSE = "the mean update itself"
ALONE = "one adapter alone (mean)"


@dataclass(frozen=True)
class Trained:
    """Adapters of one base, with their configurations, and a model that has them all loaded."""

    pairs: list[tuple[dict[str, Tensor], LoraConfig]]
    model: PeftModel

    @property
    def names(self) -> list[str]:
        return [f"a{i}" for i in range(len(self.pairs))]


def train(task: Task, n: int, ranks: Sequence[int], seed: int, steps: int) -> Trained:
    """n adapters, client by client of the ranks in turn."""
    pairs: list[Any] = [None] * n
    for r in ranks:
        lora = {"r": r, "lora_alpha": ALPHA}
        config = SimulationConfig(
            clients=n, seed=seed, start="independent", lora=lora, local_steps=steps, lr=0.01, batch_size=8
        )
        clients = Clients(task, config)
        mine = [c for c in range(n) if ranks[c % len(ranks)] == r]
        trained = clients.train(0, mine, [clients.own_start(c) for c in mine], lambda _: None) if mine else []
        for c, (state, _) in zip(mine, trained, strict=True):
            clients.load(state)
            state_dict = {key: x.clone() for key, x in get_peft_model_state_dict(clients.model).items()}
            pairs[c] = (state_dict, copy.deepcopy(clients.model.peft_config["default"]))
    model = get_peft_model(copy.deepcopy(task.base_model), pairs[0][1], adapter_name="a0")
    for i, (state_dict, config) in enumerate(pairs):
        if i:
            model.add_adapter(f"a{i}", config)
        set_peft_model_state_dict(model, state_dict, adapter_name=f"a{i}")
    return Trained(pairs, model)


def ways(trained: Trained) -> dict[str, Callable[[], Any]]:
    """Name → what merges: to a result of fedrot, or in PEFT to an adapter of the name "merged"."""
    pairs, n, of_plain = trained.pairs, len(trained.pairs), {"report_error": False}
    largest = max(config.r for _, config in pairs)

    def peft(kind: str, **options: Any) -> Callable[[], None]:
        return lambda: trained.model.add_weighted_adapter(trained.names, [1 / n] * n, "merged", kind, **options)

    return {
        PLAIN: lambda: fedrot.aggregate(pairs, strength=0, **of_plain),
        "fedrot, λ = 1": lambda: fedrot.aggregate(pairs, strength=1, align_on="joint", **of_plain),
        "fedrot merge, least error": lambda: fedrot.merge(pairs, method="fedrot-least-error"),
        BEST: lambda: fedrot.merge(pairs),
        "PEFT linear": peft("linear"),
        "PEFT ties": peft("ties", density=0.5),
        "PEFT svd": peft("svd", svd_rank=largest),
        "PEFT cat": peft("cat"),
    }


def timed(call: Callable[[], Any], model: PeftModel, repetitions: int) -> tuple[Any, float]:
    """What it returned last, and the median time; every time PEFT merges anew."""
    times = []
    for _ in range(repetitions):
        if "merged" in model.peft_config:
            model.delete_adapter("merged")
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return result, median(times)


def deltas(model: PeftModel, adapter: str) -> Deltas:
    """s·B·A of every module, from PEFT's own factors and scalings."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    return {
        name: (m.scaling[adapter] * m.lora_B[adapter].weight.double() @ m.lora_A[adapter].weight.double()).detach()
        for name, m in layers.items()
    }


def of_result(task: Task, result: fedrot.AggregationResult) -> tuple[Deltas, int]:
    """What a result of fedrot does to the base, and its rank, through PEFT."""
    fields = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules")
    config = LoraConfig(**{field: result.config[field] for field in fields if field in (result.config or {})})
    model = get_peft_model(copy.deepcopy(task.base_model), config)
    set_peft_model_state_dict(model, result.state_dict)
    return deltas(model, "default"), config.r


def accuracy(task: Task, change: Deltas) -> float:
    """Of the base model with a change of its weights."""
    model = copy.deepcopy(task.base_model)
    with torch.no_grad():
        for name, delta in change.items():
            weight = model.get_submodule(name.removeprefix("base_model.model.")).weight
            weight += delta.to(weight.dtype)
    return task.evaluate(model, 400, torch.device("cpu"))["accuracy"]


def relative_error(change: Deltas, truth: Deltas) -> float:
    squares = [(float((truth[name] - change[name]).square().sum()), float(x.square().sum())) for name, x in truth.items()]
    lost, whole = map(sum, zip(*squares, strict=True))
    return (lost / whole) ** 0.5


def compare(task: Task, n: int, ranks: str, seed: int, steps: int, repetitions: int) -> dict[str, Any]:
    """Every way of merging the adapters of one run."""
    trained = train(task, n, RANKS[ranks], seed, steps)
    own = [deltas(trained.model, name) for name in trained.names]
    truth = {name: sum(of[name] for of in own) / n for name in own[0]}
    rows: dict[str, Any] = {
        DENSE: {"accuracy": accuracy(task, truth), "relative_error": 0.0, "rank": None, "seconds": None},
        ALONE: {
            "accuracy": mean(accuracy(task, of) for of in own),
            "relative_error": mean(relative_error(of, truth) for of in own),
            "rank": None,
            "seconds": None,
        },
    }
    refused = {}
    for name, call in ways(trained).items():
        try:
            result, seconds = timed(call, trained.model, repetitions)
        except ValueError as error:  # PEFT's linear and ties, where ranks differ
            refused[name] = str(error)
            continue
        if result is None:
            change, rank = deltas(trained.model, "merged"), trained.model.peft_config["merged"].r
        else:
            change, rank = of_result(task, result)
        rows[name] = {
            "accuracy": accuracy(task, change),
            "relative_error": relative_error(change, truth),
            "rank": rank,
            "seconds": seconds,
        }
    for row in rows.values():
        row["ratio_to_plain"] = None if row["seconds"] is None else row["seconds"] / rows[PLAIN]["seconds"]
    return {"clients": n, "ranks": ranks, "seed": seed, "rows": rows, "refused": refused}


def table(comparisons: Sequence[dict[str, Any]], ranks: str) -> str:
    """In Markdown: per way of merging and number of adapters accuracy ± deviation over seeds, error, time over FedIT's."""
    some = [c for c in comparisons if c["ranks"] == ranks]
    counts = sorted({c["clients"] for c in some})
    lines = [
        f"ranks {ranks}: accuracy, relative error, time over that of plain averaging, and the result's rank",
        "",
        "| | " + " | ".join(f"N = {n}" for n in counts) + " |",
        "| --- " * (len(counts) + 1) + "|",
    ]
    for name in dict.fromkeys(name for c in some for name in c["rows"]):
        cells = []
        for n in counts:
            rows = [c["rows"][name] for c in some if c["clients"] == n and name in c["rows"]]
            scores = [row["accuracy"] for row in rows]
            spread = f" ± {stdev(scores):.3f}" if len(scores) > 1 else ""
            cell = f"{mean(scores):.3f}{spread}, {mean(row['relative_error'] for row in rows):.2f}"
            if rows[0]["rank"] is not None:
                cell += f", {median(row['ratio_to_plain'] for row in rows):.1f}×, r {rows[0]['rank']}"
            cells.append(cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [f"\n{name}: {why}" for name, why in some[0]["refused"].items()]
    return "\n".join([*lines, ""])


def plot(comparisons: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy over relative error of every way of merging, a panel per number of adapters and ranks."""
    from matplotlib.figure import Figure

    counts, all_ranks = (sorted({c[key] for c in comparisons}) for key in ("clients", "ranks"))
    all_ranks.sort(key=list(RANKS).index)
    figure = Figure(figsize=(4.2 * len(counts) + 1.5, 3.6 * len(all_ranks)), layout="constrained")
    axes = figure.subplots(len(all_ranks), len(counts), squeeze=False, sharey=True)
    names = [name for name in dict.fromkeys(name for c in comparisons for name in c["rows"]) if name not in (ALONE, DENSE)]
    for i, ranks in enumerate(all_ranks):
        for j, n in enumerate(counts):
            axis, some = axes[i, j], [c["rows"] for c in comparisons if (c["clients"], c["ranks"]) == (n, ranks)]
            for k, name in enumerate(names):
                rows = [of[name] for of in some if name in of]
                if rows:
                    scores = [row["accuracy"] for row in rows]
                    error = mean(row["relative_error"] for row in rows)
                    deviation = stdev(scores) if len(scores) > 1 else 0.0
                    marker = "s" if name.startswith("PEFT") else "o"
                    axis.errorbar(error, mean(scores), deviation, fmt=marker, color=f"C{k}", capsize=3, label=name)
            axis.set_title(f"N = {n}, ranks {ranks}", fontsize=10)
            axis.set_xlabel("relative error")
            axis.grid(alpha=0.3)
        axes[i, 0].set_ylabel("accuracy")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merging", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, to see that it runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the record and the plot")
    arguments = parser.parse_args()
    where = environment(torch.device("cpu"))
    print(", ".join(f"{key} {value}" for key, value in where.items()), flush=True)
    path = record_path("merging-quick" if arguments.quick else "merging", where, arguments.output)
    steps, seeds, repetitions = (2, SEEDS[:1], 1) if arguments.quick else (STEPS, SEEDS, 3)
    settings = {"lora_alpha": ALPHA, "local_steps": steps, "task": "digits, turned by 90°", "weights": "1/N"}
    record: dict[str, Any] = {"environment": where, "settings": settings, "comparisons": []}
    task = load_task(SimulationConfig())
    cases = [(n, ranks, seed) for ranks in RANKS for n in CLIENTS for seed in seeds]
    for case in tqdm(cases, desc="merging", disable=None):
        record["comparisons"].append(compare(task, *case, steps, repetitions))
        write(path, record)
    print("\n".join(table(record["comparisons"], ranks) for ranks in RANKS))
    plot(record["comparisons"], path.with_suffix(".png"))
    print(f"{path}\n{path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
