"""A client: it trains what the server sent on its own examples, and sends its adapter back."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedrot.flower import receive, reply
from fedrot.simulation.clients import Clients

from . import task

# For plain FedAvg on the server, with differential privacy or secure aggregation: ClientApp(mods=[fedrot.flower.align_mod])
app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train for a round's local steps."""
    clients, client = _open(context)
    receive(clients.model, message, context)
    loss = task.train(clients, client, int(message.content["config"]["server-round"]) - 1)
    return reply(clients.model, message, context, {"num-examples": len(clients.examples[client]), "train-loss": loss})


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the model on this client's share of the test examples; the server asks for it if fraction_evaluate is set."""
    clients, client = _open(context)
    receive(clients.model, message, context)
    return reply(clients.model, message, context, task.evaluate(clients, client))


def _open(context: Context) -> tuple[Clients, int]:
    """Load the data and the model, and find which client this node is."""
    node = context.node_config
    if not {"partition-id", "num-partitions"} <= node.keys():
        raise ValueError('start the SuperNode with --node-config "partition-id=0 num-partitions=3", each with its own id')
    client, nodes = int(node["partition-id"]), int(node["num-partitions"])
    clients = task.load(context, nodes)
    if len(clients.examples) != nodes:
        raise ValueError(f"there are examples of {len(clients.examples)} clients, but the federation has {nodes} nodes")
    return clients, client
