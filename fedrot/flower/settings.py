"""What the strategy tells clients beside the arrays: the keys of its records."""

from flwr.app import ConfigRecord, Message

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
