"""C3A against its formula, entry by entry, and PEFT's, whose gradient for x is not that of its output."""

import pytest
import torch
import torch.nn.functional as F

from highrank.base.errors import UserError
from highrank.base.registry import load

pytestmark = pytest.mark.parity


def dense(W, c):
    """Entry by entry."""
    b, (n, k) = c.shape[-1], W.shape
    return W + torch.stack(
        [torch.stack([c[o // b, i // b, (i % b - o % b) % b] / k for i in range(k)]) for o in range(n)]
    )


@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
def test_formula(layer, agree_with_formula, block_size):
    agree_with_formula(layer.adapter("c3a", block_size=block_size), dense)


def test_formula_with_an_odd_block():
    cls = load("methods", "c3a")
    adapter = cls(15, 10, cls.config(block_size=5)).double()
    rng = torch.Generator().manual_seed(0)
    W, x, dy, c = (torch.randn(s, generator=rng, dtype=torch.float64) for s in ((10, 15), (7, 15), (7, 10), (2, 3, 5)))
    with torch.no_grad():
        adapter.c.copy_(c)
    actual, expected = adapter(x, W), F.linear(x, dense(W, c.requires_grad_()))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)  # fp64
    gradients = (torch.autograd.grad((y * dy).sum(), p)[0] for y, p in ((actual, adapter.c), (expected, c)))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


class InDouble:
    """torch, where fp32 means fp64: PEFT computes in fp32 whatever it is given."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


class Derived:
    """PEFT's product with the gradient that follows from it: the one PEFT writes for x is another."""

    @staticmethod
    def apply(x, w):
        _, n, b = w.shape
        x = torch.einsum("...nb,mnb->...mb", torch.fft.ifft(x.unflatten(-1, (n, b))), torch.fft.fft(w))
        return torch.fft.fft(x).real.flatten(-2)


@pytest.mark.parametrize("block_size", [2, 8])
def test_peft(layer, agree_with_peft, monkeypatch, block_size):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr("peft.tuners.c3a.layer.torch", InDouble())
    monkeypatch.setattr("peft.tuners.c3a.layer.BlockCircularConvolution", Derived)
    config = peft.C3AConfig(block_size=block_size, target_modules=["fc"])
    agree_with_peft(layer.adapter("c3a", block_size=block_size), config, {"c": "c3a_kernel"})


def test_what_peft_computes_is_what_derives_from(layer):
    utils = pytest.importorskip("peft.tuners.c3a.utils")
    c = layer.adapter("c3a", block_size=8).c
    for y, expected in zip(
        *(_and_gradient(product.apply, layer, c) for product in (utils.BlockCircularConvolution, Derived)), strict=True
    ):
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)  # fp64


def _and_gradient(product, layer, c):
    y = product(layer.x, c)
    return y, *torch.autograd.grad((y * layer.dy).sum(), c)


def test_with_blocks_of_one_it_is_any_update(layer):
    """Whatever full fine-tuning makes of W."""
    full, adapter = layer.adapter("full"), layer.adapter("c3a", block_size=1)
    with torch.no_grad():
        adapter.c[..., 0] = 16 * (full.weight - layer.W)
    near = {"rtol": 1e-12, "atol": 1e-12}  # fp64, summed in another order
    torch.testing.assert_close(adapter.effective_weight(layer.W), full.weight, **near)
    torch.testing.assert_close(adapter(layer.x, layer.W), full(layer.x, layer.W), **near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_keeps_x_and_c(dtype):
    cls = load("methods", "c3a")
    adapter = cls(16, 24, cls.config(block_size=4))
    torch.nn.init.normal_(adapter.c)
    W, x, kept = torch.randn(24, 16, dtype=dtype), torch.randn(5, 16, dtype=dtype, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapter(x, W)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, W, adapter.c)}


def test_counts(params):
    # PEFT's comparison
    assert params("model=llama3.2_3b placement=qv method=c3a block_size=64").trainable == 5_505_024
    assert params("model=llama3_8b placement=qv method=c3a block_size=128").trainable == 32 * 4096 * 5120 // 128


@pytest.mark.parametrize("block_size", [0, 3, 16])
def test_bad_fields_are_named(refused, block_size):
    refused("c3a", {"block_size": block_size}, "block_size")


def test_the_nearest_sizes_are_named():
    cls = load("methods", "c3a")
    with pytest.raises(UserError, match=r"the nearest that do: 4 or 8$"):
        cls.validate(16, 24, cls.config(block_size=5))
