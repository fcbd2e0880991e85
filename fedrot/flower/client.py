"""A client's side of a round: what the server sent goes into a PEFT model, and what was trained goes back."""

import json
from collections.abc import Mapping
from itertools import count
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor

from ..errors import UpdateError
from ..folding import fold_update
from ..keys import factor_of
from .arrays import from_arrays, to_arrays
from .settings import BASE, BASE_CONFIG, CLIENT, NAME, PERSONAL, TRAINED, settings_of

# The record in the client's state that keeps its own factors from round to round.
_OWN = "fedrot-personal"
# The attribute in which a model remembers how many base updates it has had.
_FOLDED = "_fedrot_folded"


def receive(model: Any, message: Message, context: Context) -> None:
    """Load what the ``FedRot`` strategy sent into a PEFT model, and freeze the factors that the method does not train.

    Methods that change the base weights (FLoRA, FedEx-LoRA) send every change so far: the model is either as it was before
    the first round, or one that received the rounds before. Of methods that leave clients a factor of their own
    (FedSA-LoRA) it comes from the client's state, in the first round from the model.

    Args:
        model: a ``peft.PeftModel`` with the adapter's configuration.
        message: of training or evaluation.
        context: of this client.

    Raises:
        UpdateError: the arrays are not this model's adapter, by key and shapes.
    """
    from peft import set_peft_model_state_dict

    settings = settings_of(message)
    _fold_new(model, message)
    sent = from_arrays(_adapter(message), "the server")
    # A base that changes is not sent with the adapter, as PEFT saves those of embeddings.
    folded = hasattr(model, _FOLDED)
    expected = {key: x for key, x in _state(model).items() if not (folded and ".base_layer." in key)}
    own = _own_factors(expected, settings)
    kept = from_arrays(context.state.array_records.get(_OWN, ArrayRecord()), "this client's state")
    state = sent | {key: kept.get(key, x) for key, x in own.items() if key not in sent}
    for key in state.keys() | expected.keys():
        has, needs = (tuple(d[key].shape) if key in d else "no such key" for d in (state, expected))
        if has != needs:
            raise UpdateError(f"{key}: the server sent {has}, the model has {needs}; build it with one LoRA configuration")
    set_peft_model_state_dict(model, state)
    trained = str(settings.get(TRAINED, "AB"))
    for name, p in model.named_parameters():
        if (factor := factor_of(name)) is not None and message.metadata.message_type.startswith("train"):
            p.requires_grad_(factor in trained)


def reply(
    model: Any,
    message: Message,
    context: Context,
    metrics: Mapping[str, float | int],
    *,
    name: str | None = None,
    widen: bool = False,
) -> Message:
    """The answer to a training message: the model's adapter and the metrics. Factors that are the client's own stay.

    Args:
        model: as ``receive`` filled it and the client trained it.
        message: the one to answer.
        context: of this client.
        metrics: numbers, among them "num-examples".
        name: how the server's log and report call this client, the same every round; by default "client {partition-id}",
            where the node has one.
        widen: as in ``to_arrays``.
    """
    state = _state(model)
    own = _own_factors(state, settings_of(message))
    if own:
        context.state[_OWN] = to_arrays(own)
    records: dict[str, Any] = {
        "arrays": to_arrays({key: x for key, x in state.items() if key not in own}, widen=widen),
        "metrics": MetricRecord(dict(metrics)),
    }
    if name is None and "partition-id" in context.node_config:
        name = f"client {context.node_config['partition-id']}"
    if name is not None:
        records[CLIENT] = ConfigRecord({NAME: name})
    return Message(RecordDict(records), reply_to=message)


def _state(model: Any) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


def _own_factors(state: Mapping[str, Tensor], settings: ConfigRecord) -> dict[str, Tensor]:
    personal = str(settings.get(PERSONAL, ""))
    return {key: x for key, x in state.items() if (factor := factor_of(key)) is not None and factor in personal}


def _adapter(message: Message) -> ArrayRecord:
    prefix = BASE.format("")
    records = [record for key, record in message.content.array_records.items() if not key.startswith(prefix)]
    if len(records) != 1:
        raise UpdateError(f"the server sent {len(records)} ArrayRecords; expected one, the adapter")
    return records[0]


def _fold_new(model: Any, message: Message) -> None:
    """Fold the base updates that this model has not had yet."""
    for number in count(getattr(model, _FOLDED, 0) + 1):
        arrays = message.content.array_records.get(BASE.format(number))
        if arrays is None:
            return
        config = json.loads(str(message.content.config_records[BASE_CONFIG.format(number)]["json"]))
        fold_update(model, from_arrays(arrays, "the base update"), config)
        setattr(model, _FOLDED, number)
