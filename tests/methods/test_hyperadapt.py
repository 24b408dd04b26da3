"""HyperAdapt against its formula, one side alone, and gradients by hand."""

import pytest
import torch

from highrank.base.registry import load
from highrank.model.method import Site

pytestmark = pytest.mark.parity


def test_formula(layer, agree_with_formula):
    agree_with_formula(layer.adapter("hyperadapt"), lambda W, a, b: W * torch.outer(a, b))


@pytest.mark.parametrize(
    ("sides", "weight"), [("a", lambda W, a: torch.diag(a) @ W), ("b", lambda W, b: W @ torch.diag(b))]
)
def test_one_side_alone(layer, agree_with_formula, sides, weight):
    agree_with_formula(layer.adapter("hyperadapt", sides=sides), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("sides", ["a", "b"])
def test_one_side_is_both_with_the_other_at_1(sides, tokens, dtype):
    """Below and above the number of tokens from which on W' is built."""
    cls = load("methods", "hyperadapt")
    one, both = cls(16, 24, cls.config(sides=sides)), cls(16, 24, cls.config())
    rng = torch.Generator().manual_seed(0)
    W, x = torch.randn(24, 16, generator=rng).to(dtype), torch.randn(tokens, 16, generator=rng).to(dtype)
    bias, dy = torch.randn(24, generator=rng).to(dtype), torch.randn(tokens, 24, generator=rng).to(dtype)
    site = Site("w", 0, lambda: [])
    both.reset_parameters(W, site)
    with torch.no_grad():
        vector = one.get_parameter(sides)
        vector.copy_(1 + 0.1 * torch.randn(vector.shape, generator=rng))
        both.get_parameter(sides).copy_(vector)
    found = []
    for adapter in (one, both):
        given = x.clone().requires_grad_()
        y = adapter(given, W, bias)
        (y * dy).sum().backward()
        found.append((y.detach(), given.grad, adapter.get_parameter(sides).grad))
    # fp32: sums in another order; bf16: one rounding of 2^-9 in each of a few steps, against entries of up to 40
    near = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 0.3}
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **near)


def test_a_random_start_is_around_1():
    cls = load("methods", "hyperadapt")
    adapter = cls(4000, 4000, cls.config(init_std=0.1))
    adapter.reset_parameters(torch.zeros(1), Site("w", 0, lambda: []))
    for vector in (adapter.a, adapter.b):
        assert abs(vector.mean() - 1) < 0.01  # 6 standard errors of 0.1 / √4000
        assert abs(vector.std() - 0.1) < 0.01


@pytest.mark.parametrize(("fields", "named"), [({"sides": "ba"}, "sides"), ({"init_std": -0.1}, "init_std")])
def test_bad_fields_are_named(refused, fields, named):
    refused("hyperadapt", fields, named)


def test_counts(params):
    a, b, both = (
        params(f"model=llama3_8b placement=all method=hyperadapt sides={s}").trainable for s in ("a", "b", "ab")
    )
    # per layer: n of q, k, v, o, gate, up, down; k of the same
    assert (a, b) == (32 * (4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096), 32 * (6 * 4096 + 14336))
    assert a + b == both == 2_621_440


def test_gradients_by_hand(layer):
    """∂a = (W ⊙ G) b and ∂b = (W ⊙ G)ᵀ a, with G = δᵀ x."""
    adapter = layer.adapter("hyperadapt")
    (adapter(layer.x, layer.W, layer.bias) * layer.dy).sum().backward()
    WG = layer.W * (layer.dy.T @ layer.x)
    torch.testing.assert_close(adapter.a.grad, WG @ adapter.b, rtol=1e-10, atol=1e-10)  # fp64, another order
    torch.testing.assert_close(adapter.b.grad, WG.T @ adapter.a, rtol=1e-10, atol=1e-10)


def test_rank_is_up_to_twice_that_of_the_weight(layer):
    W = layer.W[:, :5] @ layer.W[:5]
    adapter = layer.adapter("hyperadapt")
    assert torch.linalg.matrix_rank(adapter.effective_weight(W) - W) == 10
