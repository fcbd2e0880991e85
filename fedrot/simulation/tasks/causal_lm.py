"""Loading a causal language model and the texts, the conversations, or the prompts and responses that it learns."""

from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..config import SimulationConfig
from .chat import ChatEncoder, chat_column, encode_chats
from .columns import check_column, check_names
from .data import class_numbers, draw_subset, load_datasets
from .encoding import Encoder, fill_in, template_columns
from .fits import check_positions, check_vocabulary
from .language import LanguageTask
from .pretrained import check_model_folder, load_pretrained
from .scoring import Scorer, exact_match, final_number, pass_at_1

# HumanEval's templates and columns. Its prompt is the code that the answer continues.
_HUMANEVAL = ("{prompt}", "{canonical_solution}")
_HUMANEVAL_COLUMNS = ("prompt", "canonical_solution", "test", "entry_point")


def load_causal_lm(config: SimulationConfig) -> LanguageTask:
    """Load texts, conversations or instructions, with any causal language model.

    Raises:
        ValueError: options that contradict each other, or columns that are missing or hold no text.
    """
    check_options(config)
    check_model_folder(config.model)
    train, test = load_datasets(config)
    train, test = draw_subset(train, config.max_train_examples), draw_subset(test, config.max_test_examples)
    for column in (config.partition_column, config.label_column):
        if column is not None:
            check_names(train, column, "the training data")
    encoder = Encoder(AutoTokenizer.from_pretrained(config.model), config.max_length)
    templates = _templates(config)
    test_templates = _HUMANEVAL if config.score == "pass_at_1" else templates
    scorer = _scorer(config, encoder, test)
    if templates is None:
        train = draw_subset(_encode_texts(train, "the training data", encoder, config), config.max_train_examples)
    else:
        train = _encode_answers(train, "the training data", encoder, templates)
    if test_templates is None:
        test = draw_subset(_encode_texts(test, "the test data", encoder, config), config.max_test_examples)
    else:
        test = _encode_answers(test, "the test data", encoder, test_templates)
    labels, classes = class_numbers(train, config.label_column)
    model = load_pretrained(AutoModelForCausalLM, config)
    check_positions(model, config)
    examples = {
        name: (rows["input_ids"] for rows in data.iter(1000))
        for name, data in (("the training data", train), ("the test data", test))
    }
    check_vocabulary(model, encoder.tokenizer, encoder.pad_id, config, examples)
    defaults = {"task_type": "CAUSAL_LM"}
    return LanguageTask(train, test, labels, classes, model, defaults, encoder.pad_id, scorer)


def check_options(config: SimulationConfig) -> None:
    """Refuse templates and scores that contradict each other."""
    if (config.prompt_template is None) != (config.response_template is None):
        raise ValueError("prompt_template and response_template go together: set both or neither")
    if config.score == "exact_match" and config.response_template is None:
        raise ValueError("exact_match needs prompt_template and response_template, to know what to ask and to answer")
    if config.score == "pass_at_1" and not config.execute_generated_code:
        raise ValueError("pass_at_1 runs code that the model wrote: set execute_generated_code to allow that")


def _templates(config: SimulationConfig) -> tuple[str, str] | None:
    if config.prompt_template is None or config.response_template is None:
        return None
    return config.prompt_template, config.response_template


def _text_column(data: Dataset, name: str, config: SimulationConfig) -> str:
    """Find the column of the text: the configured one, or "text", or the only one that holds text."""
    if config.text_column is not None:
        return config.text_column
    if "text" in data.column_names:
        return "text"
    found = [column for column, feature in data.features.items() if "string" in str(getattr(feature, "dtype", ""))]
    if len(found) != 1:
        raise ValueError(
            f"{name} has {len(found)} columns of text; its columns are {', '.join(data.column_names)}; set text_column, or "
            "prompt_template and response_template"
        )
    return str(found[0])


def _encode_texts(data: Dataset, name: str, encoder: Encoder, config: SimulationConfig) -> Dataset:
    """Make a row per window of every text or conversation, with the columns that the partition needs."""
    kept = [c for c in data.column_names if c in (config.partition_column, config.label_column)]
    if (chats := chat_column(data, name, config.text_column)) is not None:
        return encode_chats(data, chats, name, ChatEncoder(encoder.tokenizer, config.model), config.max_length, kept)
    column = _text_column(data, name, config)
    check_column(data, column, name, text=True)

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        windows = encoder.windows(rows[column])
        encoded = {"input_ids": [ids for text in windows for ids in text]}
        repeated = {key: [x for x, text in zip(rows[key], windows, strict=True) for _ in text] for key in kept}
        return {**repeated, **encoded, "prompt_tokens": [0] * len(encoded["input_ids"])}

    encoded = data.map(encode, batched=True, remove_columns=[c for c in data.column_names if c not in kept])
    if not len(encoded):
        raise ValueError(f"no text in column {column} of {name} has two tokens, of which the second could be predicted")
    return encoded


def _encode_answers(data: Dataset, name: str, encoder: Encoder, templates: tuple[str, str]) -> Dataset:
    """Add the tokens of prompts with their responses to the columns that they are made of."""
    _check_templates(data, name, templates)

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        ids, sizes = encoder.answers(*(fill_in(template, rows) for template in templates))
        return {"input_ids": ids, "prompt_tokens": sizes}

    return data.map(encode, batched=True)


def _check_templates(data: Dataset, name: str, templates: tuple[str, str]) -> None:
    for column in {column: None for template in templates for column in template_columns(template)}:
        check_column(data, column, name)


def _scorer(config: SimulationConfig, encoder: Encoder, test: Dataset) -> Scorer | None:
    if config.score is None:
        return None
    if config.score == "pass_at_1":
        for column in _HUMANEVAL_COLUMNS:
            check_column(test, column, "the test data", text=True)
        return Scorer(config.score, encoder, _HUMANEVAL[0], pass_at_1, config.score_examples, config.max_new_tokens)
    prompt, response = config.prompt_template, config.response_template
    assert prompt is not None and response is not None
    _check_templates(test, "the test data", (prompt, response))
    answers = fill_in(response, test[: config.score_examples])
    if missing := sum(final_number(text) is None for text in answers):
        raise ValueError(f"{missing} of the {len(answers)} responses to score have no number; exact_match needs one")
    return Scorer(config.score, encoder, prompt, exact_match(response), config.score_examples, config.max_new_tokens)
