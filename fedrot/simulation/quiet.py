"""Keeping the libraries below the simulator quiet on a terminal."""

import warnings
from typing import Any

import datasets
import transformers


def quiet_libraries() -> None:
    """Keep the progress bar readable: no shard bars, no notes on heads that are new or on hub look-ups."""
    transformers_log: Any = transformers.utils.logging
    transformers_log.disable_progress_bar()
    transformers_log.set_verbosity_error()
    datasets.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message="Could not find a config file in", module="peft")
