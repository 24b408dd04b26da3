"""FourierFT against its sum of cosines and PEFT's; its rank, and what a step keeps."""

import math

import pytest
import torch

from highrank.base.registry import load

pytestmark = pytest.mark.parity


def waves(adapter, W, c):
    """The sum of cosines."""
    n, k = W.shape
    o, i = torch.arange(n, dtype=W.dtype)[:, None], torch.arange(k, dtype=W.dtype)
    total = torch.zeros_like(W)
    for t, place in enumerate(adapter.places.tolist()):
        total = total + c[t] * torch.cos(2 * math.pi * (place // k * o / n + place % k * i / k))
    return W + adapter.cfg.scaling / (n * k) * total


@pytest.mark.parametrize("tokens", [1, 7])  # of 7 tokens and 384 frequencies the update is built
@pytest.mark.parametrize(
    "fields", [{"n_frequency": 1}, {"n_frequency": 30, "scaling": 20.0}, {"n_frequency": 384}], ids=str
)
def test_formula(layer, agree_with_formula, fields, tokens):
    layer.x, layer.dy = layer.x[:tokens], layer.dy[:tokens]
    adapter = layer.adapter("fourierft", **fields)
    agree_with_formula(adapter, lambda W, c: waves(adapter, W, c))


@pytest.mark.parametrize("seed", [777, 5])
def test_peft(layer, agree_with_peft, monkeypatch, seed):
    """PEFT builds its update in fp32 whatever it is given: here fp32 means fp64."""
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    config = peft.FourierFTConfig(n_frequency=30, scaling=20.0, random_loc_seed=seed, target_modules=["fc"])
    adapter = layer.adapter("fourierft", n_frequency=30, scaling=20.0, random_loc_seed=seed)
    indices = layer.peft(config).base_model.model.fc.indices["default"]
    assert indices.tolist() == [(adapter.places // 16).tolist(), (adapter.places % 16).tolist()]
    torch.set_default_dtype(torch.float64)
    try:
        agree_with_peft(adapter, config, {"c": "fourierft_spectrum"})
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_rank_is_up_to_twice_the_number_of_frequencies(layer):
    adapter = layer.adapter("fourierft", n_frequency=3)
    adapter.places.copy_(torch.tensor([1 * 16 + 1, 2 * 16 + 2, 3 * 16 + 3]))
    assert torch.linalg.matrix_rank(adapter.effective_weight(layer.W) - layer.W) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "places"), [(5, [(10,), (10,)]), (50, [])], ids=["transformed", "built"])
def test_a_step_keeps_x_c_and_places(dtype, tokens, places):
    cls = load("methods", "fourierft")
    adapter = cls(16, 24, cls.config(n_frequency=10))
    torch.nn.init.normal_(adapter.c)
    adapter.places.copy_(torch.arange(10) * 7)
    W, x, kept = torch.randn(24, 16, dtype=dtype), torch.randn(tokens, 16, dtype=dtype, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapter(x, W)
    known = {t.data_ptr() for t in (x, W, adapter.c)}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in known] == places  # u and v


# PEFT's comparison
@pytest.mark.parametrize(("words", "trainable"), [("", 56_000), ("n_frequency=5000", 280_000)])
def test_counts(params, words, trainable):
    found = params(f"model=llama3.2_3b placement=qv method=fourierft {words}")
    assert (found.trainable, found.frozen_extra) == (trainable, trainable)


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"n_frequency": 0}, "n_frequency"), ({"n_frequency": 385}, "n_frequency"), ({"scaling": 0.0}, "scaling")],
)
def test_bad_fields_are_named(refused, fields, named):
    refused("fourierft", {"n_frequency": 20, **fields}, named)
