"""BoHA against its formula, block by block; HiRA as a case of it, and it of HiRA."""

import pytest
import torch
import torch.nn.functional as F

from highrank.base.registry import load
from highrank.model.method import Site

ROUNDING = {"rtol": 1e-12, "atol": 1e-12}  # the same fp64 numbers, summed in another order


def grid(A, B):
    """M, block by block."""
    return torch.cat([torch.cat([a @ b for a, b in zip(*row, strict=True)], dim=1) for row in zip(A, B, strict=True)])


@pytest.mark.parity
@pytest.mark.parametrize("fields", [{"r": 2, "b": 2}, {"r": 12, "b": 4}, {"r": 3, "b": 1}], ids=str)
def test_formula(layer, agree_with_formula, fields):
    agree_with_formula(layer.adapter("boha", **fields), lambda W, A, B: W * (1 + grid(A, B)))


def test_one_block_is_hira(layer):
    boha, hira = layer.adapter("boha", r=3, b=1), layer.adapter("hira", r=3)
    assert torch.equal(boha.B[0, 0], hira.B)  # from the same draws
    for own, other in ((boha.A, hira.A), (boha.B, hira.B)):
        assert torch.equal(own[0, 0], other)
    torch.testing.assert_close(boha.effective_weight(layer.W), hira.effective_weight(layer.W), **ROUNDING)
    found = torch.autograd.grad(boha(layer.x, layer.W).square().sum(), [boha.A, boha.B])
    expected = torch.autograd.grad(hira(layer.x, layer.W).square().sum(), [hira.A, hira.B])
    for one, right in zip(found, expected, strict=True):
        torch.testing.assert_close(one[0, 0], right, rtol=1e-9, atol=1e-10)


def test_hira_is_boha_with_the_rows_of_its_factors_in_blocks(layer):
    """HiRA of rank r is a grid whose blocks share factors, of rank r each: BoHA of r b, with r (b - 1) more of either."""
    hira = layer.adapter("hira", r=3)
    boha = layer.adapter("boha", r=6, b=2)
    with torch.no_grad():
        boha.A.copy_(hira.A.view(2, 1, 12, 3).expand(2, 2, 12, 3))
        boha.B.copy_(hira.B.view(3, 2, 8).transpose(0, 1).expand(2, 2, 3, 8))
    torch.testing.assert_close(boha.effective_weight(layer.W), hira.effective_weight(layer.W), **ROUNDING)


@pytest.mark.parametrize(("r", "b"), [(2, 1), (2, 2), (4, 4), (8, 4)])
def test_rank_of_M_is_b_r(layer, r, b):
    adapter = layer.adapter("boha", r=r, b=b)
    M = adapter.effective_weight(layer.W) / layer.W - 1
    assert torch.linalg.matrix_rank(M, rtol=1e-10) == min(b * r, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saves_nothing_large_but_references(layer, dtype):
    """Backward keeps x, W, A and B themselves: no (n, k) product, and no copy."""
    adapter = layer.adapter("boha", r=4, b=2).float()
    x, W = layer.x.to(dtype).requires_grad_(), layer.W.to(dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        adapter(x, W)
    assert set(kept) == {t.data_ptr() for t in (x, W, adapter.A, adapter.B)}


def test_a_small_update_reaches_a_16_bit_output():
    """The share of the exact change of y that y changes by: of W' rounded to bf16 less than 0.01 does."""
    rng = torch.Generator().manual_seed(0)
    W, x = torch.randn(64, 64, generator=rng).bfloat16(), torch.randn(256, 64, generator=rng).bfloat16()
    cls = load("methods", "boha")
    adapter = cls(64, 64, cls.config(r=8, b=4))
    torch.manual_seed(0)
    adapter.reset_parameters(W, Site("w", 0, list))
    torch.nn.init.normal_(adapter.A, std=3e-3)
    exact = x.double() @ adapter.delta_weight(W).double().T.detach()

    def share(y):
        change = y.detach().double() - F.linear(x, W).double()
        return float((change * exact).sum() / exact.square().sum())

    assert share(F.linear(x, adapter.effective_weight(W).bfloat16())) < 0.01
    assert share(adapter(x, W)) > 0.3


def test_counts(params):
    assert params("model=llama3.2_3b placement=qv method=boha r=32").trainable == 9_175_040  # of HiRA r=32 there
    ours = params("model=llama3_8b placement=fc_qkv method=boha r=32")
    assert (ours.trainable, ours.frozen_extra) == (56_623_104, 0)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"r": 0}, "r"),
        ({"r": 4, "b": 0}, "b"),
        ({"r": 6, "b": 4}, "b"),
        ({"r": 12, "b": 3}, "b"),
        ({"r": 16, "b": 16}, "b"),
    ],
)
def test_bad_fields_are_named(refused, fields, named):
    refused("boha", fields, named)


def test_the_nearest_grids_are_named():
    cls = load("methods", "boha")
    with pytest.raises(Exception, match=r"got b=3 .*shape \(24, 16\); the nearest that do: 2 or 4"):
        cls.validate(16, 24, cls.config(r=12, b=3))
    with pytest.raises(Exception, match="got b=4 with r=6; the nearest that do: 3 or 6"):
        cls.config(r=6, b=4)
