"""The protocol between strategy and clients beside the arrays: the keys of its records."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from flwr.app import ConfigRecord, Message
from torch import Tensor

from .arrays import to_arrays

ROUND = "server-round"  # from 1; Flower's
TRAINED = "trained-factors"  # "AB", "A" or "B": what clients train this round
PERSONAL = "personal-factors"  # "", "A" or "B": what each client keeps to itself
BASE = "base-update-{}"  # an ArrayRecord to be folded into the base model, numbered from 1
BASE_CONFIG = "base-config-{}"  # a ConfigRecord with its adapter_config.json under "json"
CLIENT, NAME = "client", "name"  # of a reply: the ConfigRecord and its key with the client's name


def settings_of(message: Message) -> ConfigRecord:
    """The configuration that came with a message; empty where there is none."""
    records = message.content.config_records.values()
    return next((record for record in records if ROUND in record), ConfigRecord())


def add_instructions(
    messages: Iterable[Message], record: str, trained: str, personal: str, base: Sequence[tuple[dict[str, Tensor], Any]]
) -> list[Message]:
    """Add to messages what clients need to know beside the adapter.

    Args:
        messages: as Flower's FedAvg makes them.
        record: the key of their configuration.
        trained, personal: the factors.
        base: every base update so far, with its adapter_config.json.
    """
    messages = list(messages)
    contents = {id(message.content): message.content for message in messages}  # FedAvg sends all nodes the same one
    for content in contents.values():
        content.config_records[record].update({TRAINED: trained, PERSONAL: personal})
        for number, (update, config) in enumerate(base, 1):
            content[BASE.format(number)] = to_arrays(update)
            content[BASE_CONFIG.format(number)] = ConfigRecord({"json": json.dumps(config)})
    return messages
