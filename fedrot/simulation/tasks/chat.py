"""Encoding conversations by the tokenizer's chat template, with the tokens of the assistant as targets."""

import logging
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .columns import check_column, check_messages, is_of_messages, is_of_pairs, may_hold_messages

_log = logging.getLogger(__name__)

MESSAGES, ASSISTANT = "messages", "assistant"
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = Mapping[str, Any]


class _RefusedError(Exception):
    """A conversation that the template does not take, or whose assistant it does not show."""


class ChatEncoder:
    """Renders conversations by a tokenizer's chat template and finds the assistant's tokens.

    A template with ``{% generation %}`` marks them itself. Without, they are what the rendered conversation gains by each
    message of the assistant, after the prompt that the template puts before an answer.

    Args:
        tokenizer: the tokenizer.
        model: its name or folder, for errors.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: str):
        if tokenizer.chat_template is None:
            raise ValueError(
                f"the tokenizer of {model} has no chat template to render messages with: use an instruct model, or save a "
                "chat_template.jinja beside the tokenizer, or write the rows as columns and set prompt_template and "
                "response_template"
            )
        self.tokenizer = tokenizer
        self.marks = tokenizer.is_fast and _MARKS.search(tokenizer.get_chat_template()) is not None

    def __call__(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Return the tokens of a conversation, and for each of them 1 if it is the assistant's and 0 otherwise.

        Raises:
            ValueError: see ``_check`` and the class; the error quotes the conversation.
        """
        try:
            _check(messages)
            try:
                ids, targets = self._by_marks(messages) if self.marks else self._by_prefixes(messages)
            except (TemplateError, TypeError, ValueError) as error:
                raise _RefusedError(f"the chat template refuses it: {error}") from error
            if not any(targets):
                raise _RefusedError("the chat template marks no token of the assistant")
        except _RefusedError as error:
            raise ValueError(f"the conversation that begins {_beginning(messages)}: {error}") from error
        return ids, targets

    def _by_marks(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        apply: Any = self.tokenizer.apply_chat_template
        found = apply(list(messages), return_dict=True, return_assistant_tokens_mask=True)
        return found["input_ids"], found["assistant_masks"]

    def _by_prefixes(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        whole = self._render(messages)
        ends = [0]  # of what is not the assistant's, of what is, and so on: numbers of characters
        for i, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            if i == 0:
                raise _RefusedError("it begins with the assistant, which the chat template has no prompt for")
            prompt, through = self._render(messages[:i], add_generation_prompt=True), self._render(messages[: i + 1])
            if not (through.startswith(prompt) and whole.startswith(through)) or len(prompt) < ends[-1]:
                raise _RefusedError(
                    f"message {i + 1} changes how the chat template shows those before it, so that the assistant's tokens "
                    "cannot be told; mark them in the template by {% generation %}, or end the conversation there"
                )
            if len(through) == len(prompt):
                raise _RefusedError(f"the chat template shows nothing of message {i + 1}")
            ends += [len(prompt), len(through)]
        ids, counts = self._tokens(whole, ends)
        targets = [0] * len(ids)
        for begin, end in list(pairwise(counts))[1::2]:
            targets[begin:end] = [1] * (end - begin)
        return ids, targets

    def _render(self, messages: Sequence[Message], **options: Any) -> str:
        apply: Any = self.tokenizer.apply_chat_template
        return str(apply(list(messages), tokenize=False, **options))

    def _tokens(self, text: str, ends: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the tokens of a text, and for each end how many of them lie within so many of its first characters."""
        if self.tokenizer.is_fast:
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids: list[int] = found["input_ids"]
            # A token across an end belongs to what follows: it is generated, and not given.
            beyond = [[stop > end for _, stop in found["offset_mapping"]] for end in ends]
            return ids, [flags.index(True) if True in flags else len(ids) for flags in beyond]
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        counts = []
        for end in ends:
            first = self.tokenizer(text[:end], add_special_tokens=False)["input_ids"]
            if ids[: len(first)] != first:
                raise _RefusedError("a token lies across the beginning or the end of a message of the assistant")
            counts.append(len(first))
        return ids, counts


def _check(messages: Any) -> None:
    """Refuse what is no conversation with an assistant."""
    if not isinstance(messages, Sequence) or not all(isinstance(x, Mapping) for x in messages):
        raise _RefusedError("it is no list of messages")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message.get("role"), str):
            raise _RefusedError(f"message {number} has no role; a message has role and content")
        content = message.get("content")
        calls_tools = message["role"] == ASSISTANT and content is None and message.get("tool_calls")
        if not isinstance(content, str) and not calls_tools:
            shown = "nothing" if content is None else f"{type(content).__name__}"
            raise _RefusedError(f"the content of message {number} is {shown}, not text")
    if not any(message["role"] == ASSISTANT for message in messages):
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages)) or "none"
        raise _RefusedError(f"no message has the role {ASSISTANT}, which is what is learned; its roles are {roles}")


def _beginning(messages: Any) -> str:
    first = messages[0] if isinstance(messages, Sequence) and messages else None
    return repr(str(first.get("content", first) if isinstance(first, Mapping) else first)[:60])


def chat_column(data: Dataset, name: str, text_column: str | None) -> str | None:
    """Find the column of the messages: the configured one, or "messages", or the only one; None if the data has texts."""
    if text_column is not None:
        return text_column if may_hold_messages(data.features.get(text_column)) else None
    if "text" in data.column_names:
        return None
    for column, feature in data.features.items():
        if is_of_pairs(feature):
            check_column(data, column, name, text=True)
    if MESSAGES in data.column_names and may_hold_messages(data.features[MESSAGES]):
        return MESSAGES
    found = [column for column, feature in data.features.items() if is_of_messages(feature)]
    if len(found) > 1:
        raise ValueError(f"{name} has {len(found)} columns of chat messages: {', '.join(found)}; set text_column to one")
    return found[0] if found else None


def encode_chats(
    data: Dataset, column: str, name: str, encoder: ChatEncoder, max_length: int, kept: Sequence[str]
) -> Dataset:
    """Make a row per window of every conversation that has tokens of the assistant, with the columns that are ``kept``.

    The rows have input_ids, targets (1 for tokens of the assistant) and prompt_tokens, which is 0. The log counts the
    conversations that are longer than ``max_length`` tokens.
    """
    check_messages(data, column, name)

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        result: dict[str, list[Any]] = {key: [] for key in (*kept, "input_ids", "targets", "prompt_tokens", "is_cut")}
        for i, messages in enumerate(rows[column]):
            ids, targets = encoder(messages)
            is_cut = len(ids) > max_length
            for start in range(0, len(ids), max_length):
                window, own = ids[start : start + max_length], targets[start : start + max_length]
                if any(own[1:]):  # the first token is never predicted
                    row = {"input_ids": window, "targets": own, "prompt_tokens": 0, "is_cut": is_cut}
                    for key, value in (row | {key: rows[key][i] for key in kept}).items():
                        result[key].append(value)
                    is_cut = False
        return result

    encoded = data.map(encode, batched=True, remove_columns=[c for c in data.column_names if c not in kept])
    if not len(encoded):
        raise ValueError(f"no conversation of {name} has a token of the assistant to predict")
    if cut := sum(encoded["is_cut"][:]):
        _log.warning(
            "%d of %d conversations of %s are longer than max_length %d tokens and are cut into several examples, %d in "
            "all; pieces without a token of the assistant are left out",
            *(cut, len(data), name, max_length, len(encoded)),
        )
    return encoded.remove_columns("is_cut")
