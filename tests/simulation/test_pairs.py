"""Pairs of GSM8K's questions: how a question is split, that labels are true, and that the simulator reads the files."""

import json
from collections import Counter

import numpy as np
import pytest

from benchmarks.pairs import _exchange, make_pairs, split_question, write_pairs
from fedrot.simulation.tasks.files import load_file

QUESTIONS = [
    *(f"{name} has {n} pens.  {name} buys {n + 1} more. How many pens has {name}?" for n, name in enumerate(["Ann", "Bo"])),
    *(f'Case {n}: "Buy {n}," says Mr. Lee. How much is {n} times two?' for n in range(38)),
]


@pytest.mark.parametrize(
    ("question", "parts"),
    [
        ("Al has 3 pens.\nBo has 2. How many have they?", ("Al has 3 pens. Bo has 2.", "How many have they?")),
        ("It is late! Will Dr. Ray come?", ("It is late!", "Will Dr. Ray come?")),
        ("Pens cost $2.50 each. $5 buys how many?", ("Pens cost $2.50 each.", "$5 buys how many?")),
        ('He said "No." Who did?', ('He said "No."', "Who did?")),
        ("They ran (all day). “How far?” he asked.", ("They ran (all day).", "“How far?” he asked.")),
        ("She wakes at 8 a.m. on Mondays. When does she?", ("She wakes at 8 a.m. on Mondays.", "When does she?")),
        ("If Mr. Lee has 3 pens, how many has Mrs. Lee?", None),
        ("How many?", None),
        ("", None),
    ],
)
def test_the_last_sentence_is_split_off(question, parts):
    assert split_question(question) == parts


def test_labels_are_true_balanced_and_every_question_is_used_once():
    splits = [split_question(question) for question in QUESTIONS]
    train, dev = make_pairs([*QUESTIONS, "How many?", QUESTIONS[0]], seed=3)
    assert (len(train), len(dev)) == (36, 4)
    for pairs in (train, dev):
        assert Counter(label for *_, label in pairs) == {0: len(pairs) // 2, 1: len(pairs) // 2}
        assert all(((first, second) in splits) == (label == 1) for first, second, label in pairs)
        own = [dict(splits)[first] for first, *_ in pairs]
        assert sorted(own) == sorted(second for _, second, _ in pairs), "sentences stay in their part"
    assert sorted(first for first, *_ in [*train, *dev]) == sorted(first for first, _ in splits)
    assert (train, dev) == make_pairs(QUESTIONS, seed=3) != make_pairs(QUESTIONS, seed=4)
    assert len({label for *_, label in train[:12]}) == 2, "labels are mixed"


def test_a_sentence_that_reads_alike_is_no_other_sentence():
    sentences = ["same"] * 5 + list("abcde")
    for seed in range(20):
        order = _exchange(sentences, np.random.default_rng(seed))
        assert sorted(order) == sorted(sentences) and all(x != y for x, y in zip(order, sentences, strict=True))
    with pytest.raises(ValueError, match="too few questions with other last sentences"):
        _exchange(["same", "same", "a"], np.random.default_rng(0))
    with pytest.raises(ValueError, match="too few questions"):
        make_pairs(QUESTIONS[:10], seed=0)  # the one that is held out has none to exchange with


def test_the_simulator_reads_what_was_written_as_it_was(tmp_path, capsys):
    source = tmp_path / "train.jsonl"
    source.write_text("".join(json.dumps({"question": q, "answer": "#### 1"}) + "\n" for q in QUESTIONS) + "\n")
    write_pairs(source, tmp_path / "pairs", seed=3)
    for name, pairs in zip(("train.tsv", "dev.tsv"), make_pairs(QUESTIONS, 3), strict=True):
        rows = load_file(str(tmp_path / "pairs" / name))
        assert rows.column_names == ["first", "second", "label"]
        assert [(row["first"], row["second"], row["label"]) for row in rows] == pairs
    assert "dev.tsv: 4 pairs, 2 with label 1" in capsys.readouterr().out
    with pytest.raises(FileExistsError):
        write_pairs(source, tmp_path / "pairs")
