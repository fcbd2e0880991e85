"""What the tests of bad input have in common: an update's keys, and what an error must name."""

from contextlib import contextmanager

import pytest

from fedrot import UpdateError

from .peft_models import KINDS

LINEAR = KINDS["modules to save"]
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"
A, B, HEAD = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight", "base_model.model.classifier.weight"
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


@contextmanager
def refused(*parts, error=UpdateError):
    """The error, and everything its message must name."""
    with pytest.raises(error) as caught:
        yield
    for part in parts:
        assert str(part) in str(caught.value)
