"""Weights of any sign and sums, one α and previews of merges: against dense float64 arithmetic and PEFT."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fedrot
from fedrot.cli import main

from ..dense import KIND
from ..peft_models import client_updates, save_folder
from ..refusals import refused
from .test_merge import UNLIKE, deltas, mean_delta

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized"),
]


NO_HEAD = {"modules_to_save": None}


@pytest.fixture
def unlike(tmp_path):
    """Folders of one base whose ranks, scalings and modules all differ; no head."""
    kinds = [replace(KIND, config=KIND.config | NO_HEAD | own) for own in UNLIKE]
    return [save_folder(kind, client_updates(kind, 1, seed)[0], tmp_path / f"own{seed}") for seed, kind in enumerate(kinds)]


def merged_deltas(result, folder):
    result.save(folder)
    return deltas(folder)


@pytest.mark.parametrize("method", ["flexlora", "fedrot-least-error"])
@pytest.mark.parametrize(
    ("weights", "normalize", "applied"),
    [
        ([1, -1, 0.5], False, [1, -1, 0.5]),
        ([1, 1, 1], False, [1, 1, 1]),
        ([3, -1, 2], True, [0.75, -0.25, 0.5]),
        ([-1, -1, -2], True, [0.25, 0.25, 0.5]),
        ([2, 0, -1], False, [2, 0, -1]),
        ([1e30, -2e30, 3e30], True, [0.5, -1, 1.5]),
    ],
)
def test_weights_of_any_sign_are_applied_as_they_are(unlike, tmp_path, method, weights, normalize, applied):
    result = fedrot.merge(unlike, weights, normalize=normalize, method=method, rank=13)
    expected = mean_delta([f for f, w in zip(unlike, applied, strict=True) if w], [w for w in applied if w])
    found = merged_deltas(result, tmp_path / "merged")
    assert found.keys() == expected.keys()
    lost = sum(float((found[name] - x).square().sum()) for name, x in expected.items()) ** 0.5
    norm = sum(float(x.square().sum()) for x in expected.values()) ** 0.5
    assert result.report.relative_error == pytest.approx(lost / norm, abs=1e-7)
    assert lost / norm < (1e-12 if method == "flexlora" else 0.9)
    assert result.report.weights == pytest.approx([w for w in applied if w])


def test_weights_that_cannot_be_normalized_say_how_to_add(unlike, tmp_path, capsys):
    with refused("1, -1 sum to zero", "--normalize no"):
        fedrot.merge(unlike, [1, -1, 0])
    for wrong in ([1, 2, torch.nan], [1, 2, float("inf")], [1, 2, "3"], [1, 2, True]):
        with refused("client 2"):
            fedrot.merge(unlike, wrong)
    with refused("all weights are zero"):
        fedrot.merge(unlike, [0, 0, 0])
    command = ["merge", *map(str, unlike[:2]), "--weights", "1", "-1", "--normalize", "no", "--rank", "8"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    expected, found = mean_delta(unlike[:2], [1, -1]), deltas(tmp_path / "out")
    assert all(torch.allclose(found[name], x, rtol=1e-9, atol=1e-9) for name, x in expected.items())
    record = json.loads((tmp_path / "out" / "aggregation.json").read_text("utf-8"))["options"]
    assert (record["weights"], record["normalize"], record["modules_to_save"]) == ([1, -1], False, "mean")


@pytest.mark.parametrize("alpha", [None, 7])
def test_the_result_has_one_alpha(unlike, tmp_path, alpha):
    """llama.cpp's converter reads one α, and takes α over each tensor's own rank for its scaling."""
    result = fedrot.merge(unlike, [1, 2, 5], alpha=alpha)
    config = result.config
    assert config["alpha_pattern"] == {} and not config["use_rslora"] and config["rank_pattern"]
    assert alpha is None or config["lora_alpha"] == alpha
    found = merged_deltas(result, tmp_path / "merged")
    state = load_file(tmp_path / "merged" / "adapter_model.safetensors")
    for name, x in found.items():
        A, B = (state[f"{name}.lora_{factor}.weight"].double() for factor in "AB")
        torch.testing.assert_close(config["lora_alpha"] / len(A) * B @ A, x, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "options", [[], ["--weights", "1", "-2", "3"], ["--weights", "1", "-1", "1", "--normalize", "no"]], ids=" ".join
)
def test_a_preview_says_what_merges_lose(unlike, tmp_path, options, capsys):
    before = sorted(Path(tmp_path).rglob("*"))
    assert main(["merge", *map(str, unlike), "--dry-run", *options]) == 0
    assert sorted(Path(tmp_path).rglob("*")) == before
    lines = capsys.readouterr().out.splitlines()
    methods, last = lines[1].split()[1:], lines[-1]
    assert methods == ["flexlora", "fedrot-least-error"]
    weights = [float(w) for w in options[1:4]] if options else None
    checked = 0
    for line in lines[2:-1]:
        name, errors = line[:24], line[24:].split()
        rank = None if "own" in name else int(name.split(",")[0])
        for method, error in zip(methods, errors, strict=True):
            if error != "–":
                result = fedrot.merge(unlike, weights, rank=rank, method=method, normalize="--normalize" not in options)
                assert float(error) == pytest.approx(result.report.relative_error, abs=6e-5)
                checked += 1
    assert checked >= 8
    tolerated = int(last.split("from rank ")[1].split(",")[0])
    errors = [
        fedrot.merge(unlike, weights, rank=rank, normalize="--normalize" not in options).report.relative_error
        for rank in (tolerated - 1, tolerated)
    ]
    assert errors[1] <= 0.05 < errors[0]


def test_a_merge_needs_a_folder_or_a_dry_run(unlike, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["merge", *map(str, unlike)])
    assert ended.value.code == 2 and "--output" in capsys.readouterr().err


def test_help_says_what_loses_nothing(capsys):
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "flexlora loses nothing at the sum of their ranks" in text and "divided by their sum" in text
