"""Scoring a language model's answers: by the final number, or by running generated code against its tests."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from .code_execution import passes
from .encoding import Encoder, fill_in

# A sign after a digit is a minus between two numbers.
_NUMBER = re.compile(r"(?:(?<![0-9)])-)?\$?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")
# The end of a function of HumanEval: before a line that is not indented.
_AFTER_FUNCTION = re.compile(r"\n(?=[^\s])")
_MAX_BATCH = 32

Grade = Callable[[Sequence[str], dict[str, list[Any]]], Sequence[bool]]


@dataclass
class Scorer:
    """Has a model answer prompts greedily, and grades the answers.

    Attributes:
        name: the score's name.
        encoder: encodes prompts, and decodes answers by its tokenizer.
        prompt: the template of the prompt.
        grade: answers and the rows that they answer → which are right.
        examples: the number of rows to score, the first ones.
        max_new_tokens: the maximum number of tokens of an answer.
    """

    name: str
    encoder: Encoder
    prompt: str
    grade: Grade
    examples: int
    max_new_tokens: int

    def __call__(
        self, model: torch.nn.Module, test: Dataset, rows: np.ndarray, batch_size: int, device: torch.device
    ) -> dict[str, float]:
        """Measure the part of the rows that the model answers right. The model is in evaluation mode."""
        chosen = test[rows[: self.examples].tolist()]
        prompts = self.encoder.prompts(fill_in(self.prompt, chosen))
        answers = self._answer(model, prompts, min(batch_size, _MAX_BATCH), device)
        return {self.name: float(np.mean(self.grade(answers, chosen)))}

    def _answer(self, model: torch.nn.Module, prompts: list[list[int]], batch_size: int, device: torch.device) -> list[str]:
        order = np.argsort([len(ids) for ids in prompts], kind="stable")
        answers = [""] * len(prompts)
        generate: Any = model.generate
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            width = max(len(prompts[i]) for i in some)
            tokens, mask = torch.full((len(some), width), self.encoder.pad_id), torch.zeros(len(some), width).long()
            for row, i in enumerate(some):  # padded on the left: the answer follows the prompt
                tokens[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            output = generate(
                input_ids=tokens.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                use_cache=True,
                eos_token_id=self.encoder.end,
                pad_token_id=self.encoder.pad_id,
            )
            texts = self.encoder.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
            for i, text in zip(some, texts, strict=True):
                answers[i] = text
        return answers


def final_number(text: str) -> Decimal | None:
    """Find the number after the first ``####``, as in GSM8K's answers, or else the last number of the text.

    Thousands separators, a dollar sign and a trailing dot do not count: "$1,234." is 1234.

    Returns:
        The number, or None if there is none.
    """
    _, marker, answer = text.partition("####")
    numbers = _NUMBER.findall(answer if marker else text)
    if not numbers:
        return None
    return Decimal((numbers[0] if marker else numbers[-1]).replace(",", "").replace("$", ""))


def exact_match(response: str) -> Grade:
    """Make a grade by whether an answer's final number is that of the response template."""

    def grade(answers: Sequence[str], rows: dict[str, list[Any]]) -> list[bool]:
        expected = [final_number(text) for text in fill_in(response, rows)]
        return [n is not None and final_number(text) == n for text, n in zip(answers, expected, strict=True)]

    return grade


def pass_at_1(answers: Sequence[str], rows: dict[str, list[Any]]) -> list[bool]:
    """Grade answers as HumanEval does: whether the prompt's function, completed by the answer, passes the row's test."""
    programs = [
        f"{prompt}{_AFTER_FUNCTION.split(answer, maxsplit=1)[0]}\n\n{test}\n\ncheck({entry_point})\n"
        for answer, prompt, test, entry_point in zip(answers, rows["prompt"], rows["test"], rows["entry_point"], strict=True)
    ]
    return [passes(program) for program in programs]
