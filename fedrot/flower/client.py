"""A client's side of a round: the server's adapter goes into a PEFT model, and what was trained goes back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from torch import Tensor

from ..adapters.keys import factor_of, parse_key
from ..agreement import explain_difference, read_digest, write_digest
from ..errors import UpdateError
from ..report.fold import merge_into_base
from .arrays import from_arrays, to_arrays
from .protocol import BASE, BASE_CONFIG, CLIENT, LORA, NAME, PERSONAL, TRAINED, read_config

# The record in the client's state that keeps its own factors from round to round.
_OWN = "fedrot-personal"
_MEMORY = "_fedrot_memory"


@dataclass
class _Memory:
    """What ``receive`` did to a model, kept with it, because the next message may find the model as this one leaves it.

    Attributes:
        run: the id of Flower's run.
        folded: how many base updates have been added to the model.
        frozen: the names of parameters that were trainable before, and that the method does not train this round.
        own: personal factors, as the model had them before the first message.
    """

    run: int
    folded: int = 0
    frozen: set[str] = field(default_factory=set)
    own: dict[str, Tensor] = field(default_factory=dict)


def receive(model: Any, message: Message, context: Context) -> None:
    """Load what the ``FedRot`` strategy sent into a PEFT model, and freeze the factors that the method does not train.

    The model may be new for every message, or stay, also if it serves several clients. Methods that change the base weights
    (FLoRA, FedEx-LoRA) send every change so far; those that the model has had already are left out. Methods that leave
    clients a factor of their own (FedSA-LoRA) keep it in the client's state. A client without one takes the server's factor
    in the first round; a client that joins later takes the model's own from before the first message.

    Args:
        model: a ``peft.PeftModel`` with one active adapter, which is the one loaded.
        message: the server's message, of training or evaluation.
        context: this client's context.

    Raises:
        UpdateError: the arrays are not this model's adapter, by key and shapes, the server's LoRA configuration is another
            one, or the model has had base updates of another run.
    """
    from peft import set_peft_model_state_dict

    adapter, config = _find_active(model), read_config(message)
    _check_config(model, adapter, config)
    state = _read_state(model, adapter)
    if not hasattr(model, _MEMORY):
        own = {key: x.detach().clone() for key, x in _select_personal(state, config).items()}
        setattr(model, _MEMORY, _Memory(context.run_id, own=own))
    memory: _Memory = getattr(model, _MEMORY)
    _fold_new(model, message, context, memory)
    # PEFT saves the base weights of some adapters; those that the method changes are not sent.
    expected = {key: x for key, x in state.items() if not (memory.folded and key.endswith(".base_layer.weight"))}
    # A compiled model has wrappers in its keys, which the server's may lack, and the other way round.
    own_keys = {parse_key(key)[0]: key for key in state}
    arrays = from_arrays(_find_arrays(message), "the server")
    sent = {own_keys.get(parse_key(key)[0], key): x for key, x in arrays.items()}
    kept = memory.own | from_arrays(context.state.array_records.get(_OWN, ArrayRecord()), "this client's state")
    loaded = {key: kept[key] for key in _select_personal(expected, config) if key in kept and key not in sent} | sent
    for key in loaded.keys() | expected.keys():
        has, needs = (tuple(d[key].shape) if key in d else "no such key" for d in (loaded, expected))
        if has != needs:
            raise UpdateError(f"{key}: the server sent {has}, the model has {needs}; build it with one LoRA configuration")
    set_peft_model_state_dict(model, loaded, adapter_name=adapter)
    training = message.metadata.message_type.startswith(MessageType.TRAIN)
    _freeze(model, adapter, str(config.get(TRAINED, "AB")) if training else "AB", memory)


def reply(
    model: Any, message: Message, context: Context, metrics: Mapping[str, float | int], *, name: str | None = None
) -> Message:
    """Make the reply to a message: the metrics and, after training, the model's adapter.

    Each tensor is sent in the dtype in which it was received. Personal factors stay with the client.

    Args:
        model: the model that ``receive`` filled and the client trained.
        message: the message to reply to.
        context: this client's context.
        metrics: numbers, among them "num-examples".
        name: the client's name in the server's log and report, the same every round. None takes "client {partition-id}", if
            the node has a partition.
    """
    records: dict[str, Any] = {"metrics": MetricRecord(dict(metrics))}
    if message.metadata.message_type.startswith(MessageType.TRAIN):
        records["arrays"] = _collect_arrays(model, message, context)
    if name is None and "partition-id" in context.node_config:
        name = f"client {context.node_config['partition-id']}"
    records[CLIENT] = ConfigRecord({LORA: write_digest(model.peft_config[_find_active(model)])})
    if name is not None:
        records[CLIENT][NAME] = name
    return Message(RecordDict(records), reply_to=message)


def _collect_arrays(model: Any, message: Message, context: Context) -> ArrayRecord:
    config, sent = read_config(message), _find_arrays(message)
    state = _read_state(model, _find_active(model))
    if own := _select_personal(state, config):
        context.state[_OWN] = to_arrays(own)
    arrays = ArrayRecord()
    shared = {parse_key(key)[0]: x for key, x in state.items() if key not in own}
    for key in sent:  # Flower's mods compare the order
        if (x := shared.get(parse_key(key)[0])) is None:
            continue
        if factor_of(key) in (None, *str(config.get(TRAINED, "AB"))):
            arrays[key] = to_arrays({key: x.to(getattr(torch, sent[key].dtype))})[key]
        else:  # a frozen factor goes back to the bit, though the model's dtype may have rounded it
            arrays[key] = sent[key]
    return arrays


def _find_active(model: Any) -> str:
    adapters: list[str] = model.active_adapters
    if len(adapters) != 1:
        raise UpdateError(f"the model has the active adapters {', '.join(adapters)}; activate the one that is federated")
    return adapters[0]


def _check_config(model: Any, adapter: str, config: ConfigRecord) -> None:
    """Raise UpdateError unless the model's LoRA configuration is the one that the server knows, if it knows one."""
    if LORA in config:
        theirs, mine = (read_digest(text, "the server") for text in (config[LORA], write_digest(model.peft_config[adapter])))
        if why := explain_difference(mine, theirs, "the server"):
            raise UpdateError(f"this client {why}")


def _read_state(model: Any, adapter: str) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    state: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=adapter)
    return state


def _select_personal(state: Mapping[str, Tensor], config: ConfigRecord) -> dict[str, Tensor]:
    personal = str(config.get(PERSONAL, ""))
    return {key: x for key, x in state.items() if (factor := factor_of(key)) is not None and factor in personal}


def _find_arrays(message: Message) -> ArrayRecord:
    prefix = BASE.format("")
    records = [record for key, record in message.content.array_records.items() if not key.startswith(prefix)]
    if len(records) != 1:
        raise UpdateError(f"the server sent {len(records)} ArrayRecords; expected one, the adapter")
    return records[0]


def _fold_new(model: Any, message: Message, context: Context, memory: _Memory) -> None:
    """Add the base updates that this model has not had yet to its base weights."""
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
    """Freeze the adapter's factors that are not trained, and thaw those that an earlier message froze."""
    for name, p in model.named_parameters():
        if name in memory.frozen:
            p.requires_grad_()
        frozen = p.requires_grad and parse_key(name)[1] == adapter and factor_of(name) not in (None, *trained)
        p.requires_grad_(p.requires_grad and not frozen)
        (memory.frozen.add if frozen else memory.frozen.discard)(name)
