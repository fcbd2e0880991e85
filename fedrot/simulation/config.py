"""The configuration of a simulation: one dataclass is the command line, the YAML file and what is saved with a run."""

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

from ..methods.registry import make_method
from ..options import OPTION_NAMES, AggregationOptions, ReportError, refuse_old_spellings
from ..server.optimizer import ServerOptimizerName
from .types import check_type

Start = Literal["shared", "independent"]
Partition = Literal["dirichlet", "iid", "column"]
TaskName = Literal["text-classification", "image-classification", "causal-lm"]

_OPTIONS = {f.name: f for f in fields(AggregationOptions)}

# Datasets that come with a model of their own, pretrained in process; they need no network.
EMBEDDED: dict[str, TaskName] = {"digits": "image-classification", "stdlib": "causal-lm"}


@dataclass(frozen=True, kw_only=True)
class SimulationConfig(AggregationOptions):
    """A federated fine-tuning run: the options of its aggregations, and its own."""

    report_error: ReportError = field(
        default=True, metadata=_OPTIONS["report_error"].metadata
    )  # beside training it is cheap

    model: str = "digits"
    """The base model: a Transformers model by hub name or folder, or an embedded one. The embedded ones are digits, a small
    ViT, and stdlib, a small Llama over bytes. They are pretrained in process once and then kept in the cache."""
    task: TaskName | None = None
    """What the model does. If not set, it is text-classification, or what an embedded model does."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The dtype that weights are stored in. With bfloat16 these are the base model's weights; adapters and trained heads are
    float32. With float16 they are all weights, without a float32 copy, as in the paper's released code: the base model's are
    rounded to float16 once, those of adapters and trained heads at the start, after every optimizer step and after every
    aggregation. This is emulated with float32 tensors. Activations, gradients, the optimizer's state and the arithmetic stay
    float32, so that no activation or gradient overflows or vanishes as in float16, and no memory is saved."""
    gradient_checkpointing: bool = False
    """Keep no activations within the base model's blocks but compute them again for the gradient. This takes less memory
    and more time."""
    lora: dict[str, Any] = field(default_factory=lambda: {"r": 8, "lora_alpha": 16})
    """Options of peft.LoraConfig. On the command line they are --lora.r 4 --lora.target_modules '[query,value]'."""
    lora_scaling: float | None = None
    """The scaling α/r of adapters: lora_alpha is this many times lora.r, and follows a rank that is varied. If not set,
    lora.lora_alpha counts."""

    dataset: str = "digits"
    """The data: a dataset by hub name or GLUE name (sst2, qnli, qqp, rte, mnli), a local CSV, TSV, JSON or JSONL file,
    digits, or stdlib, which is the source of Python's standard library with a client per package."""
    dataset_config: str | None = None
    """The hub dataset's configuration, such as sst2 of glue."""
    train_split: str = "train"
    """The hub dataset's split that the clients share out."""
    test_split: str = "validation"
    """The hub dataset's split that the server evaluates on. For MNLI, validation is validation_matched."""
    test_dataset: str | None = None
    """Another dataset by hub name, or a local file, to evaluate on. If not set, it is the test_split of the hub dataset, or
    test_fraction of the local training file."""
    test_fraction: float = 0.1
    """The part of a local training file that is held out when there is no test_dataset."""
    max_train_examples: int | None = None
    """Use at most this many training examples, drawn at random."""
    max_test_examples: int | None = None
    """Use at most this many test examples, drawn at random."""
    text_column: str | None = None
    """The column that holds the text. If not set, it is the column, or the pair of columns, of a GLUE task, or text. For a
    language model it may hold chat messages. If not set, that is text, or messages, or the only column of messages or of
    text."""
    text_pair_column: str | None = None
    """The column that holds the second text of a pair."""
    image_column: str = "image"
    """The column that holds the image."""
    label_column: str | None = None
    """The column that holds the class. If not set, it is label; a language model needs one only for the partition."""
    max_length: int = 128
    """The number of tokens after which a text is cut. A language model takes the rest as another example; of a conversation
    it takes the pieces that have tokens of the assistant."""
    prompt_template: str | None = None
    """The prompt of a language model, with columns in braces, such as "Question: {question} Answer:"."""
    response_template: str | None = None
    """The response that a language model learns, such as " {answer}". Without templates it learns the whole text column,
    or the assistant's part of the messages."""
    score: Literal["exact_match", "pass_at_1"] | None = None
    """The score of a language model's greedy answers, beside the loss: exact_match compares the last number with the
    response's, as for GSM8K; pass_at_1 runs code on test data that has HumanEval's columns."""
    score_examples: int = 100
    """The number of test examples that are scored, the first ones. Generating answers is slow."""
    max_new_tokens: int = 256
    """The maximum number of tokens of an answer that is scored."""
    execute_generated_code: bool = False
    """Allow pass_at_1 to run what the model wrote. It runs in a process of its own with limits on time and memory, but with
    your permissions."""

    partition: Partition | None = None
    """How examples are shared out: dirichlet (each class by shares from a Dirichlet distribution), iid (evenly, at random),
    or column (a client per value of partition_column). If not set, it is dirichlet where there are classes, column (package)
    for stdlib, and iid otherwise."""
    dirichlet_alpha: float = 0.5
    """The concentration of the Dirichlet partition. The smaller it is, the less alike are the clients."""
    partition_column: str | None = None
    """The column whose values are the clients, if partition is column."""

    clients: int = 10
    """N, the number of clients. If partition is column, it is the number of values, whatever is set here."""
    clients_per_round: int | None = None
    """K, the number of clients that are drawn at random each round. If not set, all take part."""
    rounds: int = 6
    """The number of communication rounds."""
    local_steps: int = 20
    """The number of optimizer steps that each client takes in a round."""
    batch_size: int = 16
    """The number of examples per step and client."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """The clients' optimizer. Its state starts anew each round."""
    lr: float = 1e-2
    """The clients' learning rate."""
    momentum: float = 0.0
    """The momentum of SGD."""
    weight_decay: float = 0.0
    """The weight decay of either optimizer."""
    max_grad_norm: float | None = None
    """The norm that each client's gradient is clipped to. If not set, gradients are not clipped."""
    clients_per_pass: int | Literal["auto"] | None = "auto"
    """Train at most this many clients in one pass, to bound memory. auto takes as many as fit into the memory that is free
    at the start; if not set (null), all train at once. Results depend on it by rounding only."""
    start: Start = "shared"
    """What clients start from. shared: all start from one adapter, as in the paper. independent: each draws its own, so that
    the first aggregation has no common reference; fedrot then rotates to the clients' consensus."""

    client_weights: Literal["examples", "equal"] = "examples"
    """The weights of clients in the server's mean. examples: each client's number of training examples. equal: the same for
    all, as in the paper's released code, which counts the examples that a client processed in the round."""
    server_optimizer: ServerOptimizerName = "none"
    """FedOpt: step towards the round's mean by momentum or adam instead of taking the mean itself."""
    server_lr: float = 0.01
    """The server optimizer's learning rate."""

    eval_every: int = 1
    """Evaluate on the server after every this many rounds, and after the last."""
    eval_batch_size: int = 64
    """The number of examples per evaluation batch."""
    geometry: bool = False
    """Measure in every round the quantities of the paper's analysis: how far clients moved from the reference, which part of
    that rotation removes, and the bound on the aggregation error. See docs/reproduction.md."""
    seed: int = 0
    """The seed of everything that is drawn at random: the partition, the initialisation, the sampling of clients and
    examples, dropout, and what a method draws (random-rotation's rotations, the factors that FLoRA begins anew with)."""
    device: str = "auto"
    """A torch device. auto takes a GPU if there is one."""

    def __post_init__(self) -> None:
        """Check the values, and set the fields that follow from others.

        Raises:
            ValueError: a value that there is not or of a wrong type, values that contradict each other, or a value of
                fedrot 0.1.
        """
        refuse_old_spellings({name: getattr(self, name) for name in OPTION_NAMES})
        super().__post_init__()
        hints = get_type_hints(SimulationConfig)
        for f in fields(self):
            if f.name not in OPTION_NAMES:
                self._set(f.name, check_type(f.name, getattr(self, f.name), hints[f.name]))
        method = make_method(self)
        method.check_one_rank()
        self._set("strength", method.strength if "strength" in method.uses else None)
        if method.needs_shared_start and self.start != "shared":
            raise ValueError(f"{self.method} freezes a factor that all clients have in common: it needs a shared start")
        if self.server_optimizer != "none" and not method.supports_server_optimizer:
            raise ValueError(f"{self.method}'s result is no mean to step towards: it cannot have a server optimizer")
        if method.updates_base and self.dtype != "float32":
            raise ValueError(f"{self.method} adds to the base weights what {self.dtype} would round away: use dtype float32")
        for name in ("clients", "rounds", "local_steps", "batch_size", "eval_every", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if isinstance(self.clients_per_pass, int) and self.clients_per_pass < 1:
            raise ValueError(f"clients_per_pass must be at least 1, auto or left out, got {self.clients_per_pass}")
        for name in ("clients_per_round", "max_train_examples", "max_test_examples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 or left out, got {getattr(self, name)}")
        for name in ("lora_scaling", "dirichlet_alpha", "lr", "server_lr", "max_grad_norm"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("momentum", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.test_fraction < 1:
            raise ValueError(f"test_fraction must lie between 0 and 1, got {self.test_fraction}")
        if self.lora_scaling is not None:
            rank = check_type("lora.r", self.lora.get("r", 8), int)  # 8 is PEFT's
            self._set("lora", {**self.lora, "lora_alpha": self.lora_scaling * rank})
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
