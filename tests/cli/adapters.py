"""The adapters that commands are given in tests, and what they write."""

import torch

import fedrot


def base_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5))


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], x) for key, x in expected.items())


def assert_written(folder, expected):
    """The adapter and its configuration."""
    state_dict, config = fedrot.read_adapter(folder)
    assert_equal(state_dict, expected.state_dict)
    assert config == expected.config
