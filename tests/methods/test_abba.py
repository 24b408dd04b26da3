"""ABBA against its formula, what it is equal to, what a step keeps of it, its counts and refusals."""

import pytest
import torch

from highrank.base.registry import load
from highrank.model.kernels import is_thin
from highrank.model.method import Site

THIN, BUILT = {"r1": 1, "r2": 2}, {"r1": 4, "r2": 3, "s": 0.5}


def longhand(W, s, B1, A1, B2, A2):
    return W + s * torch.einsum("ia,aj,ib,bj->ij", B1, A1, B2, A2)


@pytest.mark.parity
@pytest.mark.parametrize(("fields", "s"), [(THIN, 2**0.5), (BUILT, 0.5)], ids=str)
def test_formula(layer, agree_with_formula, fields, s):
    agree_with_formula(layer.adapter("abba", **fields), lambda W, **factors: longhand(W, s, **factors))


def test_both_forms_are_tested():
    assert is_thin(24, 16, 2)
    assert not is_thin(24, 16, 12)


@pytest.mark.parametrize("fields", [THIN, BUILT], ids=str)
def test_abba_is_lora_of_rank_r1_r2(layer, fields):
    """Row t of the Khatri-Rao factors is the pair (a, b) = divmod(t, r2)."""
    abba = layer.adapter("abba", **fields)
    r = fields["r1"] * fields["r2"]
    lora = layer.adapter("lora", r=r, alpha=abba.cfg.scaling * r)
    pairs = [divmod(t, fields["r2"]) for t in range(r)]
    with torch.no_grad():
        lora.A.copy_(torch.stack([abba.A1[a] * abba.A2[b] for a, b in pairs]))
        lora.B.copy_(torch.stack([abba.B1[:, a] * abba.B2[:, b] for a, b in pairs], dim=1))
    torch.testing.assert_close(abba.effective_weight(layer.W), lora.effective_weight(layer.W), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(abba(layer.x, layer.W), lora(layer.x, layer.W), rtol=1e-12, atol=1e-12)


def test_the_update_reaches_rank_r1_r2(layer):
    delta = layer.adapter("abba", r1=3, r2=4).effective_weight(layer.W) - layer.W
    assert torch.linalg.matrix_rank(delta) == 12


def test_hira_of_a_low_rank_R_is_abba_with_a_frozen_pair(layer):
    hira = layer.adapter("hira", r=3, R="w0_trunc", R_rank=4)
    abba = layer.adapter("abba", r1=4, r2=3, s=1.0)
    with torch.no_grad():
        abba.reset_parameters(layer.W, Site("w", 0, list))
        abba.B2.copy_(hira.A)
        abba.A2.copy_(hira.B)
    torch.testing.assert_close(abba.effective_weight(layer.W), hira.effective_weight(layer.W), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_the_first_pair_starts_as_the_best_approximation(shape, dtype):
    cls = load("methods", "abba")
    n, k = shape
    adapter = cls(k, n, cls.config(r1=5, r2=2))
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    adapter.reset_parameters(W, Site("w", 0, list))
    U, S, Vt = torch.linalg.svd(W.double())
    best = sum(S[i] * torch.outer(U[:, i], Vt[i]) for i in range(5))
    torch.testing.assert_close((adapter.B1 @ adapter.A1).double(), best, rtol=1e-5, atol=1e-5)  # an fp32 SVD
    torch.testing.assert_close(adapter.B1.norm(dim=0), adapter.A1.norm(dim=1), rtol=1e-5, atol=1e-5)
    assert not adapter.B2.any()
    assert 0.9 * (6 / k) ** 0.5 < adapter.A2.abs().max() <= (6 / k) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", [THIN, BUILT], ids=str)
def test_a_step_keeps_no_update(fields, dtype):
    """For backward it keeps x, the factors and, where thin, their Khatri-Rao products and x A*ᵀ: no (n, k) matrix."""
    cls = load("methods", "abba")
    adapter = cls(64, 96, cls.config(**fields | ({} if fields == THIN else {"r1": 8, "r2": 8})))
    W = torch.randn(96, 64).to(dtype)
    adapter.reset_parameters(W, Site("w", 0, list))
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t) is None or t, lambda t: t):
        x = torch.randn(5, 64, dtype=dtype, requires_grad=True)
        adapter(x, W)
    own = [t for t in kept.values() if t.data_ptr() not in {x.data_ptr(), W.data_ptr()}]
    own = [t for t in own if t.untyped_storage().data_ptr() not in {p.data_ptr() for p in adapter.parameters()}]
    r = fields["r1"] * fields["r2"]
    assert sum(t.numel() for t in own) == (r * (96 + 64 + 5) if fields == THIN else 0)


def test_counts(params):
    ours = params("model=llama3.2_3b placement=qv method=abba")  # r1 + r2 = 32
    assert (ours.trainable, ours.frozen_extra) == (9_175_040, 0)  # of LoRA r=32 there
    assert params("model=llama3_8b placement=fc_qkv method=abba").trainable == 56_623_104


@pytest.mark.parametrize(
    ("fields", "named"), [({"r1": 0}, "r1"), ({"r2": 0}, "r2"), ({"r1": 17}, "r1"), ({"s": 0.0}, "s")]
)
def test_bad_fields_are_named(refused, fields, named):
    refused("abba", fields, named)
