"""The protocol between strategy and clients beside the arrays: the keys of its records, and what they hold."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from flwr.app import ConfigRecord, Message
from torch import Tensor

from ..adapters.config import check_lora, plain_config
from ..adapters.keys import factor_of
from ..adapters.update import Update, open_update
from ..agreement import write_digest
from ..methods.base import Method
from .arrays import to_arrays

State = dict[str, Tensor]

ROUND = "server-round"  # from 1; Flower's own key
TRAINED = "trained-factors"  # "AB", "A" or "B": what clients train this round
PERSONAL = "personal-factors"  # "", "A" or "B": what each client keeps to itself
BASE = "base-update-{}"  # an ArrayRecord to be folded into the base model, numbered from 1
BASE_CONFIG = "base-config-{}"  # a ConfigRecord with its adapter_config.json under "json"
CLIENT, NAME = "client", "name"  # the ConfigRecord of a reply, and its key with the client's name
LORA = "lora-config"  # in both directions: the digest of the sender's LoRA configuration


def read_config(message: Message) -> ConfigRecord:
    """Find the configuration that came with a message; an empty one if none did."""
    records = message.content.config_records.values()
    return next((record for record in records if ROUND in record), ConfigRecord())


def add_instructions(
    messages: Iterable[Message],
    record: str,
    method: Method,
    round: int,
    base_updates: Sequence[tuple[State, dict[str, Any]]],
    config: dict[str, Any] | None,
) -> list[Message]:
    """Add to messages what clients need to know beside the adapter.

    Args:
        messages: what Flower's FedAvg made.
        record: the key of the messages' configuration.
        method: decides what clients train and which factors they keep to themselves.
        round: the round's index, from 0.
        base_updates: every change of the base weights so far, with its LoRA configuration.
        config: the clients' LoRA configuration, which they compare with their own, if the server knows it.
    """
    messages = list(messages)
    contents = {id(message.content): message.content for message in messages}  # FedAvg sends all nodes the same one
    for content in contents.values():
        factors = {TRAINED: "".join(method.trains(round)), PERSONAL: find_personal_factors(method)}
        content.config_records[record].update(factors if config is None else factors | {LORA: write_digest(config)})
        for number, (update, base_config) in enumerate(base_updates, 1):
            content[BASE.format(number)] = to_arrays(update)
            content[BASE_CONFIG.format(number)] = ConfigRecord({"json": json.dumps(base_config)})
    return messages


def read_one_config(configs: Any, method: Method) -> dict[str, Any] | None:
    """Read the adapter_config.json of all clients' adapters.

    Args:
        configs: a ``peft.LoraConfig`` or its content, or None.
        method: decides whether there must be one.

    Raises:
        ValueError: there must be one, or there are several.
        UpdateError: not the configuration of a LoRA adapter that can be averaged.
    """
    if isinstance(configs, Sequence):
        raise ValueError("configs must be one peft.LoraConfig, which all clients have")
    if configs is None and method.updates_base:
        raise ValueError(f"{method.name} needs the scaling of the adapters: pass configs=, the clients' peft.LoraConfig")
    config = None if configs is None else plain_config(configs)
    if config is not None:
        check_lora(config, "configs")
    return config


def find_personal_factors(method: Method) -> str:
    """Find the factors that each client keeps to itself: "", "A" or "B"."""
    return "".join(factor for factor in "AB" if factor not in method.returns())


def complete_adapter(sent: Update, start: Update, method: Method) -> Update:
    """Complete the adapter that clients were sent to the one that they have.

    Args:
        sent: what clients were sent in a round.
        start: the whole adapter that the run started from.
        method: decides which factors each client keeps to itself.

    Returns:
        The tensors of ``start`` that were sent or are personal: all but base weights that the method has changed.
    """
    if sent.specs is start.specs:
        return start
    personal = tuple(find_personal_factors(method))
    keys = [key for key in start if key in sent or factor_of(key) in personal]
    return open_update(start.as_given({key: start[key] for key in keys}), start.name, start, start.config)
