"""LoRA and the members of its family against their formulas and PEFT's, in every start."""

import math

import pytest
import torch

from highrank.base.registry import load
from highrank.model.method import Site

pytestmark = pytest.mark.parity


def test_formula(layer, agree_with_formula):
    agree_with_formula(layer.adapter("lora", r=3, alpha=4.5), lambda W, A, B: W + 4.5 / 3 * B @ A)


def test_default_alpha_is_twice_r(layer, agree_with_formula):
    agree_with_formula(layer.adapter("lora", r=5), lambda W, A, B: W + 2 * B @ A)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_peft(layer, agree_with_peft, dropout):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=4.5, lora_dropout=dropout, target_modules=["fc"])
    adapter = layer.adapter("lora", r=3, alpha=4.5, dropout=dropout)
    agree_with_peft(adapter, config, {"A": "lora_A", "B": "lora_B"})


@pytest.mark.parametrize("alpha", [4.5, None])
def test_rank_stabilised(layer, agree_with_formula, alpha):
    s = (alpha or 2 * 3) / math.sqrt(3)
    agree_with_formula(layer.adapter("lora", r=3, alpha=alpha, scaling="rs"), lambda W, A, B: W + s * B @ A)


def test_rank_stabilised_is_that_of_peft(layer, agree_with_peft):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=4.5, use_rslora=True, target_modules=["fc"])
    agree_with_peft(layer.adapter("lora", r=3, alpha=4.5, scaling="rs"), config, {"A": "lora_A", "B": "lora_B"})


def pissa(W, r, s):
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    return torch.diag((S[:r] / s).sqrt()) @ Vt[:r], U[:, :r] @ torch.diag((S[:r] / s).sqrt())


def olora(W, r, s):
    Q, R = torch.linalg.qr(W)
    return R[:r], Q[:, :r]


STARTS = {"pissa": pissa, "olora": olora}


@pytest.mark.parametrize("init", STARTS)
def test_starts_that_are_parts_of_the_weight(layer, agree_with_formula, init):
    A0, B0 = STARTS[init](layer.W, 3, 1.5)
    start = at_start(layer.W, r=3, alpha=4.5, init=init)
    assert torch.equal(start.A, A0)
    assert torch.equal(start.B, B0)
    assert torch.equal(start(layer.x, layer.W), layer.x @ layer.W.T)
    adapter = layer.adapter("lora", r=3, alpha=4.5, init=init)
    assert adapter.no_decay == ("A", "B")
    agree_with_formula(adapter, lambda W, A, B: W + 1.5 * (B @ A - B0 @ A0))


def at_start(W, **fields):
    cls = load("methods", "lora")
    adapter = cls(W.shape[1], W.shape[0], cls.config(**fields)).to(W.dtype)
    adapter.reset_parameters(W, Site("w", 0, lambda: []))
    return adapter


@pytest.mark.parametrize("init", STARTS)
def test_starts_of_peft(layer, init):
    """PEFT computes them in fp32, and puts what is left of W into the base: its parameters are ours up to rounding and the
    signs of singular vectors, and so is its merged weight when ours are trained in their place."""
    peft = pytest.importorskip("peft")
    W = layer.W.float()
    model = torch.nn.Sequential()
    model.add_module("fc", torch.nn.Linear(16, 24))
    model.fc.load_state_dict({"weight": W, "bias": layer.bias.float()})
    config = peft.LoraConfig(r=3, lora_alpha=4.5, init_lora_weights=init, target_modules=["fc"])
    theirs = peft.get_peft_model(model, config)
    fc = theirs.base_model.model.fc
    ours = at_start(W, r=3, alpha=4.5, init=init)
    near = {"rtol": 1e-4, "atol": 1e-4}  # fp32 decompositions of numbers of about 5
    torch.testing.assert_close(ours.B @ ours.A, fc.lora_B["default"].weight @ fc.lora_A["default"].weight, **near)
    torch.testing.assert_close(ours.A.abs(), fc.lora_A["default"].weight.abs(), **near)
    torch.testing.assert_close(ours.B.abs(), fc.lora_B["default"].weight.abs(), **near)
    torch.manual_seed(0)
    with torch.no_grad():
        for mine, their in ((ours.A, fc.lora_A["default"].weight), (ours.B, fc.lora_B["default"].weight)):
            mine.add_(0.3 * torch.randn_like(mine))
            their.copy_(mine)
    x = layer.x.float()
    torch.testing.assert_close(ours(x, W, layer.bias.float()), theirs(x), **near)
    torch.testing.assert_close(ours.effective_weight(W), theirs.merge_and_unload().fc.weight, **near)


@pytest.mark.parametrize("init", STARTS)
def test_a_small_step_from_such_a_start_is_not_rounded_away_on_a_16_bit_base(init):
    """A and B of about 1 would lose steps of 1e-3 when they are rounded to bf16."""
    W = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    adapter = at_start(W.float(), r=3, init=init)
    assert torch.equal(adapter(x, W), torch.nn.functional.linear(x, W))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
        added = adapter.added(x).double()
        expected = x.double() @ adapter.delta_weight(W.float()).double().T
    assert (added - expected).norm() < 2**-6 * expected.norm()  # a few roundings of 2^-9, of the update alone


@pytest.mark.parametrize("init", ["kaiming", *STARTS])
def test_a_step_keeps_one_thin_activation(init):
    adapter = at_start(torch.randn(24, 16), r=3, init=init)
    W, kept = torch.randn(24, 16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapter(torch.randn(5, 16, requires_grad=True), W)
    own = {t.data_ptr() for t in (W, *adapter.parameters(), *adapter.buffers())}
    assert sorted(t.numel() for t in kept if t.data_ptr() not in own) == [5 * 3, 5 * 16]  # x Aᵀ and x


def test_the_gaussian_start():
    adapter = at_start(torch.zeros(50, 4000), r=8, init="gaussian")
    assert abs(adapter.A.std() - 1 / 8) < 3e-3  # 4 standard errors of 1 / 8 / √(2 · 32000)
    assert not adapter.B.any()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_counts_of_starts_that_are_kept(params, init):
    found = params(f"model=llama3.2_3b placement=qv method=lora r=32 init={init}")
    assert (found.trainable, found.frozen_extra) == (9_175_040, 9_175_040)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"r": 0}, "r"),
        ({"alpha": 0.0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"scaling": "sqrt"}, "scaling"),
        ({"init": "svd"}, "init"),
        ({"init": "pissa", "r": 17}, "r"),
        ({"init": "olora", "r": 17}, "r"),
        ({"lr_ratio": 0.0}, "lr_ratio"),
    ],
)
def test_bad_fields_are_named(refused, fields, named):
    refused("lora", fields, named)
