"""VeRA against its formula and PEFT's, its projections bit for bit."""

import pytest
import torch

from highrank.base.registry import load

pytestmark = pytest.mark.parity


def test_formula(layer, agree_with_formula):
    adapter = layer.adapter("vera", r=4)
    A, B = adapter.shared_tensors.A, adapter.shared_tensors.B
    agree_with_formula(adapter, lambda W, lambda_b, lambda_d: W + torch.diag(lambda_b) @ B @ torch.diag(lambda_d) @ A)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_peft(layer, agree_with_peft, dropout):
    peft = pytest.importorskip("peft")
    config = peft.VeraConfig(r=4, projection_prng_key=11, vera_dropout=dropout, target_modules=["fc"])
    adapter = layer.adapter("vera", r=4, projection_prng_key=11, dropout=dropout)
    agree_with_peft(adapter, config, {"lambda_b": "vera_lambda_b", "lambda_d": "vera_lambda_d"})


@pytest.mark.parametrize("key", [0, 7])
def test_projections_are_peft_bit_for_bit(key):
    peft = pytest.importorskip("peft")
    shapes = [(24, 16), (8, 40), (20, 24)]
    model = torch.nn.Sequential(*(torch.nn.Linear(k, n) for n, k in shapes))
    config = peft.VeraConfig(r=6, projection_prng_key=key, target_modules=["0", "1", "2"])
    theirs = peft.get_peft_model(model, config).base_model
    cls = load("methods", "vera")
    ours = cls.shared(shapes, cls.config(r=6, projection_prng_key=key))
    assert torch.equal(ours.A, theirs.vera_A["default"])
    assert torch.equal(ours.B, theirs.vera_B["default"])


def test_a_small_weight_takes_the_first_rows_and_columns():
    cls = load("methods", "vera")
    cfg = cls.config(r=4)
    shared = cls.shared([(24, 16), (8, 10)], cfg)
    adapter = cls(10, 8, cfg, shared)
    torch.nn.init.ones_(adapter.lambda_b)
    torch.nn.init.ones_(adapter.lambda_d)
    expected = shared.B[:8] @ shared.A[:, :10]
    # fp32 sums of 4 terms
    torch.testing.assert_close(adapter.effective_weight(torch.zeros(8, 10)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"r": 0}, "r"),
        ({"dropout": 1.5}, "dropout"),
        ({"d_initial": 0.0}, "d_initial"),
    ],
)
def test_bad_fields_are_named(refused, fields, named):
    refused("vera", fields, named)
