"""Alignment on the client, which rotates its own update before anything else sees it."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, Context, Error, Message, MessageType
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.constant import ErrorCode
from torch import Tensor

from ..errors import UpdateError
from ..methods.align import align
from ..options import OF_ALIGNMENT, AggregationOptions, shows_options
from .arrays import from_arrays, to_arrays
from .protocol import ROUND, read_config

_log = logging.getLogger("flwr")


class AlignMod:
    """A client mod that rotates what a training client replies towards what it was sent (FedRot-LoRA, arXiv 2602.23638).

    The server then only averages: plain FedAvg gives what the ``FedRot`` strategy gives, to the rounding of the dtype, and
    differential privacy and secure aggregation work as they are. A rotation depends on nothing but the client's own update
    and the reference that it was sent, so the server learns nothing new from it. (The ``FedRot`` strategy would rotate the
    aligned updates a second time: give it ``method="fedit"``, which only averages.)

    Mods are listed outermost first: ``ClientApp(mods=[LocalDpMod(…), align_mod])`` aligns, then clips and adds noise.

    Args:
        keys: the names of the arrays, in their order, for apps of Flower's older API, which sends arrays without names. The
            server's ``on_fit_config_fn`` must then send "server-round", from 1.
        **options: ``align_on``, ``strength`` and ``reflections`` of ``fedrot.AggregationOptions``. "alternate" reads the
            round from "server-round" in the configuration that comes with a message, as Flower's strategies send it.
    """

    @shows_options(*OF_ALIGNMENT)
    def __init__(self, *, keys: Sequence[str] | None = None, **options: Any):
        self.options = AggregationOptions.of_alignment(options)
        self.keys = None if keys is None else list(keys)

    def __call__(self, msg: Message, ctxt: Context, call_next: ClientAppCallable) -> Message:
        """Train, and align the reply; reply with an error if that cannot be done."""
        if msg.metadata.message_type.split(".")[0] != MessageType.TRAIN:
            return call_next(msg, ctxt)
        try:
            round = self._read_round(msg)
            # A record of its own, because apps of the older API empty the message's.
            reference = ArrayRecord(dict(_find_arrays(msg, "the message")))
        except UpdateError as error:
            return _refuse(msg, error)
        out = call_next(msg, ctxt)
        if out.has_error():
            return out
        try:
            sent = _find_arrays(out, "the reply")
            update, start = self._name_tensors(sent, "the reply"), self._name_tensors(reference, "the message")
            aligned = align(update, start, round=round, **{name: getattr(self.options, name) for name in OF_ALIGNMENT})
        except UpdateError as error:
            return _refuse(msg, error)
        for key, array in zip(list(sent), to_arrays(aligned).values(), strict=True):
            sent[key] = array
        return out

    def _read_round(self, msg: Message) -> int:
        if self.options.align_on != "alternate":
            return 0
        number = read_config(msg).get(ROUND)
        if not isinstance(number, int) or number < 1:
            raise UpdateError(
                f'align_on="alternate" needs "{ROUND}", from 1, in the configuration that the server sends, got {number!r}; '
                "send it (in the older API with on_fit_config_fn), or align on A, B or joint"
            )
        return number - 1

    def _name_tensors(self, arrays: ArrayRecord, whose: str) -> Mapping[str, Tensor]:
        tensors = from_arrays(arrays, whose)
        if self.keys is None:
            if tensors and all(key.isdecimal() for key in tensors):
                raise UpdateError(
                    f"{whose} has arrays without names, as Flower's older API sends them; give AlignMod(keys=…)"
                )
            return tensors
        if len(tensors) != len(self.keys):
            raise UpdateError(f"{whose} has {len(tensors)} arrays, but AlignMod was given {len(self.keys)} keys")
        return dict(zip(self.keys, tensors.values(), strict=True))


def _find_arrays(message: Message, whose: str) -> ArrayRecord:
    records = list(message.content.array_records.values())
    if len(records) != 1:
        raise UpdateError(f"{whose} has {len(records)} ArrayRecords; AlignMod needs exactly one, the adapter")
    return records[0]


def _refuse(msg: Message, error: UpdateError) -> Message:
    _log.error("AlignMod: %s", error)
    return Message(Error(code=ErrorCode.MOD_FAILED_PRECONDITION, reason=f"AlignMod: {error}"), reply_to=msg)


align_mod = AlignMod()
"""``AlignMod`` with the paper's options: alternating, λ = 0.5, rotations only."""
