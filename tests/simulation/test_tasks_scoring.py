"""Answers and their scores: greedy generation in batches, the last number, and code that is run apart."""

import json
import time
from decimal import Decimal

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from fedrot.simulation import load_task
from fedrot.simulation.tasks.code_execution import passes
from fedrot.simulation.tasks.scoring import exact_match, final_number, pass_at_1

from .test_tasks_language import configure  # noqa: F401, a fixture

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7.\n#### 7", "7"),
        ("so #### $1,234.\n\nQuestion: 5 + 5?", "1234"),
        ("It is 1,000,000.", "1000000"),
        ("that makes $12.50.", "12.5"),
        ("x = -5", "-5"),
        ("owes -$5", "-5"),
        ("10-4", "4"),
        ("#### .5", "0.5"),
        ("7, and no more", "7"),
        ("#### none, 8", "8"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_an_exact_match_is_of_numbers():
    rows = {"answer": ["6 and 1\n#### 7", "#### 1,000", "#### 5", "#### 5"]}
    assert exact_match(" {answer}")(["it is 7.0", "$1000.", "5 or 6", ""], rows) == [True, True, False, False]


def greedy(model, ids, steps, end):
    """One prompt, no padding, no cache."""
    for _ in range(steps):
        ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == end:
            break
    return ids


def test_answers_in_batches_are_those_of_each_prompt_alone(configure, llama):  # noqa: F811
    task = load_task(configure(max_length=200, score="exact_match", max_new_tokens=12, test_fraction=0.5))
    tokenizer = AutoTokenizer.from_pretrained(llama)
    prompts = [[*row["input_ids"][: row["prompt_tokens"]]] for row in task.test]
    prompts[3] = prompts[3][:5]
    answers = task.scorer._answer(task.base_model.eval(), prompts, 4, CPU)
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = greedy(task.base_model, prompt, 12, tokenizer.eos_token_id)
        assert answer == tokenizer.decode(alone[len(prompt) :], skip_special_tokens=True)
    assert len(set(answers)) > 3, "nothing was told apart"


def test_a_model_that_learned_the_answers_matches_them(configure):  # noqa: F811
    rows = [{"question": f"{name}?", "answer": f"#### {n}"} for name, n in zip("abcd", (12, 7, 1345, 80), strict=True)]
    task = load_task(config := configure(rows * 2, score="exact_match", max_new_tokens=16, test_fraction=0.5))
    assert task.evaluate(task.base_model, 4, CPU)["exact_match"] == 0
    batch = task.collate(task.train, np.arange(len(task.train)), CPU)
    labels = batch.pop("labels")
    optimizer = torch.optim.AdamW(task.base_model.parameters(), 1e-2)
    for _ in range(40):
        task.losses(task.base_model(**batch).logits, labels, 1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    known = [i for i, row in enumerate(task.test) if row["question"] in set(task.train["question"])]
    strangers = len(task.test) - len(known)
    measured = task.evaluate(task.base_model.train(), 3, CPU, np.array(known))
    assert measured["exact_match"] == 1 and strangers < 3 and task.base_model.training
    assert config.score_examples == 100


def test_only_so_many_examples_are_scored(configure):  # noqa: F811
    task = load_task(configure(score="exact_match", score_examples=3, max_new_tokens=2, test_fraction=0.5))
    graded = []
    task.scorer.grade = lambda answers, rows: graded.extend(rows["question"]) or [True] * len(answers)
    assert task.evaluate(task.base_model, 8, CPU)["exact_match"] == 1
    assert graded == task.test["question"][:3]


HUMANEVAL = {
    "prompt": 'def add(a, b):\n    """Sum."""\n',
    "canonical_solution": "    return a + b\n",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 1) == 0\n",
    "entry_point": "add",
}


def test_pass_at_1_runs_the_completed_function():
    answers = ["    return a + b", "    return a - b", "    return a + b\n\nprint(undefined)", "    return (", "    exit()"]
    rows = {name: [text] * len(answers) for name, text in HUMANEVAL.items()}
    assert pass_at_1(answers, rows) == [True, False, True, False, False]


def test_humanevals_columns_are_scored_and_its_solutions_the_loss(configure, llama, tmp_path):  # noqa: F811
    (tmp_path / "test.jsonl").write_text(json.dumps(HUMANEVAL) + "\n")
    options = {"score": "pass_at_1", "execute_generated_code": True, "max_new_tokens": 4, "max_length": 200}
    task = load_task(configure(test_dataset=str(tmp_path / "test.jsonl"), **options))
    batch = task.collate(task.test, np.array([0]), CPU)
    targets = batch["labels"][batch["labels"] != -100]
    assert AutoTokenizer.from_pretrained(llama).decode(targets) == HUMANEVAL["canonical_solution"] + "</s>"
    assert task.evaluate(task.base_model, 8, CPU).keys() == {"loss", "pass_at_1"}


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("assert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("def broken(:", False),
        ("import sys; sys.exit(0)", False),
        ("import os; os._exit(0)", False),
        ("while True: pass", False),
        ("import time; time.sleep(60)", False),
        ("import mmap; mmap.mmap(-1, 1 << 30)", False),
        ("import os; assert not os.environ.keys() - {'LC_CTYPE'} and not os.listdir()", True),
        ("import sys; assert sys.flags.isolated and '' not in sys.path and not sys.stdin.read()", True),
        ("open('big', 'wb').write(bytes(1 << 21))", False),
        ("import resource; assert resource.getrlimit(resource.RLIMIT_NPROC) == (0, 0)", True),
        ("print('\\ud800')", False),
    ],
)
def test_a_program_runs_within_limits(program, passed):
    assert passes(program, seconds=20 if passed else 1, memory=1 << 29) is passed


def test_no_process_outlives_its_program(tmp_path):
    """Whoever may start processes, as root may in spite of the limit, does not leave any behind."""
    late = tmp_path / "late"
    program = f"import os, time\nif os.fork() == 0:\n    time.sleep(0.4)\n    open({str(late)!r}, 'w')\n"
    passes(program, seconds=1)
    time.sleep(0.8)
    assert not late.exists()
