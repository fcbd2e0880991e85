"""ClientApps for the tests of privacy: PEFT clients of both of Flower's APIs, behind the mods that users would give them."""

from collections.abc import Callable

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message
from flwr.client import NumPyClient
from flwr.client.mod import fixedclipping_mod as fixedclipping_mod_of_the_older_api
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, fixedclipping_mod
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from fedrot.flower import AlignMod, align_mod, receive, reply

from ..peft_models import KINDS, Kind, factor_keys, turned_clients
from .local_grid import fresh_model

KIND = KINDS["modules to save"]
CLIENTS = 4
KEYS = list(turned_clients(KIND, 0)[0])
LOCAL = {"clipping_norm": 1.5, "sensitivity": 3.0, "epsilon": 40.0, "delta": 1e-3}


def trained(state: dict[str, Tensor], client: int, round: int) -> dict[str, Tensor]:
    """A client's update in a round: the adapter it was sent in a basis of its own, with noise. The same at every call."""
    generator = torch.Generator().manual_seed(1000 * round + client)
    update = {key: x + 0.05 * torch.randn(x.shape, generator=generator) for key, x in state.items()}
    for key_A, key_B in factor_keys(update):
        A, B = update[key_A], update[key_B]
        X = torch.randn(len(A), len(A), generator=generator)
        skew = X - X.mT
        Q = torch.matrix_exp(1.5 * skew / torch.linalg.matrix_norm(skew, 2))
        update[key_A], update[key_B] = (Q.T @ A.flatten(1)).reshape(A.shape), (B.flatten(1) @ Q).reshape(B.shape)
    return update


def noise_seed(client: int, round: int) -> int:
    """What a client seeds NumPy's global generator with, from which Flower's mods draw their noise."""
    return 100 * round + client


def message_app(kind: Kind, mods: list, train: Callable = trained) -> ClientApp:
    """Clients of the Message API, whose numbers of examples the server decides.

    Args:
        kind: of their model.
        mods: outermost first.
        train: like ``trained``.
    """
    app = ClientApp(mods=mods)

    @app.train()
    def train_round(message: Message, context: Context) -> Message:
        config, client = message.content["config"], int(context.node_config["partition-id"])
        model = fresh_model(kind)
        receive(model, message, context)
        state = {key: x.float() for key, x in get_peft_model_state_dict(model).items()}
        set_peft_model_state_dict(model, train(state, client, config["server-round"]))
        np.random.seed(noise_seed(client, config["server-round"]))
        return reply(model, message, context, {"num-examples": config["weights"][client]})

    return app


class Client(NumPyClient):
    """A client of the older API, which sends arrays without names."""

    def __init__(self, client: int):
        self.client = client

    def fit(self, parameters, config):
        model, round = fresh_model(KIND), config["server-round"]
        # After a round of secure aggregation the server's arrays are float64.
        sent = {key: torch.from_numpy(x).float() for key, x in zip(KEYS, parameters, strict=True)}
        set_peft_model_state_dict(model, sent)
        update = trained(get_peft_model_state_dict(model), self.client, round)
        if self.client == config["broken"]:
            update[KEYS[0]][0, 0] = torch.nan
        examples = 1 if config["equal-weights"] else 1 + self.client
        return [update[key].numpy() for key in KEYS], examples, {"client": self.client}


def clipping_if_pending(message, context, call_next):
    """Flower's clipping mod where the server's strategy sends a norm; it raises where there is none."""
    asked = "clipping_norm" in message.content.config_records["fitins.config"]
    return (fixedclipping_mod_of_the_older_api if asked else _pass)(message, context, call_next)


def _pass(message, context, call_next):
    return call_next(message, context)


APPS = {
    "plain": message_app(KIND, []),
    "aligned": message_app(KIND, [align_mod]),
    "aligned, clipped": message_app(KIND, [fixedclipping_mod, align_mod]),
    "aligned, clipped, noised": message_app(KIND, [LocalDpMod(**LOCAL), align_mod]),
}
SECURE = ClientApp(
    client_fn=lambda context: Client(int(context.node_config["partition-id"])).to_client(),
    mods=[secaggplus_mod, clipping_if_pending, AlignMod(keys=KEYS)],
)

app = ClientApp()  # an engine takes one: it hands every message to the one that the server names


@app.train()
def _(message: Message, context: Context) -> Message:
    name = message.content.config_records.get("config", ConfigRecord()).get("app")
    return SECURE(message, context) if name is None else APPS[name](message, context)
