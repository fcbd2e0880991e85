"""FedRot-LoRA as a Flower strategy."""

import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from ..adapters.layout import Layout
from ..adapters.meaning import digest
from ..adapters.update import Update, open_update
from ..admission import Admission
from ..methods.registry import make_method
from ..options import OPTION_NAMES, AggregationOptions, refuse_old_spellings, shows_options
from ..report.fold import merge_into_base
from ..report.result import AggregationResult
from ..server.aggregator import FedRotAggregator
from ..server.optimizer import ServerOptimizer
from .aggregate import aggregate_replies, log_dropped, name_idle, open_replies
from .arrays import open_arrays, to_arrays
from .metrics import average_metrics, extract_metrics, log_metrics
from .protocol import State, add_instructions, complete_adapter, find_personal_factors, read_one_config
from .replies import PendingReplies, open_evaluation_reply, open_training_reply
from .resume import Evaluate, make_checkpoint, shift_evaluation, shift_rounds

_log = logging.getLogger("flwr")


class FedRot(FedAvg):
    """Federated averaging of LoRA adapters in a common basis, or by another of ``fedrot.METHODS``.

    The reference of a round is what its clients were sent. Clients answer with one ArrayRecord, the PEFT state dict, and one
    MetricRecord with their number of examples, as for FedAvg; ``fedrot.flower.reply`` makes such an answer and
    ``fedrot.flower.receive`` opens what they are sent. The result does not depend on the order in which answers come.

    A wrong answer (other keys, shapes or dtypes, NaN, no number of examples) is dropped and named in the log and in
    ``result.report.dropped``, beside clients that sent an error or nothing. A round's MetricRecord holds the clients' own
    metrics, averaged, and "aggregation-error", "relative-error", "plain-relative-error" (of the plain average of the same
    updates), "rotation-angle" and "rotation-angle-max" (the mean and the largest over adapters and clients, in degrees),
    "clients" and "dropped"; with ``robust`` or ``clip`` also "refused" and "clipped", the numbers of such clients.

    With differential privacy or secure aggregation align on the client instead: FedAvg with ``fedrot.flower.align_mod``.
    Neither goes together with ``robust`` and ``clip``.

    Args:
        configs: the ``peft.LoraConfig`` of all clients, which methods that change the base weights need; ranks do not differ
            here. These methods send every change of the base weights so far with every message.
        server_optimizer: as in ``fedrot.FedRotAggregator``.
        device: where to aggregate; on a GPU by the Triton kernels.
        checkpoint: a folder; after every round what a restart needs is written there. A folder that has a checkpoint
            already is refused, unless resuming.
        resume: whether ``start`` goes on after the checkpoint's last round, if there is one, as the same run with the same
            options.
        min_train_replies: the run ends with AggregationError when fewer good answers are left in a round.
        **options: fields of ``fedrot.AggregationOptions``, and options of Flower's FedAvg, such as fraction_train,
            min_available_nodes or weighted_by_key. ``on_invalid`` is "drop" here: wrong answers are left out, unless it is
            "raise", which raises UpdateError on the first.

    Attributes:
        options: the options of the aggregation.
        method: the method that they name.
        result: the result of the last round.
        train_metrics, evaluate_metrics: what Flower logs of the last round: the clients' averages and, of training, what
            aggregation measured; empty before.
        base_updates: what the method has changed in the base weights so far.

    Raises:
        ValueError: an option's value that there is not, or options that do not go together.
    """

    @shows_options(on_invalid="drop")
    def __init__(
        self,
        *,
        configs: Any = None,
        server_optimizer: ServerOptimizer | None = None,
        device: str | torch.device = "cpu",
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
        min_train_replies: int = 1,
        **options: Any,
    ):
        refuse_old_spellings(options)
        ours = {name: options.pop(name) for name in OPTION_NAMES if name in options}
        super().__init__(**options)
        chosen = AggregationOptions.of({"on_invalid": "drop"} | ours)
        if find_personal_factors(make_method(chosen)):  # the server does not know the products B·A
            chosen = replace(chosen, report_error=False)
        self._aggregator = FedRotAggregator(configs=configs, server_optimizer=server_optimizer, **chosen.as_dict())
        self.options, self.method = self._aggregator.options, self._aggregator.method
        self.method.check_one_rank()
        self._config = read_one_config(configs, self.method)
        if min_train_replies < 1:
            raise ValueError(f"min_train_replies must be at least 1, got {min_train_replies}")
        self.device, self.min_train_replies = torch.device(device), min_train_replies
        self._checkpoint = make_checkpoint(checkpoint, resume, self._aggregator)
        self._first_state = self._aggregator.state_dict()
        self._names: dict[int, str] = {}  # of nodes, which stay from run to run
        self._begin(None)

    def _begin(self, start: Update | None) -> None:
        """Forget the run before, if there was one; a run starts from this adapter."""
        self.result: AggregationResult | None = None
        self.train_metrics, self.evaluate_metrics = MetricRecord(), MetricRecord()
        self.base_updates: list[State] = []
        self._start, self._rounds_before = start, 0
        self._aggregator.load_state_dict(self._first_state)
        self._sent, self._pending = ArrayRecord(), PendingReplies([], self._names)

    def summary(self) -> None:
        """Log the strategy's options."""
        _log.info("\t├──> FedRot: %s", ", ".join(f"{key} {x}" for key, x in self.options.as_dict().items()))
        super().summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Evaluate | None = None,
    ) -> Result:
        """Run the rounds, or with ``resume`` those that are left of them; see Flower's ``Strategy.start``.

        Args:
            grid, timeout, train_config, evaluate_config: as there.
            initial_arrays: the adapter that clients start from, whole, also when resuming.
            num_rounds: the number of rounds of the whole run.
            evaluate_fn: as there; not called again for the round of the checkpoint.
        """
        start = self._open(initial_arrays, "the server's adapter")
        self._begin(start)
        self.method.check(Layout(start.specs, start.name))
        if self._checkpoint is not None:
            self.base_updates = self._checkpoint.restore(start)
        done = self._rounds_before = self._aggregator.round
        arrays = to_arrays(self._aggregator.reference or {}) if done else initial_arrays
        evaluate = None if evaluate_fn is None else shift_evaluation(evaluate_fn, done)
        result = super().start(grid, arrays, max(num_rounds - done, 0), timeout, train_config, evaluate_config, evaluate)
        shift_rounds(result, done)
        if not result.arrays:
            result.arrays = arrays
        return result

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Keep the reference, and tell clients which factors the method trains; see Flower's FedAvg."""
        if self._start is None:  # under a wrapper, which has a start of its own
            if self._checkpoint is not None:
                self._checkpoint.check_new_run()
            self._start = self._open(arrays, "the server's adapter")
            if self.options.compares_clients:
                raise ValueError(
                    "robust and clip do not go together with a wrapper, such as Flower's differential privacy: its noise "
                    "hides a mean of all clients, and one of few needs more; leave robust and clip out, or the wrapper"
                )
            _log.warning("FedRot under a wrapper: rotation may move an update beyond what was clipped; see align_mod")
        self._sent, round = arrays, self._rounds_before + server_round
        return self._instruct(super().configure_train(round, arrays, config, grid), round)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate the round's adapter and metrics; see the class.

        Raises:
            AggregationError: fewer good answers than ``min_train_replies``.
            UpdateError: a wrong answer, with ``on_invalid="raise"``.
        """
        if not self._pending.anyone or self._start is None:
            return None, None
        round = self._rounds_before + server_round
        like = self._start if list(self._sent) == list(self._start.tensors) else None  # no key needs parsing then
        sent = self._open(self._sent, "the reference", like)
        self._aggregator.round, self._aggregator.reference = round - 1, sent.as_given(sent)
        expected = complete_adapter(sent, self._start, self.method)
        config = None if self._config is None else digest(self._config)
        admission = Admission(expected, self.method, round - 1, sent)
        open_reply = partial(open_training_reply, self.weighted_by_key, admission, config)
        good, dropped = open_replies(self._pending, replies, open_reply, self.options.on_invalid)
        self.result = aggregate_replies(self._aggregator, good, dropped, self.min_train_replies)
        if self.result.base_update is not None:
            self.base_updates.append(self.result.base_update)
        if self._checkpoint is not None:
            self._checkpoint.save(self.base_updates)
        ours = extract_metrics(self.result.report)
        self.train_metrics = average_metrics(good, self.weighted_by_key, self.train_metrics_aggr_fn, ours)
        log_metrics(f"round {round}", self.train_metrics)
        return to_arrays(self.result.state_dict), self.train_metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Tell clients of base updates and personal factors, which they need to evaluate; see Flower's FedAvg."""
        round = self._rounds_before + server_round
        return self._instruct(super().configure_evaluate(round, arrays, config, grid), round)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Average the clients' metrics; wrong answers are dropped as in training."""
        open_reply = partial(open_evaluation_reply, self.weighted_by_key)
        good, dropped = open_replies(self._pending, replies, open_reply, self.options.on_invalid)
        log_dropped(f"evaluation of round {self._rounds_before + server_round}", dropped)
        if not any(reply.weight for reply in good):
            log_dropped(f"evaluation of round {self._rounds_before + server_round}", name_idle(good))
            self.evaluate_metrics = MetricRecord()
            return None
        self.evaluate_metrics = average_metrics(good, self.weighted_by_key, self.evaluate_metrics_aggr_fn, {})
        return self.evaluate_metrics

    def fold_into(self, model: Any) -> None:
        """Add all base updates so far to a PEFT model as it was before the first round, for evaluation on the server."""
        for update in self.base_updates:
            merge_into_base(model, update, self._configure_base(update))

    def _instruct(self, messages: Iterable[Message], round: int) -> list[Message]:
        """Complete a round's messages, and expect their replies."""
        base = [(update, self._configure_base(update)) for update in self.base_updates]
        messages = add_instructions(messages, self.configrecord_key, self.method, round - 1, base, self._config)
        self._pending = PendingReplies(messages, self._names)
        return messages

    def _configure_base(self, base_update: State) -> dict[str, Any]:
        """Make the LoRA configuration of a base update."""
        assert self._start is not None
        return self._start.storage.base_config(base_update, self._config or {})

    def _open(self, arrays: ArrayRecord, name: str, first: Update | None = None) -> Update:
        return open_update(open_arrays(arrays, name, self.device), name, first, self._config)
