"""GraLoRA against its formula, block by block, and PEFT's; LoRA as a case of it, and it of LoRA."""

import pytest
import torch

from highrank.base.registry import load


def longhand(W, s, A, B, L1=None, L2=None):
    """Block by block: A_ij and B_ij are the i-th and the j-th r/K of A_j and B_i."""
    K, _, r = A.shape
    q = r // K
    rows = [
        torch.cat([(A[j][:, i * q : (i + 1) * q] @ B[i][j * q : (j + 1) * q]).T for j in range(K)], dim=1)
        for i in range(K)
    ]
    return W + s * (torch.cat(rows) + (0 if L1 is None else L2 @ L1))


CASES = [
    ({"r": 2, "K": 2}, 2.0),
    ({"r": 8, "K": 4, "alpha": 3.0}, 3 / 8),
    ({"r": 4, "K": 2, "hybrid_r": 3, "alpha": 5.0}, 5 / 7),
    ({"r": 3, "K": 1}, 2.0),
    ({"r": 4, "K": 2, "hybrid_r": 2}, 8 / 6),
]


@pytest.mark.parity
@pytest.mark.parametrize(("fields", "s"), CASES, ids=str)
def test_formula(layer, agree_with_formula, fields, s):
    agree_with_formula(layer.adapter("gralora", **fields), lambda W, **own: longhand(W, s, **own))


@pytest.mark.parity
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(("fields", "s"), CASES, ids=str)
def test_peft(layer, agree_with_peft, fields, s, dropout):
    peft = pytest.importorskip("peft")
    r, hybrid_r = fields["r"], fields.get("hybrid_r", 0)
    config = peft.GraloraConfig(
        r=r,
        gralora_k=fields["K"],
        hybrid_r=hybrid_r,
        alpha=s * (r + hybrid_r),
        gralora_dropout=dropout,
        target_modules=["fc"],
    )
    names = {"A": "gralora_A.", "B": "gralora_B."}
    if hybrid_r:
        names |= {"L1": "gralora_A_general", "L2": "gralora_B_general"}
    agree_with_peft(layer.adapter("gralora", **fields, dropout=dropout), config, names)


def test_K_1_is_lora(layer):
    gralora, lora = layer.adapter("gralora", r=3, K=1, alpha=4.5), layer.adapter("lora", r=3, alpha=4.5)
    with torch.no_grad():
        lora.A.copy_(gralora.A[0].T)
        lora.B.copy_(gralora.B[0].T)
    torch.testing.assert_close(
        gralora.effective_weight(layer.W), lora.effective_weight(layer.W), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(gralora(layer.x, layer.W), lora(layer.x, layer.W), rtol=1e-12, atol=1e-12)


def test_lora_is_gralora_with_shared_factors(layer):
    """LoRA of rank q is a grid whose blocks share factors of rank q: GraLoRA of rank q K."""
    lora, gralora = layer.adapter("lora", r=3, alpha=3.0), layer.adapter("gralora", r=6, K=2, alpha=6.0)
    with torch.no_grad():
        gralora.A.copy_(lora.A.view(3, 2, 8).permute(1, 2, 0).repeat(1, 1, 2))
        gralora.B.copy_(lora.B.view(2, 12, 3).mT.repeat(1, 2, 1))
    torch.testing.assert_close(
        gralora.effective_weight(layer.W), lora.effective_weight(layer.W), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(("fields", "rank"), [({"r": 4, "K": 1}, 4), ({"r": 4, "K": 2}, 8), ({"r": 4, "K": 4}, 16)])
def test_rank_is_K_r(layer, fields, rank):
    delta = layer.adapter("gralora", **fields).effective_weight(layer.W) - layer.W
    assert torch.linalg.matrix_rank(delta) == rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_step_keeps(dtype):
    """For backward it keeps x and K r numbers per token, beside the factors as they are multiplied."""
    cls = load("methods", "gralora")
    adapter = cls(64, 96, cls.config(r=8, K=4))
    torch.nn.init.normal_(adapter.A)
    torch.nn.init.normal_(adapter.B)
    W, x = torch.randn(96, 64, dtype=dtype), torch.randn(5, 64, dtype=dtype, requires_grad=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t) is None or t, lambda t: t):
        adapter(x, W)
    known = {t.data_ptr() for t in (x, W, *adapter.parameters())}
    own = [t.numel() for t in kept.values() if t.untyped_storage().data_ptr() not in known]
    cast = 8 * (96 + 64) if dtype == torch.bfloat16 else 0
    assert sum(own) == 5 * 4 * 8 + cast


def test_counts(params):
    found = params("model=llama3.2_3b placement=qv method=gralora")  # r = 32, as PEFT compares it
    assert (found.trainable, found.frozen_extra) == (9_175_040, 0)
    assert params("model=llama3_8b placement=fc_qkv method=gralora hybrid_r=32").trainable == 2 * 56_623_104


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"r": 0}, "r"),
        ({"K": 0}, "K"),
        ({"hybrid_r": -1}, "hybrid_r"),
        ({"r": 6, "K": 4}, "K"),
        ({"r": 6, "K": 3}, "K"),
        ({"r": 16, "K": 16}, "K"),
        ({"alpha": 0.0}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_fields_are_named(refused, fields, named):
    refused("gralora", fields, named)
