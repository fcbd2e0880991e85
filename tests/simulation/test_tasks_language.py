"""Causal language models: what is predicted, how it is averaged, and the data's ways in."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from fedrot.simulation import SimulationConfig, load_task, simulate
from fedrot.simulation.clients import Clients
from fedrot.simulation.tasks.encoding import Encoder

from ..language_models import save_llama, train_two

CPU = torch.device("cpu")
ROWS = [
    {
        "question": f"how many are {a} and {b}?",
        "answer": f"they are {a + b} " * (1 + a % 3) + f"\n#### {a + b}",
        "site": f"s{a % 2}",
    }
    for a in range(4)
    for b in range(5)
]


@pytest.fixture
def configure(llama, tmp_path):
    """A configuration on rows written as JSONL."""

    def make(rows=ROWS, templates=True, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        both = {"prompt_template": "Question: {question}\nAnswer:", "response_template": " {answer}"} if templates else {}
        lora = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
        return SimulationConfig(
            **{"model": llama, "dataset": str(path), "task": "causal-lm", "lora": lora, "clients": 2} | both | options
        )

    return make


def expected_losses(task, rows):
    """Of every row alone, unpadded, in float64: the sum over its response tokens, and how many they are."""
    model = task.base_model.double().eval()
    found = []
    for row in rows:
        ids, prompt = torch.tensor(row["input_ids"]), row["prompt_tokens"]
        with torch.no_grad():
            chances = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        each = [-chances[i - 1, ids[i]].item() for i in range(max(prompt, 1), len(ids))]
        found.append((sum(each), len(each)))
    task.base_model.float()
    return found


def test_only_the_response_and_the_end_are_targets(configure, llama):
    task = load_task(configure(max_length=200))
    tokenizer = AutoTokenizer.from_pretrained(llama)
    batch = task.collate(task.train, np.arange(5), CPU)
    for ids, mask, labels, row in zip(
        *(batch[k] for k in ("input_ids", "attention_mask", "labels")), task.train.select(range(5)), strict=True
    ):
        targets = labels[labels != -100]
        assert tokenizer.decode(targets) == f" {row['answer']}</s>"
        assert tokenizer.decode(ids[mask.bool()]) == f"<s>Question: {row['question']}\nAnswer: {row['answer']}</s>"
        assert mask[0] == 1 and labels[mask == 0].eq(-100).all(), "padding belongs on the right"
    assert not batch["attention_mask"].all(), "nothing was padded"


def test_the_rows_are_those_that_are_asked_for(configure):
    task = load_task(configure(max_length=200))
    batch = task.collate(task.train, np.array([3, 0, 7]), CPU)
    expected = [task.train[row]["input_ids"] for row in (3, 0, 7)]
    assert [batch["input_ids"][i, : len(ids)].tolist() for i, ids in enumerate(expected)] == expected


def test_each_client_has_the_mean_over_its_own_tokens(configure):
    task = load_task(configure(max_length=200))
    indices = np.array([0, 1, 2, 5, 6, 9])
    batch = task.collate(task.train, indices, CPU)
    labels = batch.pop("labels")
    losses = task.losses(task.base_model.double().eval()(**batch).logits, labels, 2)
    rows = expected_losses(task, [task.train[int(i)] for i in indices])
    for client, mine in enumerate((rows[:3], rows[3:])):
        assert losses[client].item() == pytest.approx(sum(s for s, _ in mine) / sum(n for _, n in mine), rel=1e-10)


def test_the_test_loss_is_the_mean_over_tokens_whatever_the_batch(configure):
    task = load_task(configure(max_length=200, test_fraction=0.5))
    sums = expected_losses(task, task.test)
    for size in (1, 3, 100):
        assert task.evaluate(task.base_model, size, CPU)["loss"] == pytest.approx(
            sum(s for s, _ in sums) / sum(n for _, n in sums), rel=1e-5
        )
    some = task.evaluate(task.base_model, 2, CPU, np.array([4, 1]))
    assert some == {"loss": pytest.approx((sums[4][0] + sums[1][0]) / (sums[4][1] + sums[1][1]), rel=1e-5)}


def test_a_long_text_becomes_several_examples(configure, llama):
    texts = [{"text": "how many apples are there? " * n, "site": f"s{n}", "other": "x"} for n in (1, 3, 9, 20)]
    options = {"templates": False, "max_length": 16, "partition_column": "site", "test_fraction": 0.25}
    task = load_task(configure(texts, **options))
    tokenizer = AutoTokenizer.from_pretrained(llama)
    for data in (task.train, task.test):
        for site in set(data["site"]):
            ids = [row["input_ids"] for row in data if row["site"] == site]
            assert all(len(x) == 16 for x in ids[:-1]) and 2 <= len(ids[-1]) <= 16
            text = next(row["text"] for row in texts if row["site"] == site)
            assert tokenizer.decode([i for x in ids for i in x]) == f"<s>{text}</s>"
    assert len(task.train) > 10


def test_a_single_token_at_the_end_is_no_example(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids = tokenizer("how many apples")["input_ids"] + [tokenizer.eos_token_id]
    assert Encoder(tokenizer, len(ids) - 1).windows(["how many apples"]) == [[ids[:-1]]]
    assert Encoder(tokenizer, len(ids) - 2).windows(["how many apples"]) == [[ids[:-2], ids[-2:]]]


def test_what_is_too_long_loses_the_prompts_beginning_then_the_responses_end(configure, llama):
    rows = [{"question": "q" * 100, "answer": "12"}, {"question": "q" * 100, "answer": "a" * 100}] * 5
    task = load_task(configure(rows, max_length=32))
    tokenizer = AutoTokenizer.from_pretrained(llama)
    assert {row["answer"] for row in task.train} == {"12", "a" * 100}
    for row in task.train:
        prompt, response = row["input_ids"][: row["prompt_tokens"]], row["input_ids"][row["prompt_tokens"] :]
        assert len(prompt) + len(response) == 32 and prompt[0] == tokenizer.bos_token_id
        assert tokenizer.decode(prompt).endswith("q\nAnswer:")
        if row["answer"] == "12":
            assert tokenizer.decode(response) == " 12</s>"
        else:
            assert len(prompt) == 16 and set(tokenizer.decode(response)) == {" ", "a"}


def test_a_tokenizer_without_beginning_token_sets_none(tmp_path, configure):
    task = load_task(configure(model=str(save_llama(tmp_path / "plain", bos=False))))
    assert all(0 not in row["input_ids"] for row in task.train)


def test_language_has_classes_only_where_a_column_gives_them(configure):
    assert configure().partition == "iid"
    task = load_task(configure())
    assert task.labels is None and task.classes == []
    task = load_task(config := configure(label_column="site", test_fraction=0.5))
    assert config.partition == "dirichlet" and task.classes == ["s0", "s1"]
    assert [task.classes[i] for i in task.labels] == task.train["site"][:]
    with pytest.raises(ValueError, match="have no classes: use partition iid or column, or name a label_column"):
        configure(partition="dirichlet")


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"partition_column": "site"}])
def test_clients_learn(configure, options):
    config = configure(max_length=200, local_steps=15, batch_size=4, lr=0.03, **options)
    task = load_task(config)
    clients = Clients(task, config)
    assert {p.dtype for p in clients.parameters.values()} == {torch.float32}
    assert {p.dtype for p in task.base_model.parameters()} == {getattr(torch, config.dtype)}
    before = clients.evaluate(clients.state())["loss"]
    states, _ = train_two(clients)
    assert all(clients.evaluate(state)["loss"] < before - 0.5 for state in states)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"response_template": None}, "prompt_template and response_template go together"),
        (
            {"prompt_template": "{nothing}"},
            "the training data has no column 'nothing'; its columns are question, answer, site",
        ),
        (
            {"templates": False},
            "the training data has 3 columns of text; its columns are question, answer, site; set text_column",
        ),
        ({"templates": False, "score": "exact_match"}, "exact_match needs prompt_template and response_template"),
        ({"response_template": " none", "score": "exact_match"}, "2 of the 2 responses to score have no number"),
        ({"score": "pass_at_1"}, "set execute_generated_code to allow that"),
        ({"score": "pass_at_1", "execute_generated_code": True}, "the test data has no column 'prompt'"),
        ({"task": "text-classification"}, "prompt_template is for causal-lm on a dataset of your own"),
        ({"max_length": 4000}, "the model has 2048 positions, fewer than max_length"),
        ({"label_column": "kind"}, "the training data has no column 'kind'"),
        ({"model": "/no/such/model"}, "there is no model folder /no/such/model"),
    ],
)
def test_options_that_contradict_each_other_or_the_data_are_refused(configure, options, message):
    config = configure(**options)
    with pytest.raises(ValueError, match=message):
        load_task(config)


def test_a_tokenizer_without_end_of_text_is_refused(llama, configure, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="no end-of-text token"):
        load_task(configure(model=str(tmp_path / "endless")))


def test_a_run_reports_loss_and_score(configure, tmp_path):
    options = {"score": "exact_match", "max_new_tokens": 4, "max_length": 200, "gradient_checkpointing": True}
    config = configure(rounds=2, local_steps=5, batch_size=4, **options)
    rows = simulate(config, tmp_path / "run", progress=False).metrics
    assert all(row["exact_match"] == 0 for row in rows) and rows[1]["loss"] < rows[0]["loss"]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
