"""The server: it aggregates with the FedRot strategy, evaluates every round, and leaves all results in one folder."""

import logging
import time

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from peft import get_peft_model_state_dict

from fedrot import ServerOptimizer
from fedrot.flower import FedRot, to_arrays
from fedrot.options import OPTION_NAMES

from . import task
from .results import Results

app = ServerApp()
log = logging.getLogger("flwr")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation, or with ``resume`` the rounds that are left of one."""
    options = context.run_config
    clients = task.load(context, wait_for_nodes(grid, int(options["clients"])))
    config = clients.config
    results = Results(str(options["output"]), config, bool(options["resume"]))
    strategy = FedRot(
        **{name: getattr(config, name) for name in OPTION_NAMES},
        configs=clients.lora,
        server_optimizer=None if (o := config.server_optimizer) == "none" else ServerOptimizer(o, config.server_lr),
        device=clients.device,
        checkpoint=results.folder,
        resume=bool(options["resume"]),
        fraction_train=float(options["fraction_train"]),
        fraction_evaluate=float(options["fraction_evaluate"]),
        min_train_nodes=1,
        min_evaluate_nodes=1,
        min_available_nodes=1,  # wait_for_nodes has waited; a round goes on without nodes that leave
    )
    complete = strategy.method.returns() == ("A", "B")
    if not complete:  # clients keep a factor to themselves: only they can evaluate
        strategy.fraction_evaluate = 1.0

    def end_round(round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if round == 0:
            return None
        scores = {f"clients_{name}" if complete else name: x for name, x in strategy.evaluate_metrics.items()}
        if complete and (round % config.eval_every == 0 or round == config.rounds):
            model = task.global_model(clients, strategy, arrays)
            scores |= clients.task.evaluate(model, config.eval_batch_size, clients.device)
        report = strategy.result.report
        results.add(
            {
                "round": round,
                "method": config.method,
                **scores,
                "train_loss": strategy.train_metrics.get("train-loss"),
                "aggregation_error": report.error,
                "relative_error": report.relative_error,
                "rotation_angle": report.angle,
                "clients": report.clients,
                "dropped": report.dropped,
            }
        )
        return MetricRecord(scores)

    result = strategy.start(
        grid,
        to_arrays(get_peft_model_state_dict(clients.model)),
        num_rounds=config.rounds,
        timeout=float(options["round_timeout"]),
        evaluate_fn=end_round,
    )
    results.finish(clients, strategy, result.arrays)


def wait_for_nodes(grid: Grid, wanted: int) -> int:
    """Wait until as many nodes are connected as wanted, at least one; return their number."""
    known = -1
    while (connected := len(list(grid.get_node_ids()))) < max(wanted, 1):
        if connected != known:
            log.info("waiting for %d nodes (clients in the run configuration); %d connected", max(wanted, 1), connected)
        known = connected
        time.sleep(1)
    return connected
