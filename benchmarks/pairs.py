"""Pairs of texts in the manner of QNLI from GSM8K's questions: does the second text belong to the first?

The first text is a question without its last sentence. The second is that sentence (label 1) or the last sentence of another
question (label 0). Questions of a single sentence are left out. Every other question, and every last sentence, is used once.

python -m benchmarks.pairs --gsm8k train.jsonl --output runs/pairs
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedrot.adapters.files import new_folder

COLUMNS = ("first", "second", "label")

Pair = tuple[str, str, int]

# Blanks after a sentence's end, which a quotation mark or a bracket may follow, and before what may begin a sentence.
_TITLES = "".join(rf"(?<!\b{title}\.)" for title in ("Mr", "Mrs", "Ms", "Dr", "St"))
_BETWEEN_SENTENCES = re.compile(rf"(?:(?<=[.!?])|(?<=[.!?][\"'”’)])){_TITLES} (?=[\"'“‘(]?[A-Z0-9$])")


def split_question(question: str) -> tuple[str, str] | None:
    """Split a question into all but its last sentence, and its last sentence; None if it has a single one."""
    text = " ".join(question.split())
    *_, last = [None, *_BETWEEN_SENTENCES.finditer(text)]
    return None if last is None else (text[: last.start()], text[last.end() :])


def make_pairs(questions: Sequence[str], seed: int) -> tuple[list[Pair], list[Pair]]:
    """Make pairs of nine tenths of the questions for training and of the others for testing, half of each with label 1.

    Args:
        questions: the questions. A question that comes twice counts once.
        seed: the seed of the split, of the labels and of the order.

    Raises:
        ValueError: too few questions of several sentences, or too many that end alike.
    """
    rng = np.random.default_rng(seed)
    splits = [split for question in dict.fromkeys(questions) if (split := split_question(question)) is not None]
    order = [splits[i] for i in rng.permutation(len(splits))]
    held_out = round(len(order) / 10)
    return _pair(order[held_out:], rng), _pair(order[:held_out], rng)


def _pair(splits: Sequence[tuple[str, str]], rng: np.random.Generator) -> list[Pair]:
    """Leave the first half its own last sentences, let the others exchange theirs, and mix the two."""
    half = (len(splits) + 1) // 2
    exchanged = _exchange([last for _, last in splits[half:]], rng)
    pairs = [(first, last, 1) for first, last in splits[:half]]
    pairs += [(first, other, 0) for (first, _), other in zip(splits[half:], exchanged, strict=True)]
    return [pairs[i] for i in rng.permutation(len(pairs))]


def _exchange(sentences: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Draw an order of the sentences in which none has its own place, nor that of one that reads alike."""
    if 2 * max(Counter(sentences).values(), default=1) > len(sentences):
        raise ValueError(f"too few questions with other last sentences to exchange them: {len(sentences)}")
    order = [sentences[i] for i in rng.permutation(len(sentences))]
    for i, own in enumerate(sentences):
        while order[i] == own:  # fewer than half of the sentences are such: another one can take its place
            j = int(rng.integers(len(order)))
            if own not in (order[j], sentences[j]):
                order[i], order[j] = order[j], order[i]
    return order


def write_pairs(gsm8k: Path, output: Path, seed: int = 0) -> None:
    """Write train.tsv and dev.tsv into a new folder.

    Args:
        gsm8k: a JSONL file, whose column "question" counts.
        output: the folder to make.
        seed: see ``make_pairs``.
    """
    questions = [json.loads(line)["question"] for line in gsm8k.read_text("utf-8").splitlines() if line.strip()]
    parts = dict(zip(("train.tsv", "dev.tsv"), make_pairs(questions, seed), strict=True))
    with new_folder(output) as temporary:
        for name, pairs in parts.items():
            lines = ["\t".join(map(str, row)) + "\n" for row in (COLUMNS, *pairs)]  # no blank of theirs is a tab
            (temporary / name).write_text("".join(lines), "utf-8")
            print(f"{output / name}: {len(pairs)} pairs, {sum(label for *_, label in pairs)} with label 1")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", required=True, type=Path, help="GSM8K's train.jsonl")
    parser.add_argument("--output", required=True, type=Path, help="the folder to make")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the split, the labels and the order (0)")
    arguments = parser.parse_args()
    write_pairs(arguments.gsm8k, arguments.output, arguments.seed)
