"""The part that server and clients share: the configuration, the data, the model, and how a client trains it."""

import copy
import gc
import tempfile
import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from flwr.app import ArrayRecord, Context
from flwr.common.config import unflatten_dict
from peft import PeftModel, set_peft_model_state_dict
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments

from fedrot.flower import FedRot, from_arrays
from fedrot.simulation import SimulationConfig, load_task
from fedrot.simulation.clients import Clients
from fedrot.simulation.training.local_training import make_optimizer

# Keys of the run configuration that are not SimulationConfig's.
OWN = ("fraction_train", "fraction_evaluate", "round_timeout", "output", "resume")


def load(context: Context, nodes: int) -> Clients:
    """Load the data with its partition, and the PEFT model, once per process and run.

    Replace ``Clients`` to bring your own: the app uses its ``model`` and ``task``, and the ``examples`` and ``batches`` of
    every client.

    Args:
        context: the context of the server or of a client.
        nodes: how many clients there are, if the run configuration leaves that open.
    """
    return _load(context.run_id, nodes, **context.run_config)


def configure(run_config: Mapping[str, Any], nodes: int) -> SimulationConfig:
    """Make a SimulationConfig of its fields in the run configuration; an empty string leaves a field at its default."""
    fields = unflatten_dict({key: x for key, x in run_config.items() if x != "" and key not in OWN})
    return SimulationConfig(**fields | {"clients": fields["clients"] or nodes})


@lru_cache(maxsize=1)
def _load(run_id: int, nodes: int, **run_config: Any) -> Clients:
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    config = configure(run_config, nodes)
    clients = Clients(load_task(config), config)
    gc.freeze()  # Trainer collects garbage at every start, which would take longer than a round of the digits
    return clients


class LocalTrainer(Trainer):
    """A Trainer that takes the examples in the order that they have, and the loss from the task."""

    def __init__(self, clients: Clients, **options: Any):
        super().__init__(clients.model, **options)
        self.task = clients.task
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader:
        """See Trainer."""
        own = torch.Generator()  # so that nothing is drawn from PyTorch's, which is for the dropouts
        return DataLoader(self.train_dataset, self.args.train_batch_size, collate_fn=self._collate, generator=own)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """See Trainer."""
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = self.task.losses(outputs.logits, labels, 1).sum()
        return (loss, outputs) if return_outputs else loss

    def _collate(self, indices: list[int]) -> dict:
        return self.task.collate(self.task.train, np.array(indices), "cpu")


def train(clients: Clients, client: int, round: int) -> float:
    """Train the model on a client's examples for a round's local steps, as the simulator does.

    Args:
        clients: the model, the data and the configuration.
        client: the client's number.
        round: the round's index, from 0.

    Returns:
        The mean loss.
    """
    config = clients.config
    parameters = [p for p in clients.model.parameters() if p.requires_grad]
    # Trainer seeds NumPy's global generator, from which Flower's differential privacy draws noise that nobody may know.
    generator = np.random.get_state()
    with tempfile.TemporaryDirectory() as unused:
        arguments = TrainingArguments(
            unused,
            max_steps=config.local_steps,
            per_device_train_batch_size=config.batch_size,
            max_grad_norm=config.max_grad_norm or 0.0,
            lr_scheduler_type="constant",
            use_cpu=clients.device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            label_names=["labels"],
        )
        trainer = LocalTrainer(
            clients,
            args=arguments,
            train_dataset=clients.batches(round, client).ravel().tolist(),
            optimizers=(make_optimizer(parameters, config), None),
        )
        with clients.dropout(round, client):
            loss = trainer.train().training_loss
    np.random.set_state(generator)
    return loss


def evaluate(clients: Clients, client: int) -> dict[str, float]:
    """Score the model on the client's share of the test examples, and count them."""
    order = np.random.default_rng(0).permutation(len(clients.task.test))
    rows = np.array_split(order, len(clients.examples))[client]
    scores = clients.task.evaluate(clients.model, clients.config.eval_batch_size, clients.device, rows)
    return {"num-examples": len(rows), **scores}


def global_model(clients: Clients, strategy: FedRot, arrays: ArrayRecord) -> PeftModel:
    """Load the server's adapter into the model, on the base weights as the method has changed them."""
    model = copy.deepcopy(clients.model) if strategy.base_updates else clients.model
    strategy.fold_into(model)
    set_peft_model_state_dict(model, from_arrays(arrays))
    return model
