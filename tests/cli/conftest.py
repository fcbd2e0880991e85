"""The folders that commands are given in tests."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from .adapters import base_model


@pytest.fixture
def folders(tmp_path):
    """Three clients' PEFT folders."""
    paths = []
    for seed in range(3):
        model = get_peft_model(base_model(), LoraConfig(r=2, target_modules=["0", "2"]))
        torch.manual_seed(seed + 1)
        for p in model.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p)
        paths.append(str(tmp_path / f"client{seed}"))
        model.save_pretrained(paths[-1])
    return paths
