"""A federation in the test's own process: Flower's messages and ClientApps, without an engine between them."""

import random
from collections.abc import Callable, Iterable, Mapping

import torch
from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from peft import LoraConfig, PeftModel, get_peft_model

from fedrot.adapters.keys import factor_of
from fedrot.flower import receive, reply

from ..peft_models import Kind, base_model

SUPERLINK = 1  # the address that Flower's own answers have


class LocalGrid(Grid):
    """Runs ClientApps one after the other and hands their replies over in an order that differs from round to round.

    Args:
        apps: for every partition the app, or None for a node that does not answer, or an Error that Flower sends for it.
    """

    def __init__(self, apps: Mapping[int, ClientApp | Error | None], seed: int = 0):
        self.apps = {100 - partition: app for partition, app in apps.items()}  # the order of nodes is not that of clients
        self.contexts = {
            node: Context(1, node, {"partition-id": 100 - node, "num-partitions": len(apps)}, RecordDict(), {})
            for node in self.apps
        }
        self.received: list[Message] = []
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SUPERLINK
        self._random = random.Random(seed)

    def get_node_ids(self):
        return list(self.apps)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None):
        replies = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id  # as Flower's grids do
            node = message.metadata.dst_node_id
            app = self.apps[node]
            if isinstance(app, Error):
                answer = Message(app, reply_to=message)
                answer.metadata.__dict__["_src_node_id"] = SUPERLINK
                replies.append(answer)
            elif app is not None:
                replies.append(self._run(app, message, node))
        self._random.shuffle(replies)
        self.received += replies
        return replies

    def _run(self, app: ClientApp, message: Message, node: int) -> Message:
        try:
            return app(message, self.contexts[node])
        except ValueError as error:  # what an engine makes of an app that raises
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)), reply_to=message)

    # The rest of Flower's Grid, which strategies do not call.

    def set_run(self, run_id):
        raise NotImplementedError

    run = property(lambda self: None)

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    push_messages = pull_messages = create_message


def fresh_model(kind: Kind) -> PeftModel:
    """A model of this kind that no other test has seen, the same at every call."""
    base = base_model(kind)
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8} | kind.config), autocast_adapter_dtype=False)


def train(model: PeftModel, client: int, round: int) -> None:
    """Local training, in its place: every trained tensor moves by something that depends on the client and the round."""
    generator = torch.Generator().manual_seed(1000 * round + client)
    with torch.no_grad():
        for p in model.parameters():
            step = torch.randn(p.shape, generator=generator) / 10
            if p.requires_grad:
                p.add_(step.to(p.dtype))


def client_app(
    kind: Kind, *, mods: list | None = None, spoil: Callable[[Message], object] | None = None, **options
) -> ClientApp:
    """A client of the partition that its node has.

    Args:
        kind: of its model.
        mods: Flower's or fedrot's.
        spoil: changes the reply of a training round.
        options: of ``fedrot.flower.reply``.
    """
    app = ClientApp(mods=mods)

    @app.train()
    def train_round(message: Message, context: Context) -> Message:
        model, client = fresh_model(kind), int(context.node_config["partition-id"])
        receive(model, message, context)
        train(model, client, message.content["config"]["server-round"])
        out = reply(model, message, context, {"num-examples": client + 1, "train-loss": 0.5 * client}, **options)
        if spoil is not None:
            spoil(out)
        return out

    @app.evaluate()
    def evaluate_round(message: Message, context: Context) -> Message:
        model, client = fresh_model(kind), int(context.node_config["partition-id"])
        receive(model, message, context)
        size = float(sum(p.detach().float().abs().sum() for name, p in model.named_parameters() if factor_of(name)))
        metrics = MetricRecord({"num-examples": client + 1, "size": size})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app
