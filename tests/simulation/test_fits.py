"""Texts that are longer than the model's positions, and tokens that its embedding has no row for."""

import json
import logging

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from fedrot.simulation import SimulationConfig, load_task, simulate
from fedrot.simulation.tasks import stdlib
from fedrot.simulation.tasks.fits import positions

from ..language_models import SIZES, save_llama

BERT = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def classify(tiny_bert, tmp_path):
    """A configuration of a classifier of this kind and configuration, on one text of so many words beside short ones."""

    def make(kind=BertForSequenceClassification, config=None, words=20, added=(), word="film", **options):
        folder = tmp_path / "model"
        kind(config or BertConfig(**BERT, max_position_embeddings=16)).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
        tokenizer.add_tokens(list(added))
        tokenizer.save_pretrained(folder)
        rows = [("a film", i % 2) for i in range(9)] + [(" ".join([word] * words), 1)]
        (tmp_path / "t.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
        data = {
            "model": str(folder),
            "dataset": str(tmp_path / "t.csv"),
            "test_dataset": str(tmp_path / "t.csv"),
            "clients": 2,
        }
        return SimulationConfig(**data | {"lora": {"r": 2, "target_modules": ["query"]}, "rounds": 1} | options)

    return make


def test_texts_beyond_the_positions_are_counted(classify):
    message = (
        r"max_length is 128, but the model .*model has 16 positions, and 1 of 10 rows of the training data are longer, "
        "up to 22 tokens: set max_length to at most 16"
    )
    with pytest.raises(ValueError, match=message):
        load_task(classify())


@pytest.mark.parametrize("options", [{"words": 14}, {"max_length": 16}])
def test_texts_that_fit_are_no_error(classify, tmp_path, options):
    simulate(classify(**options), tmp_path / "run", progress=False)


@pytest.mark.parametrize(("length", "fits"), [(14, True), (15, False)])
def test_roberta_has_fewer_positions_than_it_says(classify, length, fits):
    roberta = RobertaConfig(**BERT, max_position_embeddings=16, pad_token_id=1)
    config = classify(RobertaForSequenceClassification, roberta, max_length=length)
    if not fits:
        with pytest.raises(ValueError, match=r"max_length is 15, but the model .* has 14 positions"):
            load_task(config)
        return
    task = load_task(config)
    ids = torch.full((1, length), 5)
    task.base_model(input_ids=ids)
    with pytest.raises((IndexError, RuntimeError)):
        task.base_model(input_ids=torch.full((1, length + 1), 5))


def test_relative_positions_have_no_end():
    config = AutoConfig.for_model("deberta-v2", hidden_size=16, num_hidden_layers=0, num_attention_heads=2, vocab_size=12)
    config.position_biased_input = False
    model = torch.nn.Module()
    model.config = config
    assert positions(model) is None
    config.position_biased_input = True
    assert positions(model) == 512


def test_a_token_without_a_row_is_named_with_both_numbers(classify):
    message = (
        "the tokenizer of .*model has 13 tokens, but the model's embedding has 12 rows; 1 of 10 rows of the training data "
        r"have a token beyond it, such as 'novel': take the model's own tokenizer, .* resize_token_embeddings\(13\)"
    )
    with pytest.raises(ValueError, match=message):
        load_task(classify(words=3, added=["novel"], word="novel"))


def test_a_token_that_no_text_has_does_no_harm(classify, caplog, tmp_path):
    caplog.set_level(logging.WARNING, "fedrot.simulation")
    simulate(classify(words=3, added=["novel"]), tmp_path / "run", progress=False)
    assert "has 13 tokens, but the model's embedding has 12 rows; no text has a token beyond it" in caplog.text


@pytest.fixture
def language(tmp_path):
    """A configuration of a language model whose embedding has so many rows."""

    def make(rows, text="how many apples", **options):
        folder = save_llama(tmp_path / "llama")
        config = LlamaConfig(vocab_size=rows, bos_token_id=0, eos_token_id=1, **SIZES, max_position_embeddings=64)
        LlamaForCausalLM(config).save_pretrained(folder)
        (tmp_path / "t.jsonl").write_text((json.dumps({"text": text}) + "\n") * 10)
        data = {"model": str(folder), "dataset": str(tmp_path / "t.jsonl"), "task": "causal-lm", "clients": 2}
        return SimulationConfig(**data | {"lora": {"r": 2, "target_modules": ["q_proj"]}, "max_length": 64} | options)

    return make


def test_a_language_models_tokens_have_rows_too(language):
    size = len(AutoTokenizer.from_pretrained(language(300).model))
    load_task(language(size))
    with pytest.raises(
        ValueError, match=f"has {size} tokens, but the model's embedding has 50 rows; 9 of 9 rows of the train"
    ):
        load_task(language(50))


def test_a_padding_token_without_a_row_is_named(language):
    config = language(300)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(config.model)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(config.model)
    with pytest.raises(ValueError, match=f"has {len(tokenizer)} tokens, .* none for the padding token '<pad>'"):
        load_task(config)


def test_a_language_models_positions_hold_its_answers_too(language):
    with pytest.raises(
        ValueError, match=r"the model has 64 positions, fewer than max_length, which is 65: set .* at most 64"
    ):
        load_task(language(300, max_length=65))
    templates = {"prompt_template": "{text}", "response_template": " 5"}
    with pytest.raises(
        ValueError, match="max_length, which is 64 plus max_new_tokens, 8 more: set max_length to at most 56"
    ):
        load_task(language(300, score="exact_match", max_new_tokens=8, **templates))


def test_the_embedded_models_positions_count_too(monkeypatch):
    monkeypatch.setattr(stdlib, "stdlib_model", lambda: LlamaForCausalLM(LlamaConfig(**stdlib._SIZES)))  # not pretrained
    with pytest.raises(ValueError, match="the model has 2048 positions, fewer than max_length, which is 4096"):
        load_task(SimulationConfig(model="stdlib", dataset="stdlib", max_length=4096))
