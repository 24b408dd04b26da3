"""LoKr against its formula, entry by entry, and PEFT's; what it is equal to, and what a step keeps."""

import pytest
import torch

from highrank.base.registry import load
from highrank.model.method import Site

CASES = [
    ({"r": 1}, {"w1": (4, 4), "w2_a": (6, 1), "w2_b": (1, 4)}),
    ({"r": 2, "alpha": 3.0}, {"w1": (4, 4), "w2_a": (6, 2), "w2_b": (2, 4)}),
    ({"r": 3, "alpha": 1.5}, {"w1": (4, 4), "w2": (6, 4)}),
    ({"r": 2, "factor": 2}, {"w1": (2, 2), "w2_a": (12, 2), "w2_b": (2, 8)}),
    ({"r": 1, "factor": 8, "decompose_both": True}, {"w1_a": (8, 1), "w1_b": (1, 8), "w2_a": (3, 1), "w2_b": (1, 2)}),
    ({"r": 4, "factor": 3}, {"w1": (3, 2), "w2": (8, 8)}),
    ({"r": 12, "factor": 1}, {"w1": (1, 1), "w2": (24, 16)}),
]


def longhand(W, s, w1=None, w2=None, w1_a=None, w1_b=None, w2_a=None, w2_b=None):
    """Entry by entry of w1: a block of w2."""
    w1, w2 = w1_a @ w1_b if w1 is None else w1, w2_a @ w2_b if w2 is None else w2
    return W + s * torch.cat([torch.cat([entry * w2 for entry in row], dim=1) for row in w1])


@pytest.mark.parity
@pytest.mark.parametrize(("fields", "shapes"), CASES, ids=str)
def test_formula(layer, agree_with_formula, fields, shapes):
    adapter = layer.adapter("lokr", **fields)
    assert {name: tuple(p.shape) for name, p in adapter.named_parameters()} == shapes
    s = fields.get("alpha", fields["r"]) / fields["r"]
    agree_with_formula(adapter, lambda W, **factors: longhand(W, s, **factors))


@pytest.mark.parity
@pytest.mark.parametrize(("fields", "shapes"), CASES, ids=str)
def test_peft(layer, agree_with_peft, fields, shapes):
    peft = pytest.importorskip("peft")
    config = peft.LoKrConfig(
        r=fields["r"],
        alpha=fields.get("alpha", fields["r"]),
        decompose_both=fields.get("decompose_both", False),
        decompose_factor=fields.get("factor", -1),
        target_modules=["fc"],
    )
    agree_with_peft(layer.adapter("lokr", **fields), config, {name: f"lokr_{name}.default" for name in shapes})


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 7, 16, 64, 100])
def test_sides_are_split_as_in_peft(factor):
    layer = pytest.importorskip("peft.tuners.lokr.layer")
    cfg = load("methods", "lokr").config(factor=factor)
    for side in (*range(1, 200), 576, 896, 1536, 3072, 4096, 4864, 11008, 14336):
        assert cfg.split(side) == layer.factorization(side, factor)


def test_a_split_of_one_is_lora_or_full(layer):
    lokr, lora = layer.adapter("lokr", r=3, factor=1), layer.adapter("lora", r=3, alpha=3.0)
    with torch.no_grad():
        lokr.w1.fill_(1)
        lora.B.copy_(lokr.w2_a)
        lora.A.copy_(lokr.w2_b)
    torch.testing.assert_close(lokr.effective_weight(layer.W), lora.effective_weight(layer.W), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lokr(layer.x, layer.W), lora(layer.x, layer.W), rtol=1e-12, atol=1e-12)
    full = layer.adapter("lokr", r=12, factor=1)
    target = torch.randn(24, 16, dtype=torch.float64)
    with torch.no_grad():
        full.w1.fill_(1)
        full.w2.copy_(target)
    assert torch.equal(full.effective_weight(layer.W), layer.W + target)


def test_diablo_with_one_block_repeated_is_lokr_with_w1_the_identity(layer):
    lokr, diablo = layer.adapter("lokr", r=8, factor=4), layer.adapter("diablo", N=4)
    with torch.no_grad():
        lokr.w1.copy_(torch.eye(4))
        diablo.D.copy_(lokr.w2.expand(4, 6, 4))
    torch.testing.assert_close(lokr.effective_weight(layer.W), diablo.effective_weight(layer.W), rtol=0, atol=1e-12)


def test_rank_is_that_of_w1_times_that_of_w2(layer):
    delta = layer.adapter("lokr", r=2).effective_weight(layer.W) - layer.W
    assert torch.linalg.matrix_rank(delta) == 4 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_keeps_x_and_the_factors(dtype):
    cls = load("methods", "lokr")
    adapter = cls(64, 96, cls.config(r=2))
    adapter.reset_parameters(torch.zeros(96, 64), Site("w", 0, list))
    W, x = torch.randn(96, 64, dtype=dtype), torch.randn(50, 64, dtype=dtype, requires_grad=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t) is None or t, lambda t: t):
        adapter(x, W)
    known = {t.data_ptr() for t in (x, W, *adapter.parameters())}
    own = [t.numel() for t in kept.values() if t.untyped_storage().data_ptr() not in known]
    assert sum(own) <= adapter.num_trainable(64, 96, adapter.cfg)  # scaled, or cast


def test_counts(params):
    found = params("model=llama3.2_3b placement=qv method=lokr r=32 factor=4")  # as PEFT compares it
    assert (found.trainable, found.frozen_extra) == (2_294_656, 0)
    q, kv, fc = 64 * 64 + 8 * 128, 32 * 64 + 8 * (32 + 64), 112 * 64 + 8 * (128 + 64)
    down = 64 * 112 + 8 * (64 + 128)
    assert params("model=llama3_8b placement=fc_qkv method=lokr").trainable == 32 * (q + 2 * kv + fc + down)


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"r": 0}, "r"), ({"alpha": 0.0}, "alpha"), ({"factor": 0}, "factor"), ({"factor": -2}, "factor")],
)
def test_bad_fields_are_named(refused, fields, named):
    refused("lokr", fields, named)
