"""Conversations: rendered as the tokenizer renders them, with the loss on the assistant's tokens alone."""

import json
import logging

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, ByT5Tokenizer

from fedrot.simulation import SimulationConfig, load_task, simulate
from fedrot.simulation.tasks.chat import ChatEncoder

from ..language_models import save_llama

CPU = torch.device("cpu")

# As ChatML. The marked template marks what the plain one adds for a message of the assistant.
PLAIN = """{% for m in messages %}<|{{ m['role'] }}|>
{{ m['content'] }}</s>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
MARKED = """{% for m in messages %}<|{{ m['role'] }}|>
{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>
{% endgeneration %}{% else %}{{ m['content'] }}</s>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
# As Llama 2: no prompt before an answer, and what begins a message depends on the one before it.
BRACKETS = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{% if loop.index0 % 2 %}
{{ raise_exception('roles must alternate') }}{% endif %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] -}}
{{ eos_token }}
{% endif %}{% endfor %}"""
# The prompt ends in a space, which the tokenizer joins with the answer's first word.
SPACED = """{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
SPACED_MARKED = """{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' -%}
{% generation %}{{ m['content'] }}
{% endgeneration %}{% else %}{{ m['content'] }}
{% endif %}{% endfor %}"""
# As reasoning models: the last answer alone is shown with its thoughts.
THINKING = PLAIN.replace(
    "{{ m['content'] }}", "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}"
)


def chat(*contents, system=None):
    """Messages of the user and the assistant in turn."""
    said = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}] * (system is not None) + said


CHATS = {
    "one answer": chat("how many apples?", "there are 12"),
    "a system": chat("how many apples?", "there are 12", system="Answer."),
    "many turns": chat("how many apples?", "12", "and pears?", "there are 007 of them", "thanks", "é €, welcome"),
    "the user last": chat("how many?", "12", "and pears?"),
    "two answers": [*chat("how many?", "12"), {"role": "assistant", "content": "or 13"}],
    "spaces": chat(" how many? ", "  12  ", "\n", "\n\n5"),
    "the same words": chat("12", "12", "12", "12"),
}


@pytest.fixture(scope="module")
def tokenizer(llama):
    """A tokenizer with the given chat template."""

    def make(template):
        tokenizer = AutoTokenizer.from_pretrained(llama)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def configure(tmp_path):
    """A configuration on conversations, with a model whose tokenizer has the given template."""

    def make(chats, template=PLAIN, column="messages", name="t.jsonl", **options):
        folder = tmp_path / "llama"
        if not folder.exists():
            save_llama(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        rows = [x if isinstance(x, dict) else {column: x} for x in chats]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {
            "model": str(folder),
            "dataset": str(tmp_path / name),
            "task": "causal-lm",
            "clients": 2,
            "test_fraction": 0.25,
        }
        return SimulationConfig(
            **data | {"max_length": 400, "lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]}} | options
        )

    return make


def by_marks(tokenizer, messages):
    """What Transformers itself finds."""
    found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return found["input_ids"], found["assistant_masks"]


@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize(("plain", "marked"), [(PLAIN, MARKED), (SPACED, SPACED_MARKED)], ids=["ChatML", "spaced"])
def test_prefixes_find_what_marks_find(tokenizer, messages, plain, marked):
    expected = by_marks(tokenizer(marked), messages)
    assert 0 < sum(expected[1]) < len(expected[1])
    assert ChatEncoder(tokenizer(marked), "m")(messages) == expected
    assert ChatEncoder(tokenizer(plain), "m")(messages) == expected
    assert expected[0] == tokenizer(plain).apply_chat_template(messages, return_dict=True)["input_ids"]


def test_targets_are_every_answer_with_its_end(tokenizer):
    ids, targets = ChatEncoder(tokenizer(BRACKETS), "m")(CHATS["many turns"])
    own = tokenizer(BRACKETS).decode([i for i, target in zip(ids, targets, strict=True) if target])
    assert own == " 12</s>\n there are 007 of them</s>\n é €, welcome</s>\n"
    assert ids == tokenizer(BRACKETS).apply_chat_template(CHATS["many turns"], return_dict=True)["input_ids"]


@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
def test_a_tokenizer_without_offsets_finds_the_same_characters(tokenizer, messages):
    slow, template = ByT5Tokenizer(), PLAIN.replace("</s>", "")  # which ByT5 would strip blanks beside
    assert not slow.is_fast
    slow.chat_template = template
    ids, targets = ChatEncoder(slow, "m")(messages)
    fast_ids, fast_targets = ChatEncoder(tokenizer(template), "m")(messages)
    assert ids == slow.apply_chat_template(messages, return_dict=True)["input_ids"]
    own, expected = (
        t.decode([i for i, target in zip(some, which, strict=True) if target])
        for t, some, which in ((slow, ids, targets), (tokenizer(template), fast_ids, fast_targets))
    )
    assert own == expected


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        (chat("a", "b", "c", "d"), THINKING, "begins 'a': message 2 changes how the chat template shows those before it"),
        (chat("a", "b"), PLAIN.replace("<|assistant|>", "<|bot|>"), "begins 'a': message 2 changes how"),
        (chat("a", "b", system="s"), BRACKETS, "begins 's': the chat template refuses it: roles must alternate"),
        ([{"role": "assistant", "content": "hello"}], PLAIN, "begins 'hello': it begins with the assistant"),
        ([{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}], PLAIN, "its roles are human, gpt"),
        ([{"role": "user", "content": None}], PLAIN, "the content of message 1 is nothing, not text"),
        (
            [*chat("a"), {"role": "assistant", "content": [{"type": "text"}]}],
            PLAIN,
            "the content of message 2 is list, not text",
        ),
        ([{"content": "a"}], PLAIN, "message 1 has no role"),
        ([], PLAIN, "no message has the role assistant, .*; its roles are none"),
        (chat("a", "b"), PLAIN.replace("{{ m['content'] }}</s>\n", ""), "shows nothing of message 2"),
        (chat("a", "b"), MARKED.replace("== 'assistant'", "== 'bot'"), "marks no token of the assistant"),
    ],
)
def test_what_cannot_be_told_is_refused_by_its_beginning(tokenizer, messages, template, message):
    with pytest.raises(ValueError, match=message):
        ChatEncoder(tokenizer(template), "m")(messages)


def test_a_tokenizer_without_a_template_says_what_to_do(configure):
    with pytest.raises(
        ValueError, match=r"the tokenizer of .*llama has no chat template .* set prompt_template and response"
    ):
        load_task(configure([CHATS["one answer"]] * 4, template=None))


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_labels_are_the_assistants_tokens(configure, template):
    chats = list(CHATS.values())
    config = configure([{"messages": messages, "site": f"s{i % 2}"} for i, messages in enumerate(chats)], template)
    task = load_task(config)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    tokenizer.chat_template = MARKED
    expected = {tuple(ids): mask for ids, mask in (by_marks(tokenizer, messages) for messages in chats)}
    for data in (task.train, task.test):
        batch = task.collate(data, np.arange(len(data)), CPU)
        for ids, mask, labels in zip(*(batch[k].tolist() for k in ("input_ids", "attention_mask", "labels")), strict=True):
            ids = ids[: sum(mask)]
            own = expected.pop(tuple(ids))
            assert labels == [i if t else -100 for i, t in zip(ids, own, strict=True)] + [-100] * (len(mask) - len(ids))
    assert not expected


def test_a_long_conversation_is_cut_into_examples_and_the_log_says_so(configure, caplog):
    # The long questions fill pieces of their own.
    chats = [chat(*(f"question {i}, how many? {j} " * (1 + 9 * (j == 0)) for j in range(2 * i))) for i in range(1, 9)]
    whole = load_task(configure(chats, name="whole.jsonl", max_length=2000))
    caplog.set_level(logging.INFO, "fedrot.simulation")
    caplog.clear()
    task = load_task(configure(chats, max_length=60, partition_column=None))
    left_out = 0
    for data, complete, name in ((task.train, whole.train, "training"), (task.test, whole.test, "test")):
        expected, cut = [], 0
        for row in complete:
            cut += len(row["input_ids"]) > 60
            pieces = [
                (row["input_ids"][i : i + 60], row["targets"][i : i + 60]) for i in range(0, len(row["input_ids"]), 60)
            ]
            left_out += sum(not any(targets[1:]) for _, targets in pieces)
            expected += [(ids, targets) for ids, targets in pieces if any(targets[1:])]
        assert [(row["input_ids"], row["targets"]) for row in data] == expected
        assert (
            f"{cut} of {len(complete)} conversations of the {name} data are longer than max_length 60 tokens" in caplog.text
        )
        assert f"{len(expected)} in all" in caplog.text
    assert left_out > 5


def test_the_loss_is_the_mean_over_the_assistants_tokens(configure):
    task = load_task(configure(list(CHATS.values()) * 2))
    model, total, count = task.base_model.double().eval(), 0.0, 0
    for row in task.test:
        with torch.no_grad():
            chances = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for i, (token, target) in enumerate(zip(row["input_ids"], row["targets"], strict=True)):
            if target:
                total, count = total - chances[i - 1, token].item(), count + 1
    model.float()
    assert task.evaluate(model, 3, CPU)["loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_messages_are_found_among_other_columns(configure):
    one = CHATS["one answer"]
    assert "targets" in load_task(configure([{"id": "x", "messages": one}] * 4)).train.column_names
    assert "targets" in load_task(configure([{"id": "x", "talk": one}] * 4)).train.column_names
    both = [{"text": "a text", "messages": one}] * 4
    assert "targets" not in load_task(configure(both)).train.column_names
    assert "targets" in load_task(configure(both, text_column="messages")).train.column_names
    with pytest.raises(ValueError, match="2 columns of chat messages: chosen, rejected; set text_column to one"):
        load_task(configure([{"chosen": one, "rejected": one}] * 4))
    pairs = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    with pytest.raises(
        ValueError, match="column conversations of the training data holds lists of objects with from, value"
    ):
        load_task(configure([{"id": "x", "conversations": pairs}] * 4))


def test_messages_with_fields_of_their_own_are_read(configure):
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"n": 1}}}]
    tools = [*chat("how many?"), {"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": "7", "name": "f"}]
    tools.append({"role": "assistant", "content": "there are 007"})
    template = PLAIN.replace(
        "{{ m['content'] }}", "{{ m['content'] }}{% if m['tool_calls'] %}{{ m['tool_calls'] }}{% endif %}"
    )
    chats = [tools, CHATS["one answer"]] * 4
    task = load_task(configure(chats, template))
    tokenizer = AutoTokenizer.from_pretrained(task.base_model.name_or_path)
    expected = {tuple(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]) for messages in chats}
    assert {tuple(row["input_ids"]) for data in (task.train, task.test) for row in data} == expected


@pytest.mark.parametrize(
    ("chats", "options", "message"),
    [
        ([chat("a", "b"), chat("a", 5)], {}, "the content of the messages in column messages of the .* more than one type"),
        ([chat("2026-01-01", "2026-01-02")], {}, "the content of the messages in column messages of the .* holds timestamp"),
        (
            [{"messages": None}, {"messages": chat("a", "b")}],
            {},
            "rows of the training data have nothing in column 'messages'",
        ),
        (
            [chat("a", "b")],
            {"prompt_template": "{messages}", "response_template": "x"},
            "messages of the training data holds chat mess",
        ),
        (
            [chat("a", "b")],
            {"task": "text-classification", "text_column": "messages", "label_column": "messages"},
            "holds chat",
        ),
        ([chat("a", "b")], {"score": "exact_match"}, "exact_match needs prompt_template"),
    ],
)
def test_messages_that_cannot_be_used_are_refused_by_column(configure, chats, options, message):
    with pytest.raises(ValueError, match=message):
        load_task(configure(chats * 8, **options))


def test_clients_learn_to_answer(configure, tmp_path):
    rows = [{"messages": messages, "site": f"s{i % 2}"} for i, messages in enumerate(list(CHATS.values()) * 3)]
    config = configure(rows, partition_column="site", rounds=2, local_steps=15, batch_size=4, lr=0.03)
    metrics = simulate(config, tmp_path / "run", progress=False).metrics
    assert metrics[0]["clients"] == [0, 1] and metrics[1]["loss"] < metrics[0]["loss"] - 0.2
