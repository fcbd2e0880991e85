"""FedRot-LoRA in NVIDIA FLARE: an aggregator of FLModels for its FedAvg and ScatterAndGather controllers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

try:
    from nvflare.apis.fl_constant import FLMetaKey, ReservedKey
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.shareable import Shareable
    from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
    from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
    from nvflare.app_common.app_constant import AppConstants
    from nvflare.app_common.app_event_type import AppEventType
    from nvflare.app_common.utils.fl_model_utils import FLModelUtils
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("fedrot.nvflare needs NVIDIA FLARE: pip install 'fedrot[nvflare]'") from error

from .adapters.checks import check_update
from .adapters.layout import Layout
from .adapters.meaning import digest
from .adapters.update import Update, open_update, read_configs
from .adapters.values import check_weight
from .admission import Admission, make_one_line, sort_key
from .agreement import Digest, explain_difference, find_unlike, read_digest, write_digest
from .errors import UpdateError
from .options import AggregationOptions, shows_options
from .report.result import AggregationResult
from .server.aggregator import FedRotAggregator
from .server.optimizer import ServerOptimizer

__all__ = ["FedRotModelAggregator", "config_meta"]

_LORA = "fedrot_lora_config"  # in FLModel.meta
_CLIENT, _UNKNOWN = "client_name", AppConstants.CLIENT_UNKNOWN


def config_meta(config: Any) -> dict[str, str]:
    """What a client adds to ``FLModel.meta`` so that its LoRA configuration is compared with those of the others.

    Args:
        config: the client's ``peft.LoraConfig``, or the content of its adapter_config.json.
    """
    return {_LORA: write_digest(config)}


@dataclass(frozen=True)
class _Answer:
    update: Update
    weight: float
    metrics: Mapping[str, Any]
    digest: Digest | None


class FedRotModelAggregator(ModelAggregator):
    """Federated averaging of LoRA adapters in a common basis, or by another of ``fedrot.METHODS``.

    It is the ``aggregator`` of NVFlare's FedAvg controller and recipes, or of ScatterAndGather. The server's model is the
    adapter, a PEFT state dict and nothing else (such as ``PTFileModelPersistor(source_ckpt_file_full_name=…)`` loads).
    Clients answer with all of its keys, as FULL or DIFF parameters. The reference and the round are what the controller
    sent to clients, whatever made it: a checkpoint, the last result, or an optimizer between the two.

    A wrong answer (other keys, shapes or dtypes, another LoRA configuration by ``config_meta``, NaN, no weight, of another
    round) is refused: ``accept_model`` raises
    UpdateError, upon which NVFlare's controllers log the error, do not count the client and go on. Answers are kept until
    the round ends, so that the result does not depend on their order and its aggregation error can be computed. The metrics
    of the result are those that all clients sent as finite numbers, averaged, and "aggregation_error", "relative_error",
    "plain_relative_error" (of the plain average of the same updates), "rotation_angle" (degrees), "clients" and "dropped";
    with ``robust`` or ``clip`` also "refused" and "clipped", the numbers of such clients.
    Logs and errors count rounds from 1, and add NVFlare's own
    ``current_round``, which counts from 0.

    Nothing is lost on the way with ``server_expected_format="pytorch"`` and a persistor with
    ``allow_numpy_conversion=False``: tensors travel as safetensors, bfloat16 too. NumPy, NVFlare's default, has no
    bfloat16: the persistor widens it to float32, and clients must send float32.

    Every site needs fedrot. NVFlare also copies modules of fedrot into the job, which an installed fedrot comes before. An
    ``ImportError`` of an "unknown location" in a job means that the copies come first, as they do where an editable install
    does not put the clone on Python's path: install the clone again with ``pip install -e .``, or leave the copies out with
    ``job.set_app_packages(["fedrot"])``. Sites that allow jobs no code of their own need that call too, and "fedrot" in the
    ``class_allow_list`` of their resources.json.

    Args:
        server_optimizer: as in ``fedrot.FedRotAggregator``; its state ends with the job.
        weighted_by: the entry of ``FLModel.meta`` that holds a client's weight, its number of steps or examples; None weighs
            all alike.
        configs: the LoRA configuration of all clients, a ``peft.LoraConfig`` or the content of its adapter_config.json;
            needed for LoRA on the parameters of experts.
        **options: fields of ``fedrot.AggregationOptions``, but for methods that change base weights or leave clients a
            factor of their own. ``on_invalid`` is "drop" here: wrong answers are left out, unless it is "raise", which
            raises UpdateError at the end of their round and so ends the job.

    Attributes:
        result: the result of the last round.

    Raises:
        ValueError: an option's value that there is not, options that do not go together, or a method that exchanges more or
            less than whole adapters.
    """

    @shows_options(on_invalid="drop")
    def __init__(
        self,
        server_optimizer: ServerOptimizer | None = None,
        weighted_by: str | None = FLMetaKey.NUM_STEPS_CURRENT_ROUND,
        configs: Any = None,
        **options: Any,
    ):
        super().__init__()
        chosen = AggregationOptions.of({"on_invalid": "drop"} | options)
        self._aggregator = FedRotAggregator(server_optimizer=server_optimizer, **chosen.as_dict())
        # NVFlare writes a component into a job's configuration by the parameters in the signature of __init__ and the
        # attributes of the same names.
        self.server_optimizer, self.weighted_by = server_optimizer, weighted_by
        self.configs = read_configs(configs, ["the clients"])[0]
        for name, value in chosen.as_dict().items():
            setattr(self, name, value)
        method = self._aggregator.method
        method.check_one_rank()
        if method.updates_base or method.returns() != ("A", "B"):
            raise ValueError(
                f"{method.name} exchanges more or less than whole adapters, which NVFlare cannot; take another method"
            )
        self.result: AggregationResult | None = None
        self._sent: FLModel | None = None
        self._answers: dict[str, _Answer] = {}
        self._dropped: dict[str, str] = {}

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Keep what clients are sent."""
        super().handle_event(event_type, fl_ctx)
        if event_type == AppEventType.BEFORE_TRAIN_TASK:
            self._sent = FLModelUtils.from_shareable(fl_ctx.get_prop(AppConstants.TRAIN_SHAREABLE))

    def reset_stats(self) -> None:
        """Forget the round."""
        self._sent, self._answers, self._dropped = None, {}, {}

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        """Keep one client's answer, for ScatterAndGather; return whether it can be averaged."""
        self.fl_ctx = fl_ctx
        name = shareable.get_peer_prop(ReservedKey.IDENTITY_NAME, _UNKNOWN)
        try:
            model = FLModelUtils.from_shareable(shareable)
            model.meta[_CLIENT] = name
            self.accept_model(model)
        except (TypeError, ValueError) as error:  # not a model at all, or an UpdateError
            self._dropped[name] = make_one_line(str(error))
            return False
        return True

    def accept_model(self, model: FLModel) -> None:
        """Keep one client's answer.

        Raises:
            UpdateError: it cannot be averaged; the round goes on without it.
        """
        name = str(model.meta.get(_CLIENT, _UNKNOWN))
        try:
            if name in self._answers:
                raise UpdateError(f"{name} answered a second time; the first answer counts")
            self._answers[name] = self._open(name, model)
        except UpdateError as error:
            self._dropped[name] = make_one_line(str(error))
            raise

    def aggregate_model(self) -> FLModel:
        """Aggregate the round's answers.

        Returns:
            The adapter under the keys of the server's model, in tensors or in arrays as that is.

        Raises:
            UpdateError: no answer of positive weight is left, or, with ``on_invalid="raise"``, one was wrong.
        """
        model, reference = self._open_reference()
        when = _name_round(model.current_round)
        unlike = find_unlike({name: a.digest for name, a in sorted(self._answers.items()) if a.digest is not None})
        self._dropped |= {name: make_one_line(f"{name} {why}") for name, why in unlike.items()}
        self._answers = {name: answer for name, answer in self._answers.items() if name not in unlike}
        for name, why in self._dropped.items():
            self.warning(f"{when}: dropped {name}: {why}")
        if not self._answers or (self._dropped and self._aggregator.options.on_invalid == "raise"):
            raise UpdateError("; ".join([f"{when}: {len(self._answers)} good answers", *self._dropped.values()]))
        names = sorted(self._answers, key=sort_key)
        answers = [self._answers[name] for name in names]
        weights = [answer.weight for answer in answers]
        if not any(weights):
            raise UpdateError(
                f"{when}: {self.weighted_by} is 0 in the answers of {', '.join(names)}; at least one must count"
            )
        self._aggregator.round, self._aggregator.reference = model.current_round, reference.as_given(reference)
        result = self._aggregator.aggregate([answer.update for answer in answers], weights, names=names)
        report = replace(result.report, dropped=self._dropped)
        self.result = replace(result, report=report)
        errors = {"aggregation_error": report.error, "relative_error": report.relative_error}
        errors["plain_relative_error"] = report.plain_relative_error
        metrics = _average([answer.metrics for answer in answers], weights)
        metrics |= {key: x for key, x in errors.items() if x is not None}
        metrics |= {"rotation_angle": report.angle, "clients": len(report.clients), "dropped": len(report.dropped)}
        if (choice := report.choice) is not None:
            metrics |= {"refused": len(choice.refused), "clipped": len(choice.clipped or {})}
            for line in choice.lines():
                self.info(f"{when}: {line}")
        self.info(f"{when}: " + ", ".join(f"{key} {value:.4g}" for key, value in metrics.items()))
        arrays = any(isinstance(x, np.ndarray) for x in model.params.values())
        params = {key: x.numpy() if arrays else x for key, x in result.state_dict.items()}
        self.reset_stats()
        return FLModel(ParamsType.FULL, params, metrics=metrics, current_round=model.current_round)

    def _open_reference(self) -> tuple[FLModel, Update]:
        """Open the model that clients were sent."""
        if self._sent is None:
            raise UpdateError(f"no model was sent to clients: the event {AppEventType.BEFORE_TRAIN_TASK} was not fired")
        if self._sent.current_round is None:
            raise UpdateError("the controller sent a model without its current_round")
        name = "the server's model"
        return self._sent, open_update(_read_tensors(self._sent.params, name), name, config=self.configs)

    def _open(self, name: str, model: FLModel) -> _Answer:
        task, reference = self._open_reference()
        if model.current_round not in (None, task.current_round):
            now = _name_round(task.current_round)
            raise UpdateError(f"{name} answered with current_round {model.current_round!r}, but this is {now}")
        theirs = read_digest(model.meta[_LORA], name) if _LORA in model.meta else None
        if theirs and self.configs and (why := explain_difference(theirs, digest(self.configs), "the server")):
            raise UpdateError(f"{name} {why}")
        sent = open_update(_read_tensors(model.params, name), name, reference)
        check_update(sent, reference, Layout(reference.specs, reference.name))
        change = model.params_type == ParamsType.DIFF
        values = {key: reference[key] + sent[key] if change else sent[key] for key in reference}
        update = open_update(reference.as_given(values), name, reference)
        Admission(reference, self._aggregator.method, task.current_round, reference).check(update)
        if self.weighted_by is None:
            return _Answer(update, 1.0, model.metrics or {}, theirs)
        if self.weighted_by not in model.meta:
            raise UpdateError(f"{name} sent no {self.weighted_by} in FLModel.meta; send its number of steps or examples")
        return _Answer(update, check_weight(model.meta[self.weighted_by], update), model.metrics or {}, theirs)


def _name_round(current_round: int) -> str:
    """Name a round for people, who count from 1, with NVFlare's own number, which is the one in NVFlare's logs."""
    return f"round {current_round + 1} (current_round {current_round})"


def _read_tensors(params: Any, name: str) -> dict[str, Any]:
    """Convert arrays to tensors in their memory, and read from disk what enable_tensor_disk_offload left there."""
    if not isinstance(params, Mapping):
        raise UpdateError(f"{name}: expected tensors or arrays by name, got {type(params).__name__}")
    loaded = {key: x.materialize() if hasattr(x, "materialize") else x for key, x in params.items()}
    try:
        return {key: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for key, x in loaded.items()}
    except (TypeError, ValueError) as error:
        raise UpdateError(f"{name}: {error}") from error


def _average(metrics: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> dict[str, float]:
    """Average the metrics that all clients sent as finite numbers."""

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and math.isfinite(value)

    common = [key for key in metrics[0] if all(is_number(client.get(key)) for client in metrics)]
    return {key: sum(w * m[key] for w, m in zip(weights, metrics, strict=True)) / sum(weights) for key in common}
