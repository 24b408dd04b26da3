"""DoRA against its formula and PEFT's, with the norm as a constant in the gradient."""

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.parity


def longhand(W, A, B, m):
    """Row by row, the norm a constant in the gradient."""
    rows = []
    for i in range(len(W)):
        V_i = W[i] + 1.5 * B[i] @ A
        rows.append(m[i] * V_i / V_i.detach().norm())
    return torch.stack(rows)


def test_formula(layer, agree_with_formula):
    agree_with_formula(layer.adapter("dora", r=3, alpha=4.5), longhand)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_peft(layer, agree_with_peft, dropout):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=4.5, lora_dropout=dropout, use_dora=True, target_modules=["fc"])
    adapter = layer.adapter("dora", r=3, alpha=4.5, dropout=dropout)
    agree_with_peft(adapter, config, {"A": "lora_A", "B": "lora_B", "m": "lora_magnitude_vector"})


def test_dropped_inputs_leave_the_frozen_product_alone(layer, agree):
    """y = W x + bias + (g - 1) W x̃ + g s B A x̃."""
    adapter = layer.adapter("dora", r=3, dropout=0.5)
    p = {key: value.detach().clone().requires_grad_() for key, value in adapter.named_parameters()}

    def weight():
        V = layer.W + 2 * p["B"] @ p["A"]
        return (p["m"] / V.detach().norm(dim=1))[:, None] * V

    def forward(x):
        return x @ layer.W.T + layer.bias + F.dropout(x, 0.5) @ (weight() - layer.W).T

    agree(adapter, forward, p, weight)


def test_a_row_of_zeros_stays_finite(layer):
    layer.W[3] = 0
    adapter = layer.adapter("dora", r=3)
    with torch.no_grad():
        adapter.B.zero_()
    y = adapter(layer.x, layer.W)
    assert torch.equal(y[:, 3], torch.zeros_like(y[:, 3]))
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in adapter.parameters())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"r": 0}, "r"),
        ({"alpha": -1.0}, "alpha"),
        ({"dropout": -0.1}, "dropout"),
    ],
)
def test_bad_fields_are_named(refused, fields, named):
    refused("dora", fields, named)
