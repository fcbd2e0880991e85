"""FedRot-LoRA as a Flower strategy."""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from ..adapters.checks import check_update
from ..adapters.config import base_config, check_lora, plain_config
from ..adapters.keys import factor_of
from ..adapters.layout import Layout
from ..adapters.update import Update, open_update
from ..methods.registry import make_method
from ..options import OPTION_NAMES, AggregationOptions, refuse_old_spellings, shows_options
from ..report.fold import merge_into_base
from ..report.result import AggregationResult
from ..server.aggregator import FedRotAggregator
from ..server.optimizer import ServerOptimizer
from .aggregate import aggregate_replies, log_dropped, open_all
from .arrays import from_arrays, to_arrays
from .metrics import average_metrics, measures
from .protocol import add_instructions
from .replies import PendingReplies, Reply, open_evaluation_reply, open_training_reply
from .resume import Progress, State, check_no_checkpoint, load_progress, save_progress

_log = logging.getLogger("flwr")


class FedRot(FedAvg):
    """Federated averaging of LoRA adapters in a common basis, or by another of ``fedrot.METHODS``.

    The reference of a round is what its clients were sent. Clients answer with one ArrayRecord, the PEFT state dict, and one
    MetricRecord with their number of examples, as for FedAvg; ``fedrot.flower.reply`` makes such an answer and
    ``fedrot.flower.receive`` opens what they are sent. The result does not depend on the order in which answers come.

    A wrong answer (other keys, shapes or dtypes, NaN, no number of examples) is dropped and named in the log and in
    ``result.report.dropped``, beside clients that sent an error or nothing. A round's MetricRecord holds the clients' own
    metrics, averaged, and "aggregation-error", "relative-error", "rotation-angle" and "rotation-angle-max" (the mean and
    the largest over adapters and clients, in degrees), "clients" and "dropped".

    With differential privacy or secure aggregation align on the client instead: FedAvg with ``fedrot.flower.align_mod``.

    Args:
        configs: the ``peft.LoraConfig`` of all clients, which FLoRA and FedEx-LoRA need; ranks do not differ here. These
            methods send every change of the base weights so far with every message.
        server_optimizer: as in ``fedrot.FedRotAggregator``.
        device: where to aggregate; on a GPU by the Triton kernels.
        checkpoint: a folder; after every round what a restart needs is written there. One that has a checkpoint already
            is refused, unless resuming.
        resume: ``start`` goes on after the checkpoint's last round, if there is one, as the same run with the same options.
        min_train_replies: the run ends with AggregationError when fewer good answers are left in a round.
        **options: fields of ``fedrot.AggregationOptions``, and options of Flower's FedAvg, such as fraction_train,
            min_available_nodes or weighted_by_key. ``on_invalid`` is "drop" here: wrong answers are left out, unless it is
            "raise", which raises UpdateError on the first.

    Attributes:
        result: of the last round.
        train_metrics, evaluate_metrics: what Flower logs of the last round: the clients' averages and, of training, what
            aggregation measured; empty before.
        base_updates: what FLoRA and FedEx-LoRA have changed in the base weights so far.
    """

    @shows_options(on_invalid="drop")
    def __init__(
        self,
        *,
        configs: Any = None,
        server_optimizer: ServerOptimizer | None = None,
        device: str | torch.device = "cpu",
        checkpoint: str | os.PathLike | None = None,
        resume: bool = False,
        min_train_replies: int = 1,
        **options: Any,
    ):
        refuse_old_spellings(options)
        ours = {name: options.pop(name) for name in OPTION_NAMES if name in options}
        super().__init__(**options)
        self.options = AggregationOptions.of({"on_invalid": "drop"} | ours)
        self.method = make_method(self.options)
        self._personal = "".join(f for f in "AB" if f not in self.method.returns())
        if self._personal:  # of which the server knows nothing
            self.options = replace(self.options, report_error=False)
        self.configs = configs
        if isinstance(configs, Sequence):
            raise ValueError("configs must be one peft.LoraConfig, which all clients have")
        if configs is not None:
            check_lora(plain_config(configs), "configs")
        elif self.method.updates_base:
            raise ValueError(
                f"{self.method.name} needs the scaling of the adapters: pass configs=, the clients' peft.LoraConfig"
            )
        if min_train_replies < 1:
            raise ValueError(f"min_train_replies must be at least 1, got {min_train_replies}")
        if resume and checkpoint is None:
            raise ValueError("resume needs checkpoint, the folder of the run to go on with")
        self.server_optimizer, self.device = server_optimizer, torch.device(device)
        self.checkpoint, self.resume = None if checkpoint is None else Path(checkpoint), resume
        self.min_train_replies = min_train_replies
        self._first_moments = {} if server_optimizer is None else server_optimizer.state_dict()
        self._names: dict[int, str] = {}  # of nodes, which stay from run to run
        self._begin()

    def _begin(self) -> None:
        """Nothing of a run is there yet."""
        self.result: AggregationResult | None = None
        self.train_metrics, self.evaluate_metrics = MetricRecord(), MetricRecord()
        self.base_updates: list[State] = []
        self._rounds_before = 0
        self._expected: Update | None = None
        # Of the round under way.
        self._reference = ArrayRecord()
        self._pending = PendingReplies([], self._names)
        if self.server_optimizer is not None:
            self.server_optimizer.load_state_dict(self._first_moments)

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
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds, or with ``resume`` those that are left of them; see Flower's ``Strategy.start``.

        Args:
            grid, timeout, train_config, evaluate_config: as there.
            initial_arrays: the adapter that clients start from, whole, also when resuming.
            num_rounds: of the whole run.
            evaluate_fn: as there; not called again for the round of the checkpoint.
        """
        self._begin()
        self._expected = self._opened(initial_arrays, "the server's adapter")
        self.method.check(Layout(self._expected.specs, self._expected.name))
        arrays, done = self._restore(initial_arrays)
        evaluate = None
        if evaluate_fn is not None:
            given = evaluate_fn

            def evaluate(round: int, arrays: ArrayRecord) -> MetricRecord | None:
                return None if done and round == 0 else given(done + round, arrays)

        result = super().start(grid, arrays, max(num_rounds - done, 0), timeout, train_config, evaluate_config, evaluate)
        for field in ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp"):
            setattr(result, field, {done + round: metrics for round, metrics in getattr(result, field).items()})
        if not result.arrays:
            result.arrays = arrays
        return result

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Keep the reference, and say which factors the method trains; see Flower's FedAvg."""
        round = self._rounds_before + server_round
        if self._expected is None:  # under a wrapper, which has a start of its own
            if self.resume:
                raise ValueError("resume works through FedRot.start, which a strategy that wraps this one does not call")
            if self.checkpoint is not None:
                check_no_checkpoint(self.checkpoint)
            self._expected = self._opened(arrays, "the server's adapter")
            _log.warning("FedRot under a wrapper: what that clips before, rotation may move further; see align_mod")
        self._reference = arrays
        return self._instruct(super().configure_train(round, arrays, config, grid), round)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The round's adapter and metrics; see the class.

        Raises:
            AggregationError: fewer good answers than ``min_train_replies``.
            UpdateError: a wrong answer, with ``on_invalid="raise"``.
        """
        if not self._pending.anyone:
            return None, None
        round = self._rounds_before + server_round
        reference = self._opened(self._reference, "the reference")
        expected = self._whole(reference)

        def open_reply(name: str, message: Message) -> Reply:
            return open_training_reply(name, message, self.weighted_by_key, expected, self.method, round - 1, reference)

        good, dropped = open_all(self._pending, replies, open_reply, self.options.on_invalid)
        result = aggregate_replies(good, dropped, self._aggregator(reference, round - 1), self.min_train_replies)
        log_dropped(f"round {round}", dropped)
        self.result = replace(result, report=replace(result.report, dropped=dropped))
        if result.base_update is not None:
            self.base_updates.append(result.base_update)
        if self.checkpoint is not None:
            optimizer = self.server_optimizer.state_dict() if self.server_optimizer is not None else {}
            progress = Progress(result.state_dict, optimizer, self.base_updates, round)
            save_progress(self.checkpoint, progress, self._identity())
        ours = measures(self.result.report)
        metrics = average_metrics(good, self.weighted_by_key, self.train_metrics_aggr_fn, ours)
        numbers = {key: value for key, value in metrics.items() if not isinstance(value, list)}
        _log.info("round %d: %s", round, ", ".join(f"{key} {value:.4g}" for key, value in numbers.items()))
        self.train_metrics = MetricRecord(metrics)
        return to_arrays(result.state_dict), self.train_metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """See Flower's FedAvg; of methods with base updates or personal factors clients are told what they need."""
        round = self._rounds_before + server_round
        return self._instruct(super().configure_evaluate(round, arrays, config, grid), round)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The average of the clients' metrics; wrong answers are dropped as in training."""
        round = self._rounds_before + server_round

        def open_reply(name: str, message: Message) -> Reply:
            return open_evaluation_reply(name, message, self.weighted_by_key)

        good, dropped = open_all(self._pending, replies, open_reply, self.options.on_invalid)
        log_dropped(f"evaluation of round {round}", dropped)
        counted = any(reply.weight for reply in good)
        average = self.evaluate_metrics_aggr_fn
        self.evaluate_metrics = MetricRecord(average_metrics(good, self.weighted_by_key, average, {}) if counted else {})
        return self.evaluate_metrics if counted else None

    def fold_into(self, model: Any) -> None:
        """Add all base updates so far to a PEFT model as it was before the first round, for evaluation on the server."""
        for update in self.base_updates:
            merge_into_base(model, update, self._base_config(update))

    def _restore(self, initial_arrays: ArrayRecord) -> tuple[ArrayRecord, int]:
        """The adapter to go on from, and how many rounds are done."""
        if self.checkpoint is None:
            return initial_arrays, 0
        if not self.resume:
            check_no_checkpoint(self.checkpoint)
            return initial_arrays, 0
        saved = load_progress(self.checkpoint, self._identity())
        if saved.rounds_done == 0:
            _log.info("no checkpoint in %s: starting anew", self.checkpoint)
            return initial_arrays, 0
        if self._personal:
            raise ValueError(f"{self.method.name} cannot resume: clients' own factors end with Flower's run")
        adapter = self._opened(arrays := to_arrays(saved.adapter), f"the checkpoint in {self.checkpoint}")
        # Base weights that the method changes are not sent with the adapter.
        expected = self._whole(adapter) if saved.base_updates else self._expected
        assert expected is not None
        check_update(adapter, expected, Layout(expected.specs, expected.name))
        if self.server_optimizer is not None:
            self.server_optimizer.load_state_dict(saved.optimizer)
        self.base_updates = saved.base_updates
        self._rounds_before = saved.rounds_done
        _log.info("resuming after round %d; Flower counts the rounds that are left", saved.rounds_done)
        return arrays, saved.rounds_done

    def _identity(self) -> dict[str, Any]:
        """The options with which a checkpoint must be resumed."""
        optimizer = self.server_optimizer
        names = ("method", "align_on", "reflections", "seed")
        options = {name: x for name, x in self.options.as_dict().items() if name in names}
        options["strength"] = self.method.strength
        return options | {"server_optimizer": None if optimizer is None else [optimizer.name, optimizer.lr]}

    def _aggregator(self, reference: Update, index: int) -> FedRotAggregator:
        return FedRotAggregator(
            dict(reference),
            round=index,
            configs=self.configs,
            server_optimizer=self.server_optimizer,
            **self.options.as_dict(),
        )

    def _whole(self, sent: Update) -> Update:
        """The adapter that clients have, by what they were sent and what is theirs alone."""
        expected = self._expected
        assert expected is not None
        keys = [key for key in expected if key in sent or factor_of(key) in tuple(self._personal)]
        return open_update({expected.keys_given[key]: expected[key] for key in keys}, expected.name)

    def _opened(self, arrays: ArrayRecord, name: str) -> Update:
        return open_update(from_arrays(arrays, name, self.device), name)

    def _base_config(self, update: State) -> dict[str, Any]:
        return base_config(update, plain_config(self.configs))

    def _instruct(self, messages: Iterable[Message], round: int) -> list[Message]:
        base = [(update, self._base_config(update)) for update in self.base_updates]
        trained = "".join(self.method.trains(round - 1))
        messages = add_instructions(messages, self.configrecord_key, trained, self._personal, base)
        self._pending = PendingReplies(messages, self._names)
        return messages
