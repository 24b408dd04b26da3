"""LoRA-XS against its formula, as a LoRA, and with singular vectors of either sign."""

import pytest
import torch

from highrank.base.registry import load
from highrank.model.method import Site

pytestmark = pytest.mark.parity


def singular(W, r):
    """A and B, each singular pair turned by hand."""
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    for j in range(r):
        if max(U[:, j], key=abs) < 0:
            U[:, j], Vt[j] = -U[:, j], -Vt[j]
    return torch.diag(S[:r]) @ Vt[:r], U[:, :r]


@pytest.mark.parametrize("alpha", [None, 6.0])
@pytest.mark.parametrize("r", [1, 3, 16])
def test_formula(layer, agree_with_formula, r, alpha):
    A, B = singular(layer.W, r)
    s = 1.0 if alpha is None else alpha / r
    agree_with_formula(layer.adapter("lora_xs", r=r, alpha=alpha), lambda W, R: W + s * B @ R @ A)


def test_is_lora_between_singular_vectors(layer):
    """With LoRA's B = U_r R and A = Σ_r V_rᵀ."""
    xs, lora = layer.adapter("lora_xs", r=3), layer.adapter("lora", r=3, alpha=3.0)
    with torch.no_grad():
        lora.A.copy_(xs.A)
        lora.B.copy_(xs.B @ xs.R)
    near = {"rtol": 1e-12, "atol": 1e-12}  # the same fp64 numbers in another order
    torch.testing.assert_close(xs.effective_weight(layer.W), lora.effective_weight(layer.W), **near)
    torch.testing.assert_close(xs(layer.x, layer.W), lora(layer.x, layer.W), **near)
    assert torch.linalg.matrix_rank(xs.delta_weight(layer.W).double(), rtol=1e-6) == 3


@pytest.mark.parametrize("turned", [torch.Tensor.neg, lambda W: W.flip(0).flip(0)])
def test_the_vectors_do_not_depend_on_the_signs_that_an_svd_gives(layer, turned, monkeypatch):
    cls, svd = load("methods", "lora_xs"), torch.linalg.svd
    first, second = (cls(16, 24, cls.config(r=4)).double() for _ in range(2))
    first.reset_parameters(layer.W, Site("w", 0, lambda: []))

    def other(W, full_matrices):
        U, S, Vt = svd(W, full_matrices=full_matrices)
        return turned(U), S, turned(Vt)

    monkeypatch.setattr(torch.linalg, "svd", other)
    second.reset_parameters(layer.W, Site("w", 0, lambda: []))
    assert torch.equal(first.A, second.A)
    assert torch.equal(first.B, second.B)


def test_a_step_keeps_no_more_than_three_thin_activations():
    cls = load("methods", "lora_xs")
    adapter = cls(16, 24, cls.config(r=3))
    W = torch.randn(24, 16)
    adapter.reset_parameters(W, Site("w", 0, lambda: []))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapter(torch.randn(5, 16, requires_grad=True), W)
    own = [W, *adapter.parameters(), *adapter.buffers()]
    held = {t.data_ptr(): t.numel() for t in kept if t.data_ptr() not in {o.data_ptr() for o in own}}
    assert sum(held.values()) <= 5 * 3 + 3 * 3  # x Aᵀ, and s R


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"r": 0}, "r"), ({"r": 17}, "r"), ({"alpha": 0.0}, "alpha"), ({"dropout": 1.0}, "dropout")],
)
def test_bad_fields_are_named(refused, fields, named):
    refused("lora_xs", fields, named)


def test_counts(params):
    found = params("model=llama3_8b method=lora_xs r=64")
    assert found.trainable == 32 * 5 * 64**2
    assert found.frozen_extra == params("model=llama3_8b method=lora r=64").trainable
