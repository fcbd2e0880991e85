"""A client's side of a round: what the server sent goes into a PEFT model, and what was trained goes back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from torch import Tensor

from ..adapters.keys import factor_of, parse_key
from ..errors import UpdateError
from ..report.fold import merge_into_base
from .arrays import from_arrays, to_arrays
from .protocol import BASE, BASE_CONFIG, CLIENT, NAME, PERSONAL, TRAINED, settings_of

# The record in the client's state that keeps its own factors from round to round.
_OWN = "fedrot-personal"
_MEMORY = "_fedrot_memory"


@dataclass
class _Memory:
    """What ``receive`` did to a model, kept with it: the next message may find the model as this one leaves it.

    Attributes:
        run: Flower's run.
        folded: how many base updates the model has had.
        frozen: names of parameters that a method does not train this round, and that were trainable before.
        own: factors that clients keep to themselves, as the model had them before the first message.
    """

    run: int
    folded: int = 0
    frozen: set[str] = field(default_factory=set)
    own: dict[str, Tensor] = field(default_factory=dict)


def receive(model: Any, message: Message, context: Context) -> None:
    """Load what the ``FedRot`` strategy sent into a PEFT model, and freeze the factors that the method does not train.

    The model may be new for every message, or stay, also where one model serves several clients. Methods that change the
    base weights (FLoRA, FedEx-LoRA) send every change so far; those that the model has had already are left out. Of methods
    that leave clients a factor of their own (FedSA-LoRA) it comes from the client's state; without one, it is the server's
    in the first round, and later, for a client that joins late, the model's from before its first message.

    Args:
        model: a ``peft.PeftModel`` with one active adapter, which is the one loaded.
        message: of training or evaluation.
        context: of this client.

    Raises:
        UpdateError: the arrays are not this model's adapter, by key and shapes, or it has had base updates of another run.
    """
    from peft import set_peft_model_state_dict

    adapter, settings = _active(model), settings_of(message)
    state = _state(model, adapter)
    if not hasattr(model, _MEMORY):
        own = {key: x.detach().clone() for key, x in _own_factors(state, settings).items()}
        setattr(model, _MEMORY, _Memory(context.run_id, own=own))
    memory: _Memory = getattr(model, _MEMORY)
    _fold_new(model, message, context, memory)
    # PEFT saves the base weights of some adapters; one that the method changes is not sent.
    expected = {key: x for key, x in state.items() if not (memory.folded and key.endswith(".base_layer.weight"))}
    sent = from_arrays(_adapter(message), "the server")
    kept = memory.own | from_arrays(context.state.array_records.get(_OWN, ArrayRecord()), "this client's state")
    loaded = {key: kept[key] for key in _own_factors(expected, settings) if key in kept and key not in sent} | sent
    for key in loaded.keys() | expected.keys():
        has, needs = (tuple(d[key].shape) if key in d else "no such key" for d in (loaded, expected))
        if has != needs:
            raise UpdateError(f"{key}: the server sent {has}, the model has {needs}; build it with one LoRA configuration")
    set_peft_model_state_dict(model, loaded, adapter_name=adapter)
    training = message.metadata.message_type.startswith(MessageType.TRAIN)
    _freeze(model, adapter, str(settings.get(TRAINED, "AB")) if training else "AB", memory)


def reply(
    model: Any, message: Message, context: Context, metrics: Mapping[str, float | int], *, name: str | None = None
) -> Message:
    """The answer to a message: the metrics and, after training, the model's adapter, each tensor in the dtype in which it
    was received. Factors that are the client's own stay with it.

    Args:
        model: as ``receive`` filled it and the client trained it.
        message: the one to answer.
        context: of this client.
        metrics: numbers, among them "num-examples".
        name: how the server's log and report call this client, the same every round; by default "client {partition-id}",
            where the node has one.
    """
    records: dict[str, Any] = {"metrics": MetricRecord(dict(metrics))}
    if message.metadata.message_type.startswith(MessageType.TRAIN):
        records["arrays"] = _trained(model, message, context)
    if name is None and "partition-id" in context.node_config:
        name = f"client {context.node_config['partition-id']}"
    if name is not None:
        records[CLIENT] = ConfigRecord({NAME: name})
    return Message(RecordDict(records), reply_to=message)


def _trained(model: Any, message: Message, context: Context) -> ArrayRecord:
    settings, sent = settings_of(message), _adapter(message)
    state = _state(model, _active(model))
    if own := _own_factors(state, settings):
        context.state[_OWN] = to_arrays(own)
    arrays = ArrayRecord()
    for key in (key for key in sent if key in state and key not in own):  # Flower's mods compare the order
        if factor_of(key) in (None, *str(settings.get(TRAINED, "AB"))):
            arrays[key] = to_arrays({key: state[key].to(getattr(torch, sent[key].dtype))})[key]
        else:  # frozen: to the bit, though the model's dtype may have rounded it
            arrays[key] = sent[key]
    return arrays


def _active(model: Any) -> str:
    adapters = model.active_adapters
    if len(adapters) != 1:
        raise UpdateError(f"the model has the active adapters {', '.join(adapters)}; activate the one that is federated")
    return adapters[0]


def _state(model: Any, adapter: str) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model, adapter_name=adapter)


def _own_factors(state: Mapping[str, Tensor], settings: ConfigRecord) -> dict[str, Tensor]:
    personal = str(settings.get(PERSONAL, ""))
    return {key: x for key, x in state.items() if (factor := factor_of(key)) is not None and factor in personal}


def _adapter(message: Message) -> ArrayRecord:
    prefix = BASE.format("")
    records = [record for key, record in message.content.array_records.items() if not key.startswith(prefix)]
    if len(records) != 1:
        raise UpdateError(f"the server sent {len(records)} ArrayRecords; expected one, the adapter")
    return records[0]


def _fold_new(model: Any, message: Message, context: Context, memory: _Memory) -> None:
    """Fold the base updates that this model has not had yet."""
    arrays, configs = message.content.array_records, message.content.config_records
    if memory.folded and (memory.run != context.run_id or BASE.format(memory.folded) not in arrays):
        raise UpdateError(f"the model has had {memory.folded} base updates of another run; build it anew")
    memory.run = context.run_id
    for number in count(memory.folded + 1):
        if BASE.format(number) not in arrays:
            return
        config = json.loads(str(configs[BASE_CONFIG.format(number)]["json"]))
        merge_into_base(model, from_arrays(arrays[BASE.format(number)], "the base update"), config)
        memory.folded = number


def _freeze(model: Any, adapter: str, trained: str, memory: _Memory) -> None:
    """Freeze the adapter's factors that are not trained; those that an earlier message froze are as they were before."""
    for name, p in model.named_parameters():
        if name in memory.frozen:
            p.requires_grad_()
        frozen = p.requires_grad and parse_key(name)[1] == adapter and factor_of(name) not in (None, *trained)
        p.requires_grad_(p.requires_grad and not frozen)
        (memory.frozen.add if frozen else memory.frozen.discard)(name)
