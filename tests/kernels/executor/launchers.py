"""Executing the launchers of ``fedrot_kernels/triton_backend`` for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from fedrot_kernels.triton_backend import rotations, whole_model

from .driver import Driver, ptx_instead_of_binary
from .execution import DEFAULT, Settings
from .memory import poison

OUTPUTS = {
    "cross_covariance_kernel": ("p_M",),
    "polar_kernel": ("p_R", "p_residual", "p_undetermined"),
    "polar_blocked_kernel": ("p_R", "p_residual", "p_undetermined", "p_scratch"),
    "rotate_average_kernel": ("p_out", "p_finite"),
    "plain_average_kernel": ("p_out", "p_finite"),
}


@contextmanager
def executed(arch: int, settings: Settings = DEFAULT) -> Iterator[Driver]:
    """Every launch of a Triton kernel is compiled for an architecture and executed, on tensors of the CPU.

    What ``torch.empty`` gives is poisoned. The launchers stay as they are but for what asks whether there is a device, and
    for being listened to when they put addresses of tensors into a table.

    Args:
        arch: 80 or 90.
        settings: how to execute; the driver's may be changed from launch to launch.

    Raises:
        Fault: by a launch, if a kernel does what it must not.
    """
    if not isinstance(whole_model.plain_average.plain_average_kernel, triton.runtime.JITFunction):
        raise RuntimeError("kernels were made for Triton's interpreter: do not set TRITON_INTERPRET before the import")
    driver = Driver(arch, settings, OUTPUTS)
    addresses_of, address_table, empty = whole_model.addresses_of, whole_model.address_table, torch.empty

    def listened(clients: Any) -> tuple[list[int], Any]:
        addresses, alive = addresses_of(clients)
        driver.tables.add(addresses, alive[0].shape, alive[0].element_size())
        return addresses, alive

    def closed(*arguments: Any) -> Tensor:
        table = address_table(*arguments)
        driver.tables.close(table)
        return table

    before = triton.runtime.driver._active  # not .active, which looks for a card
    triton.runtime.driver.set_active(driver)
    try:
        with (
            patch.object(triton.knobs.runtime, "add_stages_inspection_hook", ptx_instead_of_binary),
            patch.object(whole_model, "interpreted", lambda: True),
            patch.object(rotations, "interpreted", lambda: True),
            patch.object(whole_model, "addresses_of", listened),
            patch.object(whole_model, "address_table", closed),
            patch.object(torch, "empty", lambda *shape, **options: poison(empty(*shape, **options))),
        ):
            yield driver
    finally:
        triton.runtime.driver.set_active(before)
