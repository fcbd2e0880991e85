"""What else is factorised: LoRA+ has LoRA's symmetry, prompts have none, and heads of full matrices one of little use."""

import copy

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

import fedrot

from ..dense import KIND, SHARES, dense, mean_update
from ..peft_models import client_updates, factor_keys, llama, peft_model, vit
from ..refusals import refused

RATIO = 16  # of LoRA+'s learning rates, ηB/ηA
TOKENS = torch.randint(40, (6, 8), generator=torch.Generator().manual_seed(0))
SGD = {"optimizer": torch.optim.SGD, "lr": 0.02, "momentum": 0.9, "loraplus_weight_decay": 0.1}
ADAMW = {"optimizer": torch.optim.AdamW, "lr": 0.02}


def trained(update, seed=0, steps=5, **options):
    """The update after steps of LoRA+ on one client's data, by PEFT's own optimizer."""
    model = peft_model(KIND).eval()
    peft.set_peft_model_state_dict(model, update)
    optimizer = create_loraplus_optimizer(model, options.pop("optimizer"), loraplus_lr_ratio=RATIO, **options)
    assert {group["lr"] for group in optimizer.param_groups if group["params"]} == {options["lr"], options["lr"] * RATIO}
    labels = torch.randint(3, (6,), generator=torch.Generator().manual_seed(seed))
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=labels).loss.backward()
        optimizer.step()
    return {key: x.clone() for key, x in peft.get_peft_model_state_dict(model).items()}


def orthogonal(*shape, seed=0):
    return torch.linalg.qr(
        torch.randn(*shape, shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )[0]


def turned(update, seed=0):
    """The same adapter in other bases: (RᵀA, BR)."""
    turned = dict(update)
    for number, (key_A, key_B) in enumerate(factor_keys(update)):
        R = orthogonal(len(update[key_A]), seed=seed + number)
        turned[key_A], turned[key_B] = R.T @ update[key_A], update[key_B] @ R
    return turned


def difference(update, other):
    """The largest of the tensors' relative differences."""
    return max(((update[key] - x).norm() / x.norm()).item() for key, x in other.items())


@pytest.mark.parametrize(("options", "commutes"), [(SGD, True), (ADAMW, False)], ids=["SGD", "AdamW"])
def test_loraplus_steps_commute_with_rotations_as_long_as_no_entry_has_its_own_rate(options, commutes):
    """∂A = s·Bᵀ∂W turns as A does, whatever it is multiplied by; AdamW divides every entry by its own size."""
    (start,) = client_updates(KIND, 1)
    there = difference(trained(turned(start), **options), turned(trained(start, **options)))
    assert difference(trained(start, **options), start) > 0.01  # they have moved
    assert (there < 1e-11) if commutes else (there > 0.01)


def test_a_round_of_loraplus_clients_is_averaged_as_any_other():
    reference, *_ = client_updates(KIND, 1)
    updates = [trained(reference, seed=i, **ADAMW) for i in range(3)]
    exact = mean_update([KIND] * 3, updates)
    result = fedrot.aggregate(updates, SHARES, reference, align_on="A", strength=1, reflections=True)
    got, expected = dense(KIND, result.state_dict), {}
    for key_A, key_B in factor_keys(reference):
        # In dense arithmetic: the polar factor of A Aᵣᵀ by SVD, then the two means.
        svds = [torch.linalg.svd(u[key_A] @ reference[key_A].T) for u in updates]
        R = [U @ Vt for U, _, Vt in svds]
        A = sum(p * r.T @ u[key_A] for p, r, u in zip(SHARES, R, updates, strict=True))
        B = sum(p * u[key_B] @ r for p, r, u in zip(SHARES, R, updates, strict=True))
        expected[key_A.removesuffix(".lora_A.weight")] = 2 * B @ A
    for module, update in expected.items():
        torch.testing.assert_close(got[module], update, rtol=1e-9, atol=1e-10)
    lost, whole = (sum(x.square().sum() for x in of) for of in ([exact[m] - expected[m] for m in exact], exact.values()))
    assert result.report.relative_error == pytest.approx((lost / whole).sqrt().item(), rel=1e-9)
    # In whatever bases the clients are: nothing else is asked of what trained them.
    elsewhere = [turned(u, seed=10 * i) for i, u in enumerate(updates)]
    again = fedrot.aggregate(elsewhere, SHARES, reference, align_on="A", strength=1, reflections=True)
    assert difference(again.state_dict, result.state_dict) < 1e-9


PROMPTS = {
    "prompt tuning": (peft.PromptTuningConfig, {}),
    "p-tuning": (peft.PromptEncoderConfig, {"encoder_hidden_size": 8}),
    "prefix tuning": (peft.PrefixTuningConfig, {}),
}


def prompted(kind):
    """A model with a prompt of four virtual tokens, and what it says under one."""
    config, options = PROMPTS[kind]
    torch.manual_seed(0)
    base = llama().double()
    with torch.no_grad():  # so that it attends to something: fresh weights hardly tell tokens apart
        for matrix in (p for p in base.parameters() if p.ndim == 2):
            matrix.mul_(5)
    model = peft.get_peft_model(base, config(task_type="CAUSAL_LM", num_virtual_tokens=4, **options)).double().eval()
    (key,) = state = peft.get_peft_model_state_dict(model)

    @torch.no_grad()
    def logits(prompt):
        peft.set_peft_model_state_dict(model, {key: prompt})
        return model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits[:, -TOKENS.shape[1] :]

    return model, logits, torch.randn(state[key].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_rotation_of_virtual_tokens_changes_what_the_model_says(kind):
    """Rows of a prompt have places and rows of a prefix have not, which may be permuted: but a mixture is another row."""
    _, logits, prompt = prompted(kind)
    said = logits(prompt)

    def change(mixing):
        return ((logits(mixing @ prompt) - said).norm() / said.norm()).item()

    assert change(orthogonal(4)) > 0.05
    permutation = torch.eye(4, dtype=torch.float64)[[2, 0, 3, 1]]
    assert (change(permutation) < 1e-14) if kind == "prefix tuning" else (change(permutation) > 1e-3)


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_are_refused(kind, tmp_path):
    model, _, _ = prompted(kind)
    prompt = peft.get_peft_model_state_dict(model)
    with refused("client 0", "prompt_embeddings", "only LoRA", "as they are"):
        fedrot.aggregate([prompt, prompt])
    model.save_pretrained(tmp_path)
    with refused("client 0", tmp_path, model.peft_config["default"].peft_type.value, "only LORA", "as they are"):
        fedrot.aggregate([tmp_path, tmp_path])


def turned_heads(model, names, R):
    """The model with every head's rows of these factors in another basis, R: (size, size)."""
    model = copy.deepcopy(model)
    for attention in attentions(model):
        D = torch.block_diag(*[R] * (attention.q_proj.out_features // len(R)))
        with torch.no_grad():
            for name in names:
                projection = getattr(attention, f"{name}_proj")
                if name == "o":
                    projection.weight.copy_(projection.weight @ D)
                else:
                    for x in projection.parameters():
                        x.copy_(D.T @ x)
    return model


def attentions(model):
    return [module for module in model.modules() if hasattr(module, "q_proj")]


@torch.no_grad()
def said(model, inputs):
    return model.eval()(inputs).logits


def test_heads_may_be_turned_but_for_rotary_embeddings():
    torch.manual_seed(0)
    pixels, R = torch.randn(3, 3, 8, 8, dtype=torch.float64), orthogonal(8)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    planes = torch.kron(turn, torch.eye(4, dtype=torch.float64))  # of entries i and i + 4, which positions turn too
    for model, inputs, qk in ((vit(), pixels, R), (llama(), TOKENS, planes)):
        logits = said(model.double(), inputs)
        for names, basis in (("qk", qk), ("vo", R)):
            there = said(turned_heads(model, names, basis), inputs)
            torch.testing.assert_close(there, logits, rtol=0, atol=1e-13 * logits.abs().max().item())
            assert (
                basis is planes
                or (said(turned_heads(model, names[0], basis), inputs) - logits).norm() > 1e-4 * logits.norm()
            )
    rotary = said(turned_heads(model, "qk", R), inputs)
    assert (rotary - logits).norm() > 1e-4 * logits.norm()


def heads(model):
    """A stack of query beside key, and of value beside output, of every head: two of (heads, size, columns)."""
    found = [[], []]
    for attention in attentions(model):
        q, k, v = (torch.cat([x.weight, x.bias[:, None]], 1) for x in (attention.q_proj, attention.k_proj, attention.v_proj))
        for stack, pair in zip(found, ((q, k), (v, attention.o_proj.weight.T)), strict=True):
            stack.append(torch.cat(pair, 1).unflatten(0, (-1, attention.head_dim)).detach())
    return [torch.cat(stack) for stack in found]


def removed(model, other):
    """The part of the squared distance that is gone once every head is turned as well as can be, for both pairs."""
    parts = []
    for F, G in zip(heads(model), heads(other), strict=True):
        before = (F - G).square().sum()
        after = F.square().sum() + G.square().sum() - 2 * torch.linalg.svdvals(F @ G.mT).sum()
        parts.append((1 - after / before).item())
    return parts


def test_between_clients_of_one_pretrained_model_heads_have_hardly_turned():
    """A head of size k has k(k-1)/2 directions to turn in, here 5 % of all, and about so much of a change lies in them."""
    data = load_digits()
    images, labels = torch.from_numpy(data.images / 8 - 1).float()[:, None], torch.from_numpy(data.target)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}

    def fresh(seed):
        torch.manual_seed(seed)
        config = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=10, **sizes)
        return ViTForImageClassification(config)

    def tuned(model, rows, steps, lr):
        model, generator = copy.deepcopy(model).train(), torch.Generator().manual_seed(len(rows))
        optimizer = torch.optim.AdamW(model.parameters(), lr)
        for _ in range(steps):
            batch = rows[torch.randint(len(rows), (32,), generator=generator)]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[batch]).logits, labels[batch]).backward()
            optimizer.step()
        return model

    everything, by_class = torch.arange(1000), [torch.nonzero(labels[1000:] // 5 == half)[:, 0] + 1000 for half in (0, 1)]
    pretrained = tuned(fresh(0), everything, 80, 3e-3)
    first, second = (tuned(pretrained, rows, 40, 3e-3) for rows in by_class)
    for F, G in zip(heads(first), heads(second), strict=True):
        assert (F - G).norm() > 0.3 * F.norm()  # they have gone far
    assert max(removed(first, second)) < 0.12 and min(removed(fresh(0), fresh(1))) > 0.2
