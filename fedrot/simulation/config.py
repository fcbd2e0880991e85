"""One dataclass is the command line, the YAML file and what is saved with a run."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..aggregation import OnInvalid
from ..alignment import Alignment, AlignOn, RotationGroup
from ..methods import get_method

Start = Literal["shared", "independent"]


@dataclass
class SimulationConfig:
    """A federated fine-tuning run."""

    model: str = "digits"
    """A Transformers model by hub name or folder, or "digits": a small ViT, pretrained in seconds on part of the digits."""
    task: Literal["text-classification", "image-classification"] | None = None
    """What the model does; if not set, image-classification for the digits and text-classification otherwise."""
    lora: dict[str, Any] = field(default_factory=lambda: {"r": 8, "lora_alpha": 16})
    """Options of peft.LoraConfig; on the command line --lora.r 4 --lora.target_modules [query,value]."""

    dataset: str = "digits"
    """A dataset by hub name, a local CSV, TSV, JSON or JSONL file, or "digits"."""
    dataset_config: str | None = None
    """The hub dataset's configuration, such as sst2 of glue."""
    train_split: str = "train"
    """The hub dataset's split that the clients share out."""
    test_split: str = "validation"
    """The hub dataset's split that the server evaluates on."""
    test_dataset: str | None = None
    """A local file to evaluate on; without one, test_fraction of the local training file is held out."""
    test_fraction: float = 0.1
    """The part of a local training file that is held out when there is no test_dataset."""
    max_train_examples: int | None = None
    """Use only so many training examples, drawn at random."""
    max_test_examples: int | None = None
    """Use only so many test examples, drawn at random."""
    text_column: str = "sentence"
    """The column holding the text."""
    text_pair_column: str | None = None
    """The column holding the second text of a pair."""
    image_column: str = "image"
    """The column holding the image."""
    label_column: str = "label"
    """The column holding the class."""
    max_length: int = 128
    """Tokens after which texts are cut."""

    partition: Literal["dirichlet", "iid", "column"] = "dirichlet"
    """How examples are shared out: label-Dirichlet, evenly at random, or a client per value of partition_column."""
    dirichlet_alpha: float = 0.5
    """The concentration of the label-Dirichlet partition; smaller is less alike."""
    partition_column: str | None = None
    """The column whose values are the clients, for partition column."""

    clients: int = 10
    """N, the number of clients; with partition column the number of values, whatever is set here."""
    clients_per_round: int | None = None
    """K clients drawn at random each round; all of them if not set."""
    rounds: int = 6
    """Communication rounds."""
    local_steps: int = 20
    """Optimizer steps each client takes in a round."""
    batch_size: int = 16
    """Examples per step and client."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """The clients' optimizer; its state starts anew each round."""
    lr: float = 1e-2
    """The clients' learning rate."""
    momentum: float = 0.0
    """Of SGD."""
    weight_decay: float = 0.0
    """Of either optimizer."""
    max_grad_norm: float | None = None
    """Clip each client's gradient to this norm."""
    clients_per_pass: int | None = None
    """Train at most so many clients in one pass, to bound memory; all at once if not set. Dropout is drawn per pass."""
    start: Start = "shared"
    """shared: all clients start from one adapter, as in the paper. independent: each draws its own, so that the first
    aggregation has no common reference and takes the adapter of the client with most examples."""

    method: str = "fedrot"
    """The aggregation method."""
    align_on: AlignOn = "alternate"
    """The factor to align: odd rounds A and even rounds B, always one of them, or both."""
    strength: float = 0.5
    """λ: 0 does not rotate, 1 rotates fully."""
    group: RotationGroup = "SO"
    """Rotations only, or reflections too."""
    on_invalid: OnInvalid = "raise"
    """What to do with a client whose factors hold NaN or Inf."""

    eval_every: int = 1
    """Evaluate on the server after every so many rounds, and after the last."""
    eval_batch_size: int = 256
    """Examples per evaluation batch."""
    seed: int = 0
    """Of the partition, the initialisation, the sampling of clients and examples, and dropout."""
    device: str = "auto"
    """A torch device; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        get_method(self.method, Alignment(self.align_on, self.strength, self.group))
        for name in ("clients", "rounds", "local_steps", "batch_size", "eval_every", "eval_batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("clients_per_round", "clients_per_pass", "max_train_examples", "max_test_examples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 or left out, got {getattr(self, name)}")
        for name in ("dirichlet_alpha", "lr", "max_grad_norm"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("momentum", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.test_fraction < 1:
            raise ValueError(f"test_fraction must lie between 0 and 1, got {self.test_fraction}")
        if (self.partition == "column") != (self.partition_column is not None):
            raise ValueError("partition column and partition_column go together: set both or neither")
        if (self.model == "digits") != (self.dataset == "digits"):
            raise ValueError('the model "digits" and the dataset "digits" go together: set both or neither')
        if self.dataset == "digits" and self.task == "text-classification":
            raise ValueError("the digits are images: leave task out, or name a model and a dataset of texts")
        if self.task is None:
            self.task = "image-classification" if self.dataset == "digits" else "text-classification"

    def save(self, path: Path) -> None:
        """Write the configuration as YAML, every field."""
        path.write_text(yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True), "utf-8")
