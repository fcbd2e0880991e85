"""A tiny causal language model with a tokenizer of its own, in a Transformers folder."""

from functools import partial

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedrot.simulation.training.local_training import train_clients

CORPUS = [
    "Question: how many apples and pears are there?\nAnswer: there are 12 of them.\n#### 12",
    "def f(x):\n    return x",
]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def save_llama(folder, *, bos=True):
    """Without a padding token, as Llama's; the tokenizer sets a beginning token, or does not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(fast), bos_token_id=0, eos_token_id=1, initializer_range=0.1, **SIZES)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def train_two(clients, rows=None):
    """Two clients' local steps from the shared start, on the training examples or on so many of them: states and losses."""
    config, task = clients.config, clients.task
    start = {name: torch.stack([p.detach()] * 2) for name, p in clients.parameters.items()}
    shape = config.local_steps, 2, config.batch_size
    indices = np.random.default_rng(0).integers(0, rows or len(task.train), shape)
    collate = partial(task.collate, task.train, device=clients.device)
    trained, losses = train_clients(clients.model.train(), start, list(indices), collate, task.losses, config)
    return [{name: x[i] for name, x in trained.items()} for i in range(2)], losses
