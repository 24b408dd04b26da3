"""DeLoRA against its formula and PEFT's; how large its update can be."""

import pytest
import torch

from highrank.base.registry import load
from highrank.model.method import Site

pytestmark = pytest.mark.parity


def f(A, B, size):
    return size / len(A) * sum(torch.outer(b / b.norm(), a / a.norm()) for a, b in zip(A, B.T, strict=True))


@pytest.mark.parametrize("fields", [{"r": 3, "start": "zeros"}, {"r": 1, "start": "zeros", "boundary": 2.0}], ids=str)
def test_formula_from_zeros(layer, agree_with_formula, fields):
    w = torch.stack([column.norm() for column in layer.W.T])
    agree_with_formula(layer.adapter("delora", **fields), lambda W, A, B, lambda_: W + f(A, B, lambda_) @ torch.diag(w))


@pytest.mark.parametrize("fields", [{"r": 3}, {"r": 1, "boundary": 2.0}], ids=str)
def test_formula_with_the_start_subtracted(layer, agree_with_formula, fields):
    adapter = layer.adapter("delora", **fields)
    size = adapter.cfg.boundary
    w = torch.stack([column.norm() for column in layer.W.T])

    def weight(W, A, B, lambda_):
        return W + (f(A, B, lambda_) - f(adapter.A_0, adapter.B_0, size)) @ torch.diag(w)

    agree_with_formula(adapter, weight)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_peft(layer, agree_with_peft, dropout):
    peft = pytest.importorskip("peft")
    config = peft.DeloraConfig(r=3, delora_lambda=7, module_dropout=dropout, target_modules=["fc"])
    adapter = layer.adapter("delora", r=3, boundary=7.0, start="zeros", dropout=dropout)
    agree_with_peft(adapter, config, {"A": "delora_A", "B": "delora_B", "lambda_": "delora_lambda"})


def test_from_zeros_it_is_a_scaled_lora(layer):
    delora, lora = layer.adapter("delora", r=3, start="zeros"), layer.adapter("lora", r=3, alpha=3.0)
    with torch.no_grad():
        lora.A.copy_(delora.A / delora.A.norm(dim=1, keepdim=True) * layer.W.norm(dim=0))
        lora.B.copy_(delora.B / delora.B.norm(dim=0) * delora.lambda_ / 3)
    near = {"rtol": 1e-11, "atol": 1e-11}  # fp64 products in another order
    torch.testing.assert_close(delora.effective_weight(layer.W), lora.effective_weight(layer.W), **near)
    torch.testing.assert_close(delora(layer.x, layer.W, layer.bias), lora(layer.x, layer.W, layer.bias), **near)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_the_update_is_bounded(layer, size):
    adapter = layer.adapter("delora", r=3, start="zeros", boundary=2.0)
    with torch.no_grad():
        adapter.lambda_.fill_(2.0)
        adapter.A.mul_(size)
        adapter.B.mul_(size)
    update = (adapter.effective_weight(layer.W) - layer.W) / layer.W.norm(dim=0)
    assert 0.1 < update.norm() <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_w_to_the_last_bit_and_drawn_for_the_site(layer, dtype):
    cls, W = load("methods", "delora"), layer.W.to(dtype)
    x = layer.x.to(dtype)

    def at(seed):
        adapter = cls(16, 24, cls.config(r=3))
        adapter.reset_parameters(W, Site("w", seed, lambda: []))
        return adapter

    adapter = at(3)
    assert torch.equal(adapter.effective_weight(W), W.float())
    assert torch.equal(adapter(x, W), x @ W.T)
    assert torch.equal(adapter.B_0, at(3).B_0)
    assert not torch.equal(adapter.B_0, at(4).B_0)


def test_counts(params):
    # PEFT's comparison
    assert params("model=llama3.2_3b placement=qv method=delora r=32").trainable == 9_175_096
    found = params("model=llama3_8b placement=qv method=delora r=16")
    assert found.trainable == 32 * (16 * (8192 + 5120) + 2)
    assert found.frozen_extra == 32 * (16 * (8192 + 5120) + 8192)
    assert params("model=llama3_8b placement=qv method=delora start=zeros").frozen_extra == 32 * 8192


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"r": 0}, "r"), ({"boundary": 0.0}, "boundary"), ({"start": "ones"}, "start"), ({"dropout": 1.0}, "dropout")],
)
def test_bad_fields_are_named(refused, fields, named):
    refused("delora", fields, named)
