"""Models and tasks that several tests of the simulation have."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from fedrot.simulation import SimulationConfig, load_task

from ..language_models import save_llama


@pytest.fixture(scope="module")
def task():
    """The embedded digits."""
    return load_task(SimulationConfig())


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder of a tiny Llama, untrained."""
    return str(save_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory):
    """A folder of a tiny BERT with a vocabulary of a few words, untrained."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "fine", "bad", "poor", "a", "film", "play"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "initializer_range": 0.3,
    }
    BertForSequenceClassification(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return folder
