"""One dataclass is the command line, the YAML file and what is saved with a run."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..methods.registry import METHODS, make_method
from ..options import AggregationOptions
from ..server.optimizer import ServerOptimizerName

Start = Literal["shared", "independent"]
Partition = Literal["dirichlet", "iid", "column"]
TaskName = Literal["text-classification", "image-classification", "causal-lm"]

# Data sets that come with a model of their own, pretrained in process; they need no network.
EMBEDDED: dict[str, TaskName] = {"digits": "image-classification", "stdlib": "causal-lm"}


@dataclass(frozen=True, kw_only=True)
class SimulationConfig(AggregationOptions):
    """A federated fine-tuning run: the options of its aggregations, and its own."""

    model: str = "digits"
    """A Transformers model by hub name or folder, or an embedded one: "digits", a small ViT, or "stdlib", a small Llama
    over bytes, both pretrained in process once and then kept in the cache."""
    task: TaskName | None = None
    """What the model does; if not set, text-classification, or what an embedded model does."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the base model's weights; those of the adapters are float32."""
    gradient_checkpointing: bool = False
    """Keep no activations within the base model's blocks but compute them again for the gradient: slower, less memory."""
    lora: dict[str, Any] = field(default_factory=lambda: {"r": 8, "lora_alpha": 16})
    """Options of peft.LoraConfig; on the command line --lora.r 4 --lora.target_modules [query,value]."""

    dataset: str = "digits"
    """A dataset by hub name or GLUE name (sst2, qnli, qqp, rte, mnli), a local CSV, TSV, JSON or JSONL file, "digits", or
    "stdlib": the source of Python's standard library, a client per package."""
    dataset_config: str | None = None
    """The hub dataset's configuration, such as sst2 of glue."""
    train_split: str = "train"
    """The hub dataset's split that the clients share out."""
    test_split: str = "validation"
    """The hub dataset's split that the server evaluates on; validation of MNLI is validation_matched."""
    test_dataset: str | None = None
    """Another dataset by hub name, or a local file, to evaluate on; without one, the test_split of the hub dataset, or
    test_fraction of the local training file."""
    test_fraction: float = 0.1
    """The part of a local training file that is held out when there is no test_dataset."""
    max_train_examples: int | None = None
    """Use only so many training examples, drawn at random."""
    max_test_examples: int | None = None
    """Use only so many test examples, drawn at random."""
    text_column: str | None = None
    """The column holding the text; if not set, those that GLUE's tasks have, or the only text of a language model."""
    text_pair_column: str | None = None
    """The column holding the second text of a pair."""
    image_column: str = "image"
    """The column holding the image."""
    label_column: str | None = None
    """The column holding the class; if not set, label; a language model needs none but for the partition."""
    max_length: int = 128
    """Tokens after which texts are cut; a language model goes on with the rest as another example."""
    prompt_template: str | None = None
    """What a language model is given, with columns in braces, such as "Question: {question} Answer:"."""
    response_template: str | None = None
    """What it learns to answer, such as " {answer}"; without templates it learns all of the text column."""
    score: Literal["exact_match", "pass_at_1"] | None = None
    """Of greedy answers, beside the loss: exact_match of the last number with the response's, as for GSM8K; pass_at_1 of
    test data with HumanEval's columns."""
    score_examples: int = 100
    """Score so many test examples, the first ones; generating is slow."""
    max_new_tokens: int = 256
    """Tokens of an answer that is scored."""
    execute_generated_code: bool = False
    """Allow pass_at_1 to run what the model wrote, in a process of its own with limits on time and memory, but with your
    permissions."""

    partition: Partition | None = None
    """How examples are shared out: label-Dirichlet, evenly at random, or a client per value of partition_column; if not
    set, dirichlet where there are classes, column (package) for the stdlib and iid otherwise."""
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
    clients_per_pass: int | Literal["auto"] | None = "auto"
    """Train at most so many clients in one pass, to bound memory; auto: as many as fit into what is free, measured at the
    start; all at once if not set. Results depend on it by rounding only."""
    start: Start = "shared"
    """shared: all clients start from one adapter, as in the paper. independent: each draws its own, so that the first
    aggregation has no common reference and takes the adapter of the client with most examples."""

    server_optimizer: ServerOptimizerName = "none"
    """FedOpt: step towards the round's mean by momentum or Adam instead of taking it as it is."""
    server_lr: float = 0.01
    """The server optimizer's learning rate."""

    eval_every: int = 1
    """Evaluate on the server after every so many rounds, and after the last."""
    eval_batch_size: int = 64
    """Examples per evaluation batch."""
    geometry: bool = False
    """Measure per round what the paper's analysis rests on: how far clients moved from the reference, which part of that
    rotation removes, and the bound on the aggregation error; see docs/reproduction.md."""
    seed: int = 0
    """Of the partition, the initialisation, the sampling of clients and examples, and dropout."""
    device: str = "auto"
    """A torch device; auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("strength", make_method(self).strength if "strength" in METHODS[self.method].uses else None)
        if METHODS[self.method].needs_shared_start and self.start != "shared":
            raise ValueError(f"{self.method} freezes a factor that all clients have in common: it needs a shared start")
        if self.server_optimizer != "none" and not METHODS[self.method].supports_server_optimizer:
            raise ValueError(f"{self.method}'s result is no mean to step towards: it cannot have a server optimizer")
        if METHODS[self.method].updates_base and self.dtype != "float32":
            raise ValueError(f"{self.method} adds to the base weights what {self.dtype} would round away: use dtype float32")
        for name in ("clients", "rounds", "local_steps", "batch_size", "eval_every", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if isinstance(self.clients_per_pass, int) and self.clients_per_pass < 1:
            raise ValueError(f"clients_per_pass must be at least 1, auto or left out, got {self.clients_per_pass}")
        for name in ("clients_per_round", "max_train_examples", "max_test_examples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 or left out, got {getattr(self, name)}")
        for name in ("dirichlet_alpha", "lr", "server_lr", "max_grad_norm"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("momentum", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.test_fraction < 1:
            raise ValueError(f"test_fraction must lie between 0 and 1, got {self.test_fraction}")
        self._resolve_task()
        if (self.partition == "column") != (self.partition_column is not None):
            raise ValueError("partition column and partition_column go together: set both or neither")

    def _resolve_task(self) -> None:
        """Set what follows from the dataset and the task, and refuse what contradicts them."""
        for name in EMBEDDED:
            if (self.model == name) != (self.dataset == name):
                raise ValueError(
                    f'the model "{name}" and the dataset "{name}" go together: set both or neither; they are '
                    f"{self.model} and {self.dataset}"
                )
        task = EMBEDDED.get(self.dataset)
        if task is not None and self.task not in (None, task):
            raise ValueError(f"the task of {self.dataset} is {task}: leave task out, or name another model and dataset")
        self._set("task", self.task or task or "text-classification")
        for name in ("max_length", "score_examples", "max_new_tokens"):
            least = 2 if name == "max_length" else 1
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.text_pair_column is not None and self.text_column is None:
            raise ValueError("text_pair_column needs text_column, the first text of the pair")
        if self.task != "causal-lm" and self.label_column is None:
            self._set("label_column", "label")
        if self.partition is None:
            if self.dataset == "stdlib":
                self._set("partition_column", self.partition_column or "package")
            unless_by_column: Partition = "dirichlet" if self.label_column is not None else "iid"
            self._set("partition", unless_by_column if self.partition_column is None else "column")
        if self.partition == "dirichlet" and self.label_column is None:
            raise ValueError("examples of causal-lm have no classes: use partition iid or column, or name a label_column")

    def _set(self, name: str, value: Any) -> None:
        """Set a field that follows from others."""
        object.__setattr__(self, name, value)

    def save(self, path: Path) -> None:
        """Write the configuration as YAML, every field."""
        path.write_text(yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True), "utf-8")
