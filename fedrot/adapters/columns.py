"""The factors of a round's clients, adapter by adapter."""

from collections.abc import Sequence

from torch import Tensor

from fedrot_kernels import Factors, TensorColumns

from .layout import Layout, as_matrix
from .update import Update


def client_factors(layout: Layout, clients: Sequence[Update]) -> tuple[Factors, Factors]:
    """A (r, d_in) and B (d_out, r) of N clients per adapter of the layout.

    Tensors that were read when their state dicts were opened are not read again.
    """
    first, keys = clients[0], list(zip(*layout.factor_keys, strict=True))
    if layout.has_matrices and first.table is not None and all(client.signature == first.signature for client in clients):
        tables = [client.table for client in clients if client.table is not None]
        places = {key: place for place, key in enumerate(first.tensors)}
        given = first.keys_given
        A, B = (TensorColumns(tables, [places[given[key]] for key in of_factor]) for of_factor in keys)
        return A, B
    factors_A, factors_B = ([matrices([client[key] for client in clients]) for key in of_factor] for of_factor in keys)
    return factors_A, factors_B


def matrices(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Factors as matrices, those of convolutions too."""
    return [as_matrix(x) for x in tensors]
