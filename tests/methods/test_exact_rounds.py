"""Rounds of real adapters, trained by PEFT, against the paper's aggregation in float64 with an SVD per client.

Their B is ill-conditioned: clients' gradients have few large directions. All results are the exact ones of the factors as
they are sent, wherever these determine them; see ``tests/kernels/test_exactness.py``.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

import fedrot
import fedrot_kernels as fk
from fedrot_kernels import reference

from ..peft_models import factor_keys

EPS = torch.finfo(torch.float32).eps
CLIENTS, ROUNDS, STEPS = 4, 4, 3


def peft_model(r, classes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=classes, **sizes))
    return get_peft_model(base, LoraConfig(r=r, lora_alpha=2 * r, target_modules=["q_proj", "v_proj", "fc1", "classifier"]))


def trained(model, start, x, y, lr):
    set_peft_model_state_dict(model, start)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(STEPS):
        rows = slice(16 * step, 16 * (step + 1))
        optimizer.zero_grad()
        model(pixel_values=x[rows], labels=y[rows]).loss.backward()
        optimizer.step()
    return {key: x.clone() for key, x in get_peft_model_state_dict(model).items()}


def rounds(r, classes, lr, **options):
    """Yield every round's reference, updates and result, each round from the last one's result."""
    digits = load_digits(n_class=classes)
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    order = torch.argsort(y + 0.3 * torch.randn(len(y), generator=torch.Generator().manual_seed(0)))  # unlike clients
    shares = [rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))] for rows in order.chunk(CLIENTS)]
    model = peft_model(r, classes)
    start = {key: x.clone() for key, x in get_peft_model_state_dict(model).items()}
    aggregator = fedrot.FedRotAggregator(start, **options)
    for index in range(ROUNDS):
        updates = [trained(model, start, x[rows], y[rows], lr) for rows in shares]
        result = aggregator.aggregate(updates, [1, 2, 3, 4])
        yield index, start, updates, result
        start = result.state_dict


def exact_round(index, start, updates, align_on, strength, reflections):
    """Per adapter the exact Ā, B̄, R of all clients, and how well M determines each R."""
    on = {"alternate": "BA"[index % 2]}.get(align_on, align_on)
    for key_A, key_B in factor_keys(start):
        A, B = ([u[key].double() for u in updates] for key in (key_A, key_B))
        A_ref, B_ref = start[key_A].double(), start[key_B].double()
        R, bounds = [], []
        for a, b in zip(A, B, strict=True):
            M_A, M_B = a @ A_ref.T, b.T @ B_ref
            M = M_A if on == "A" else M_B if on == "B" else M_A / A_ref.square().sum() + M_B / B_ref.square().sum()
            hard = reference.polar(M) if reflections else reference.special_orthogonal(M)
            R.append(reference.soften(hard, strength))
            S = torch.linalg.svdvals(M)
            weakest = S[-1] if reflections else S[-1] * torch.linalg.det(M).sign()
            bounds.append(float(EPS * S.norm() / (S[-2] + weakest)))
        mean_A = reference.rotate_average(A, R, [1, 2, 3, 4])
        mean_B = reference.rotate_average([b.T for b in B], R, [1, 2, 3, 4]).T
        yield key_A, key_B, mean_A, mean_B, torch.stack(R), max(bounds)


@pytest.mark.parametrize("align_on", ["alternate", "A", "B", "joint"])
@pytest.mark.parametrize(
    ("r", "classes", "lr", "strength", "reflections"),
    [(4, 10, 0.3, 0.5, False), (4, 2, 0.05, 1.0, True), (8, 10, 0.5, 1.0, False), (16, 10, 0.1, 0.3, True)],
)
def test_every_round_is_the_exact_one(r, classes, lr, strength, reflections, align_on):
    seen, options = 0, {"align_on": align_on, "strength": strength, "reflections": reflections}
    for index, start, updates, result in rounds(r, classes, lr, **options):
        if index == 0:
            assert result.report.target is None and result.report.angle == 0
            continue
        for key_A, key_B, mean_A, mean_B, _, bound in exact_round(index, start, updates, **options):
            if bound > 1:  # nothing determines a flip, or a direction is 0
                continue
            seen += 1
            for key, exact in ((key_A, mean_A), (key_B, mean_B)):
                assert (result.state_dict[key] - exact).norm() <= 1e-4 * exact.norm(), (index, key)
            product = result.state_dict[key_B].double() @ result.state_dict[key_A].double()
            assert (product - mean_B @ mean_A).norm() <= 1e-4 * (mean_B @ mean_A).norm()
    assert seen >= 12


def test_streams_and_clients_that_align_themselves_rotate_alike():
    """A round at once, one by one and aligned by the clients: to rounding, also where M is ill-conditioned."""
    options = {"align_on": "B", "strength": 1.0}
    for index, start, updates, whole in rounds(8, 10, 1.0, **options):
        streamed = fedrot.FedRotAggregator(start, round=index, **options)
        for update, weight in zip(updates, [1, 2, 3, 4], strict=True):
            streamed.add(update, weight)
        stream = streamed.finish()
        own = [fedrot.align(update, start, round=index, **options) for update in updates]
        plain = fedrot.aggregate(own, [1, 2, 3, 4], method="fedit")
        assert stream.report.undetermined == whole.report.undetermined
        for key, mean in whole.state_dict.items():
            for other in (stream.state_dict[key], plain.state_dict[key]):
                assert (other - mean).norm() <= 1e-5 * mean.norm(), (index, key)


def test_the_report_counts_what_is_left_alone():
    """A head of two classes: its B has rank 2 at most, of r = 8."""
    counts = {}
    for index, start, updates, result in rounds(8, 2, 0.5, align_on="B"):
        if index == 2:
            counts = {a.module.rsplit(".", 1)[-1]: a.undetermined for a in result.report.adapters}
            floor = fk.FACTOR_FLOOR[torch.float32]
            expected = 0
            for _, key_B in factor_keys(start):
                for update in updates:
                    S = torch.linalg.svdvals(update[key_B].double().T @ start[key_B].double())
                    expected += int((S < floor * S.norm()).sum())
            assert result.report.undetermined == expected
            assert f"{expected} of {8 * CLIENTS * len(result.report.adapters)} directions" in str(result.report)
            assert result.report.as_dict()["undetermined"] == expected
    # The gradients of two logits are opposite, and so nearly are the two rows of B.
    assert CLIENTS * 6 <= counts["classifier"] <= CLIENTS * 7


def test_a_head_that_was_trained_for_long_is_not_turned_by_the_rounding_of_its_steps():
    """B of a softmax head sums to 0 over the classes, up to a rounding per step: that direction is left alone."""
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier = torch.nn.Linear(32, 5)

        def forward(self, x):
            return self.classifier(x)

    model = get_peft_model(Net(), LoraConfig(r=8, lora_alpha=16, target_modules=["classifier"]))
    start = {key: x.clone() for key, x in get_peft_model_state_dict(model).items()}
    aggregator = fedrot.FedRotAggregator(start, align_on="B", strength=1.0)
    data = [(torch.randn(160, 32) + c, torch.randint(0, 5, (160,))) for c in range(3)]
    for index in range(4):
        updates = []
        for x, y in data:
            set_peft_model_state_dict(model, start)
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.03)
            for step in range(400):
                rows = slice(16 * (step % 10), 16 * (step % 10 + 1))
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
            updates.append({key: x.clone() for key, x in get_peft_model_state_dict(model).items()})
        result = aggregator.aggregate(updates)
        start = result.state_dict
        if index:
            assert result.report.undetermined == 3 * (8 - 4), index
