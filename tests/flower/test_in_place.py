"""Answers that are read where they lie: the bytes stay as they came, and nothing that is returned lies in them."""

import gc
import warnings

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedrot import METHODS, ServerOptimizer
from fedrot.adapters.keys import factor_of
from fedrot.flower import FedRot, from_arrays, to_arrays
from fedrot.flower.arrays import _HEADERS, _read_header, _write_header, open_arrays

from ..peft_models import KINDS, client_updates
from ..refusals import refused
from .local_grid import LocalGrid
from .strategy_runs import configs, start_of

DTYPES = ["<f2", "<f4", "<f8", "<i2", "<i4", "<i8", "|i1", "|u1", "|b1"]

CASES = [(name, steps) for name, method in METHODS.items() for steps in {False, method.supports_server_optimizer}]


def lies_in(x: torch.Tensor, data: bytes) -> bool:
    start = np.frombuffer(data, np.uint8).ctypes.data
    return start <= x.data_ptr() < start + len(data)


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_are_read_where_they_lie_without_a_warning(dtype):
    given = {"C": np.ones((3, 4), dtype), "F": np.asfortranarray(np.eye(3, 4, dtype=dtype)), "scalar": np.ones((), dtype)}
    record = ArrayRecord({key: Array(x) for key, x in given.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_arrays(record, "client 1")
    for key, x in opened.items():
        assert lies_in(x, record[key].data) and not lies_in(from_arrays(record)[key], record[key].data)
        assert np.array_equal(x.numpy(), given[key]) and x.numpy().dtype == dtype
        assert x.stride() == torch.from_numpy(given[key]).stride()


def test_a_tensor_keeps_its_bytes():
    x = open_arrays(to_arrays({"x": torch.arange(100000.0)}), "client 1")["x"]
    gc.collect()
    others = [to_arrays({"x": torch.zeros(100000)}) for _ in range(20)]  # would take memory that was given back
    assert torch.equal(x, torch.arange(100000.0)) and others


@pytest.mark.parametrize("pad", range(8))
def test_numbers_between_places_of_their_size_are_copied(pad):
    given = np.arange(3.0)
    text = b"{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }" + b" " * pad + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + given.tobytes()
    x = open_arrays(ArrayRecord({"x": Array("float64", (3,), "numpy.ndarray", data)}), "client 1")["x"]
    assert x.data_ptr() % 8 == 0 and x.tolist() == given.tolist()
    assert lies_in(x, data) == ((10 + len(text)) % 8 == 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 4), (5, 1), (2, 1, 3, 1)])
def test_what_is_written_is_flowers_own_to_the_byte(dtype, shape):
    array = np.ones(shape, dtype)
    ours, flowers = to_arrays({"x": torch.from_numpy(array)})["x"], Array(array)
    assert ours == flowers and type(ours.shape) is type(flowers.shape)


def test_many_headers_are_read_and_few_are_remembered():
    for n in range(2 * _HEADERS):
        assert open_arrays(to_arrays({"x": torch.arange(n)}), "client 1")["x"].tolist() == list(range(n))
    assert _read_header.cache_info().currsize == _write_header.cache_info().currsize == _HEADERS


def test_a_header_that_was_read_before_is_held_to_its_data():
    array = to_arrays({"x": torch.ones(3)})["x"]
    open_arrays(ArrayRecord({"x": array}), "client 1")
    with refused("client 2, x", "needs 12 bytes, but 11"):
        open_arrays(ArrayRecord({"x": Array(array.dtype, array.shape, array.stype, array.data[:-1])}), "client 2")


@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize(("method", "steps"), CASES)
def test_no_aggregation_writes_to_an_answer_or_returns_its_memory(method, steps, clients):
    kind = KINDS["modules to save"]
    optimizer = ServerOptimizer("adam", 0.1) if steps else None
    options = {"method": method, "configs": configs(kind), "server_optimizer": optimizer, "on_invalid": "raise"}
    strategy = FedRot(min_available_nodes=clients, min_train_nodes=clients, **options)
    start = start_of(kind)
    strategy._begin(strategy._open(to_arrays(start), "the server's adapter"))
    returned, trained = strategy.method.returns(), strategy.method.trains(0)
    sent = to_arrays({key: x for key, x in start.items() if factor_of(key) in (None, *returned)})
    messages = list(strategy.configure_train(1, sent, ConfigRecord(), LocalGrid(dict.fromkeys(range(clients)))))
    replies = [
        Message(
            RecordDict(
                {
                    "arrays": to_arrays({k: u[k] if factor_of(k) in (None, *trained) else start[k] for k in sent}),
                    "metrics": MetricRecord({"num-examples": 1 + i}),
                }
            ),
            reply_to=message,
        )
        for i, (message, u) in enumerate(zip(messages, client_updates(kind, clients), strict=True))
    ]
    received = [array.data for reply in replies for array in reply.content["arrays"].values()]
    received += [array.data for array in sent.values()]
    copies = [bytes(bytearray(data)) for data in received]
    strategy.aggregate_train(1, replies)
    assert received == copies
    result = strategy.result
    assert result.report.clients and not result.report.dropped
    returned = [*result.state_dict.values(), *(result.base_update or {}).values()]
    assert not any(lies_in(x, data) for x in returned for data in received)
