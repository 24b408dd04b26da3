"""LoHa against its formula and PEFT's, as an ABBA, and LoRA as a case of it."""

import pytest
import torch

from highrank.base.registry import load
from highrank.model.kernels import is_thin
from highrank.model.method import Site

THIN, BUILT = {"r": 1}, {"r": 3, "alpha": 1.5}  # PEFT rounds the scaling to fp32


def longhand(W, s, B1, A1, B2, A2):
    return W + s * torch.einsum("ia,aj,ib,bj->ij", B1, A1, B2, A2)


@pytest.mark.parity
@pytest.mark.parametrize(("fields", "s"), [(THIN, 1.0), (BUILT, 0.5)], ids=str)
def test_formula(layer, agree_with_formula, fields, s):
    agree_with_formula(layer.adapter("loha", **fields), lambda W, **factors: longhand(W, s, **factors))


@pytest.mark.parity
@pytest.mark.parametrize(("fields", "alpha"), [(THIN, 1), (BUILT, 1.5), ({"r": 2, "alpha": 5.0}, 5)], ids=str)
def test_peft(layer, agree_with_peft, fields, alpha):
    peft = pytest.importorskip("peft")
    config = peft.LoHaConfig(r=fields["r"], alpha=alpha, target_modules=["fc"])
    names = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}
    agree_with_peft(layer.adapter("loha", **fields), config, names)


def test_both_forms_are_tested():
    assert is_thin(24, 16, 1)
    assert not is_thin(24, 16, 9)


@pytest.mark.parametrize("fields", [THIN, BUILT], ids=str)
def test_loha_is_abba_with_equal_ranks(layer, fields):
    loha = layer.adapter("loha", **fields)
    abba = layer.adapter("abba", r1=loha.cfg.r, r2=loha.cfg.r, s=loha.cfg.scaling)
    abba.load_state_dict(loha.state_dict())
    assert torch.equal(abba.effective_weight(layer.W), loha.effective_weight(layer.W))
    assert torch.equal(abba(layer.x, layer.W), loha(layer.x, layer.W))


def test_lora_is_loha_with_a_first_product_of_ones(layer):
    loha, lora = layer.adapter("loha", r=3, alpha=2.0), layer.adapter("lora", r=3, alpha=2.0)
    with torch.no_grad():
        loha.B1.zero_()
        loha.A1.zero_()
        loha.B1[:, 0] = loha.A1[0] = 1
        loha.B2.copy_(lora.B)
        loha.A2.copy_(lora.A)
    torch.testing.assert_close(loha.effective_weight(layer.W), lora.effective_weight(layer.W), rtol=1e-12, atol=1e-12)


def test_the_update_reaches_rank_r_squared(layer):
    delta = layer.adapter("loha", r=3).effective_weight(layer.W) - layer.W
    assert torch.linalg.matrix_rank(delta) == 9


def test_the_start():
    cls = load("methods", "loha")
    adapter = cls(64, 96, cls.config(r=4))
    adapter.reset_parameters(torch.zeros(96, 64), Site("w", 0, list))
    for factor, bound in ((adapter.B1, 0.5), (adapter.A1, 0.125), (adapter.B2, 0.5)):
        assert 0.95 * bound < factor.abs().max() <= bound
    assert not adapter.A2.any()


def test_counts(params):
    found = params("model=llama3.2_3b placement=qv method=loha r=32")  # as PEFT compares it
    assert (found.trainable, found.frozen_extra) == (18_350_080, 0)
    assert params("model=llama3_8b placement=fc_qkv method=loha r=16").trainable == 56_623_104


@pytest.mark.parametrize(("fields", "named"), [({"r": 0}, "r"), ({"alpha": 0.0}, "alpha")])
def test_bad_fields_are_named(refused, fields, named):
    refused("loha", fields, named)
