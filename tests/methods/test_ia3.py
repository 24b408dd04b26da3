"""(IA)³ against its formula and PEFT's, and as a HyperAdapt of one side."""

import pytest
import torch

from highrank.base.registry import load
from highrank.model.adapters import attach
from highrank.model.backbones import load_backbone
from highrank.model.placement import resolve

pytestmark = pytest.mark.parity

FORMULAS = {"out": lambda W, **p: torch.diag(p["l"][:, 0]) @ W, "in": lambda W, **p: W @ torch.diag(p["l"][0])}


@pytest.mark.parametrize("side", FORMULAS)
def test_formula(layer, agree_with_formula, side):
    agree_with_formula(layer.adapter("ia3", side=side), FORMULAS[side])


@pytest.mark.parametrize(("side", "feedforward"), [("out", []), ("in", ["fc"])])
def test_peft(layer, agree_with_peft, side, feedforward):
    """PEFT's out side scales the bias too, so it has none here."""
    peft = pytest.importorskip("peft")
    if side == "out":
        layer.bias.zero_()
    config = peft.IA3Config(target_modules=["fc"], feedforward_modules=feedforward)
    agree_with_peft(layer.adapter("ia3", side=side), config, {"l": "ia3_l"})


@pytest.mark.parametrize(("side", "ours", "neutral"), [("out", "a", "b"), ("in", "b", "a")])
def test_it_is_hyperadapt_with_the_other_side_1(layer, side, ours, neutral):
    ia3, hyperadapt = layer.adapter("ia3", side=side), layer.adapter("hyperadapt")
    with torch.no_grad():
        hyperadapt.get_parameter(ours).copy_(ia3.l.flatten())
        hyperadapt.get_parameter(neutral).fill_(1)
    assert torch.equal(ia3.effective_weight(layer.W), hyperadapt.effective_weight(layer.W))
    y, expected = (adapter(layer.x, layer.W, layer.bias) for adapter in (ia3, hyperadapt))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)  # fp64, another order of products
    for output in (y, expected):
        (output * layer.dy).sum().backward()
    torch.testing.assert_close(ia3.l.grad.flatten(), hyperadapt.get_parameter(ours).grad, rtol=1e-12, atol=1e-12)


def test_outputs_of_up_are_inputs_of_down_where_a_gate_multiplies_them():
    """The paper's l_ff, on Llama."""
    found = []
    for part, side in (("up", "out"), ("down", "in")):
        model = load_backbone({"name": "tiny_llama", "dtype": "float32"}, None, "generate").model
        cls = load("methods", "ia3")
        adapters = attach(model, resolve(model, [part]), cls, cls.config(side=side))
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _, scale in adapters.named_parameters():
                scale.copy_(1 + 0.3 * torch.randn(scale.shape, generator=rng))
            found.append(model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits)
            with adapters.disabled():
                base = model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)  # fp32 products in another order
    assert (found[0] - base).abs().max() > 1e-3


def test_counts(params):
    assert params("model=llama3.2_3b placement=[k,v,up] method=ia3").trainable == 286_720  # as PEFT's comparison has it
    assert params("model=llama3_8b placement=[k,v,up] method=ia3").trainable == 32 * (1024 + 1024 + 14336)
    assert params("model=llama3_8b placement=[k,v,down] method=ia3 side=in").trainable == 32 * (4096 + 4096 + 14336)


def test_bad_fields_are_named(refused):
    refused("ia3", {"side": "both"}, "side")
