"""Whether the tokens of a dataset fit the model: their number its positions, and each of them its embedding."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import SimulationConfig

_log = logging.getLogger(__name__)

Batches = Iterable[list[list[int]]]


def positions(model: PreTrainedModel) -> int | None:
    """Return how many tokens an input may have, or None if the model does not say or has relative positions only."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not limit or limit < 0 or not getattr(config, "position_biased_input", True):
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1  # RoBERTa counts from behind its padding token's number
    return int(limit)


def check_positions(model: PreTrainedModel, config: SimulationConfig) -> None:
    """Refuse more tokens, of a language model's examples and answers, than the model has positions."""
    needed, limit = config.max_length + (config.max_new_tokens if config.score else 0), positions(model)
    if limit is not None and needed > limit:
        answers = f" plus max_new_tokens, {config.max_new_tokens} more" if config.score else ""
        raise ValueError(
            f"the model has {limit} positions, fewer than max_length, which is {config.max_length}{answers}: set max_length "
            f"to at most {limit - needed + config.max_length}, or take another model than {config.model}"
        )


def check_lengths(model: PreTrainedModel, config: SimulationConfig, examples: Mapping[str, Batches]) -> None:
    """Refuse texts that are longer than the model's positions, where ``max_length`` would let them pass.

    Args:
        model: the model.
        config: its max_length and model count.
        examples: the name of a dataset → batches of its texts' tokens, cut at max_length. They are looked at only where
            max_length exceeds the positions.
    """
    limit = positions(model)
    if limit is None or config.max_length <= limit:
        return
    for name, batches in examples.items():
        lengths = [len(ids) for batch in batches for ids in batch]
        if max(lengths, default=0) > limit:
            raise ValueError(
                f"max_length is {config.max_length}, but the model {config.model} has {limit} positions, and "
                f"{sum(n > limit for n in lengths)} of {len(lengths)} rows of {name} are longer, up to {max(lengths)} "
                f"tokens: set max_length to at most {limit}"
            )


def check_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pad: int,
    config: SimulationConfig,
    examples: Mapping[str, Batches],
) -> None:
    """Refuse tokens that the model's embedding has no row for.

    Tokens that no text has do no harm, as where a tokenizer knows one for images. The log names them.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        pad: the token that fills up short rows.
        config: its model names both.
        examples: as ``check_lengths`` takes them. They are looked at only where the tokenizer is larger than the embedding.
    """
    embedding: Any = model.get_input_embeddings()
    rows, known = embedding.weight.shape[0], max(tokenizer.get_vocab().values()) + 1
    if known <= rows:
        return
    sizes = f"the tokenizer of {config.model} has {known} tokens, but the model's embedding has {rows} rows"
    cure = f"take the model's own tokenizer, or save the model after resize_token_embeddings({known})"
    if pad >= rows:
        raise ValueError(f"{sizes}, and none for the padding token {tokenizer.convert_ids_to_tokens(pad)!r}: {cure}")
    for name, batches in examples.items():
        beyond = [max(ids, default=0) for batch in batches for ids in batch]
        if found := [token for token in beyond if token >= rows]:
            raise ValueError(
                f"{sizes}; {len(found)} of {len(beyond)} rows of {name} have a token beyond it, such as "
                f"{tokenizer.convert_ids_to_tokens(found[0])!r}: {cure}"
            )
    _log.warning("%s; no text has a token beyond it", sizes)
