"""Encoding texts, and prompts with their responses, as tokens."""

from collections.abc import Sequence
from string import Formatter
from typing import Any

from transformers import PreTrainedTokenizerBase


class Encoder:
    """Encodes texts from the beginning token, if the tokenizer sets one, to the end-of-text token.

    Attributes:
        tokenizer: the tokenizer.
        max_length: the most tokens that an example has.
        begin, end: the tokens that every text begins and ends with.
        pad_id: a token that fills up short rows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        """Take the special tokens from the tokenizer; ValueError if it has no end-of-text token."""
        if tokenizer.eos_token_id is None:
            raise ValueError("the model's tokenizer has no end-of-text token (eos_token); use one of a causal model")
        self.tokenizer, self.max_length = tokenizer, max_length
        bos = tokenizer.bos_token_id
        self.begin = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
        self.end = [tokenizer.eos_token_id]
        self.pad_id: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def windows(self, texts: Sequence[str]) -> list[list[list[int]]]:
        """Cut every text's tokens into consecutive pieces, without pieces of one token, which have nothing to predict."""
        whole = [self.begin + ids + self.end for ids in self._tokens(texts)]
        starts = [range(0, len(ids), self.max_length) for ids in whole]
        return [
            [ids[i : i + self.max_length] for i in at if len(ids) > i + 1] for ids, at in zip(whole, starts, strict=True)
        ]

    def answers(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """Return the tokens of every prompt with its response, and how many of them are the prompt's.

        If they are too long, the prompt loses its beginning, down to half of ``max_length``, then the response its end.
        """
        rows, sizes = [], []
        for prompt, response in zip(self._tokens(prompts), self._tokens(responses), strict=True):
            response = response + self.end
            prompt = self._shorten(prompt, max(self.max_length - len(response), self.max_length // 2))
            rows.append((prompt + response)[: self.max_length])
            sizes.append(len(prompt))
        return rows, sizes

    def prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of prompts to answer; a prompt that is too long loses its beginning."""
        return [self._shorten(prompt, self.max_length) for prompt in self._tokens(prompts)]

    def _shorten(self, prompt: list[int], size: int) -> list[int]:
        """Keep the beginning token and the prompt's last tokens, ``size`` in all."""
        return self.begin + prompt[max(0, len(prompt) + len(self.begin) - size) :]

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        tokens: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return tokens


def template_columns(template: str) -> list[str]:
    """List the columns that a template names in braces."""
    return [name for _, name, _, _ in Formatter().parse(template) if name is not None]


def literal_columns(template: str) -> list[str]:
    """List the columns that a template takes as they are, without a format such as ``{price:.2f}``, which needs numbers."""
    fields = [(name, spec) for _, name, spec, _ in Formatter().parse(template) if name is not None]
    return [name for name in dict.fromkeys(name for name, _ in fields) if not any(s for n, s in fields if n == name)]


def fill_in(template: str, rows: dict[str, list[Any]]) -> list[str]:
    """Fill a template in for every row."""
    columns = template_columns(template)
    count = len(next(iter(rows.values())))
    return [template.format(**{name: rows[name][i] for name in columns}) for i in range(count)]
