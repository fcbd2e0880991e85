"""The result of an aggregation, and the folders that it is saved to."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..adapters.files import check_new, new_folder
from ..adapters.folder import write_adapter
from ..adapters.keys import parse_key
from ..adapters.update import UpdateLike, open_updates
from ..errors import UpdateError
from ..options import AggregationOptions
from .report import Report


@dataclass(frozen=True)
class AggregationResult:
    """The aggregated adapter.

    Attributes:
        state_dict: the adapter in the keys, shapes and dtypes of the first update; in the shapes of the largest ranks, where
            ranks differ. Without base weights that PEFT saved beside an adapter (embeddings), where ``base_update`` changes
            them.
        report: aggregation error and rotation angles per adapter, clients used and dropped.
        options: the options that the adapters were aggregated with.
        config: the adapter's adapter_config.json, from the reference's or else the clients' folders or configs, or None.
        base_update: the change of the base weights that FLoRA, FedEx-LoRA and FedMomentum leave, as the PEFT state dict of
            an adapter to be merged into the base before ``state_dict`` is used, under the keys of a saved one: see
            ``fedrot.fold``. None for other methods.
        base_config: the adapter_config.json of that adapter.
        personal: keys that are not in ``state_dict``, of which each client keeps its own (B of FedSA-LoRA).
    """

    state_dict: dict[str, Tensor] = field(repr=False)
    report: Report
    options: AggregationOptions
    config: dict[str, Any] | None = None
    base_update: dict[str, Tensor] | None = field(default=None, repr=False)
    base_config: dict[str, Any] | None = None
    personal: tuple[str, ...] = ()

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        updates: Sequence[UpdateLike] | None = None,
        names: Sequence[str] | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the result as PEFT folders, whole or not at all, with its options and report in aggregation.json.

        The folder itself is the adapter. If the method changes the base weights, the folder has two, ``adapter`` and
        ``base_update``. If the method leaves clients a factor of their own, it has one per client, ``client0`` and so on.

        Args:
            folder: must not exist.
            updates: all updates that were aggregated, which have the clients' own factors; needed for those methods only.
            names: the clients' names, if they were aggregated by names of their own.
            record: what else aggregation.json keeps beside the options, such as the folders that were read.

        Raises:
            FileExistsError: the folder exists.
            UpdateError: there is no LoRA configuration to write, or the updates are not those that were aggregated.
        """
        check_new(folder)
        if self.config is None:
            raise UpdateError("the adapters came without a LoRA configuration: aggregate folders, or pass configs=")
        report = {"options": dict(record or {}) | self.options.as_dict(), **self.report.as_dict()}
        if self.base_update is not None:
            with new_folder(folder) as new:
                write_adapter(new / "adapter", self.state_dict, self.config, report)
                write_adapter(new / "base_update", self.base_update, self.base_config or {})
        elif self.personal:
            if updates is None:
                raise UpdateError(f"every client keeps its own {self.personal[0]} and others: pass updates= to save them")
            clients = open_updates(updates, names)
            known = {*self.report.clients, *self.report.dropped}
            own = {parse_key(key)[0] for key in self.personal}
            shared = {parse_key(key)[0]: x for key, x in self.state_dict.items()}
            if {client.name for client in clients} != known or not all(own <= c.storage.saved.keys() for c in clients):
                raise UpdateError(
                    f"{len(clients)} updates, but {len(known)} clients were aggregated: {', '.join(sorted(known))}; pass "
                    "the updates of all of them as they were, with names= if they had names"
                )
            with new_folder(folder) as new:
                for number, client in enumerate(clients):
                    if client.name not in self.report.dropped:
                        theirs = {parse_key(key)[0]: x for key, x in client.as_given(client).items()}
                        config = client.config or self.config
                        write_adapter(new / f"client{number}", {**theirs, **shared}, config, report)
        else:
            write_adapter(folder, self.state_dict, self.config, report)
