import pytest
import torch

pytestmark = pytest.mark.parity


def test_formula(layer, agree_with_formula):
    agree_with_formula(layer.adapter("hyperadapt"), lambda W, a, b: W * torch.outer(a, b))


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
