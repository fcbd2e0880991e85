"""``fedrot.aggregate`` on the Triton kernels (executed on the CPU where there is no GPU) gives what PyTorch gives."""

import math

import pytest
import torch

import fedrot

from ..peft_models import KINDS, turned_clients

WEIGHTS = [1.0, 2.0, 4.5]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS_OF_KERNELS = [name for name, kind in KINDS.items() if kind.dtype != torch.float64]

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("triton_device")


def on_device(update):
    return {key: x.to(DEVICE) for key, x in update.items()}


def clients_of(kind, **options):
    reference, clients = turned_clients(KINDS[kind], 3, **options)
    return on_device(reference), [on_device(client) for client in clients]


@pytest.mark.parametrize("on", ["A", "B", "joint"])
@pytest.mark.parametrize("kind", KINDS_OF_KERNELS)
def test_both_backends_agree(kind, on):
    reference, clients = clients_of(kind)
    options = {"weights": WEIGHTS, "reference": reference, "align_on": on, "strength": 0.8}
    plain, fused = (fedrot.aggregate(clients, **options, backend=backend) for backend in ("torch", "triton"))
    assert list(fused.state_dict) == list(plain.state_dict)
    for key, x in plain.state_dict.items():
        mine = fused.state_dict[key]
        assert (mine.shape, mine.dtype, mine.device) == (x.shape, x.dtype, x.device)
        bound = torch.finfo(x.dtype).eps + 3e-6  # a rounding of the output may fall either way
        assert (mine - x).abs().max() <= bound * x.abs().max(), key
    assert fused.report.angle == pytest.approx(plain.report.angle, abs=0.05)
    assert fused.report.error == pytest.approx(plain.report.error, abs=1e-4 * plain.report.adapters[0].update_norm)


@pytest.mark.parametrize("method", ["fedit", "fedrot"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("key", ["query.lora_A.weight", "value.lora_B.weight", "classifier.bias"])
def test_clients_that_are_not_finite_are_found_after_the_launch(key, bad, method):
    reference, clients = clients_of("modules to save")
    (key,) = (name for name in clients[0] if name.endswith(key))
    broken = {name: x.clone() for name, x in clients[1].items()}
    broken[key].view(-1)[-1] = bad
    options = {"reference": reference, "method": method, "backend": "triton"}
    with pytest.raises(fedrot.UpdateError, match=f"client 1, .*{key}.* holds NaN or Inf"):
        fedrot.aggregate([clients[0], broken], **options)
    for weights in (None, [1.0, 0.0]):
        dropped = fedrot.aggregate([clients[0], broken], weights, **options, on_invalid="drop")
        assert list(dropped.report.dropped) == ["client 1"]
        alone = fedrot.aggregate(clients[:1], **options).state_dict
        assert all(torch.equal(dropped.state_dict[name], x) for name, x in alone.items())


def test_what_the_kernels_do_not_take_is_said():
    _, clients = clients_of("linear")
    double = [{key: x.double() for key, x in client.items()} for client in clients]
    with pytest.raises(ValueError, match="float16, bfloat16 and float32 of rank up to 128"):
        fedrot.aggregate(double, reference=double[0], backend="triton")
