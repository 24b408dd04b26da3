"""Bottleneck adapters against the same model with its layers wrapped by hand, in fp64: logits and every gradient."""

import copy

import pytest
import torch
from moved import move
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from highrank.base.errors import UserError
from highrank.base.registry import load
from highrank.model.adapters import attach
from highrank.model.backbones import empty_model, load_backbone
from highrank.train.plan import count

pytestmark = pytest.mark.parity

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [50, 60, 70, 80, 90, 100]])
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}  # fp64 sums of a few dozen terms in another order
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 260,
}
F = {
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "relu": lambda x: x * (x > 0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: (torch.exp(x) - torch.exp(-x)) / (torch.exp(x) + torch.exp(-x)),
}
ATTENTION = {"llama": "self_attn.o_proj", "gpt2": "attn.c_proj", "phi3": "self_attn.o_proj"}
BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "phi3": "model.layers"}
DOWN = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj", "phi3": "mlp.down_proj"}


class By(nn.Module):
    """A layer, and what an adapter makes of its output, or of its input."""

    def __init__(self, layer, adapter, of_input):
        super().__init__()
        self.layer, self.adapter, self.of_input = layer, adapter, of_input

    def forward(self, x):
        y = self.layer(x)
        return y + self.adapter(x if self.of_input else y)


def by_hand(parameters, s, f):
    D, c, U, e = (parameters[key] for key in ("D", "c", "U", "e"))
    return lambda h: s * (f(h @ D.T + c) @ U.T + e)


def put(block, path, make):
    parent, _, leaf = path.rpartition(".")
    owner = block.get_submodule(parent)
    setattr(owner, leaf, make(getattr(owner, leaf)))


def adapted(model, dtype="float32", **fields):
    base = load_backbone({"name": f"tiny_{model}", "dtype": dtype}, None).model
    cls = load("methods", "bottleneck")
    return attach(base, [], cls, cls.config(**fields))


@pytest.mark.parametrize("activation", F)
@pytest.mark.parametrize("form", ["houlsby", "parallel"])
@pytest.mark.parametrize("model", BLOCKS)
def test_formula(model, form, activation):
    plain = load_backbone({"name": f"tiny_{model}", "dtype": "float32"}, None).model.double()
    adapters = adapted(model, form=form, reduction=4, activation=activation, s=1.5)
    adapters.model.double()
    move(adapters, 0.5, seed=0)
    copies = {name: p.detach().clone().requires_grad_() for name, p in adapters.module.named_parameters()}
    for i, block in enumerate(plain.get_submodule(BLOCKS[model])):
        for path in (ATTENTION[model], DOWN[model]) if form == "houlsby" else (DOWN[model],):
            start = f"networks.{BLOCKS[model]}.{i}.{path}".replace(".", "/").replace("networks/", "networks.")
            own = {key: copies[f"{start}.{key}"] for key in ("D", "c", "U", "e")}
            adapter = by_hand(own, 1.5, F[activation])
            where = path if form == "houlsby" else "mlp"
            put(block, where, lambda layer, adapter=adapter: By(layer, adapter, form == "parallel"))
    found, expected = (each(input_ids=IDS).logits for each in (adapters.model, plain))
    torch.testing.assert_close(found, expected, **TOLERANCE)
    for logits in (found, expected):
        logits.square().mean().backward()
    for name, parameter in adapters.module.named_parameters():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, copies[name].grad, **TOLERANCE)


@pytest.mark.parametrize("form", ["houlsby", "parallel"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_starts_as_the_base_to_the_last_bit(form, dtype):
    adapters = adapted("llama", dtype, form=form)
    with torch.no_grad():
        found = adapters.model(input_ids=IDS).logits
        with adapters.disabled():
            assert torch.equal(adapters.model(input_ids=IDS).logits, found)


@pytest.mark.parametrize("form", ["houlsby", "parallel"])
@pytest.mark.parametrize("kind", ["gpt_neox", "falcon", "opt", "bloom"])
def test_other_models_learn_in_every_adapter(kind, form):
    """Blocks of other names and orders: side by side, with their norms behind."""
    config = AutoConfig.for_model(kind, **SIZES, ffn_dim=24, word_embed_proj_dim=16, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    plain = copy.deepcopy(model)
    cls = load("methods", "bottleneck")
    adapters = attach(model, [], cls, cls.config(form=form, reduction=2))
    torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-5, atol=1e-6)
    move(adapters, 0.1)
    model(input_ids=IDS).logits.square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for _, parameter in adapters.named_parameters())
    assert len(adapters.module.networks) == (4 if form == "houlsby" else 2)


def test_an_encoder_has_them_too():
    base = load_backbone({"name": "tiny_bert", "dtype": "float32"}, None, "classify").model
    cls = load("methods", "bottleneck")
    adapters = attach(base, [], cls, cls.config(reduction=4), heads=["classifier"])
    assert [name.replace("/", ".") for name in adapters.module.networks] == [
        f"bert.encoder.layer.{i}.{where}.dense" for i in (0, 1) for where in ("attention.output", "output")
    ]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("mixtral", r"^bottleneck: a feed-forward must be one of its own, got the experts of model_type=mixtral"),
        ("mamba", r"^bottleneck: blocks need known layers o and down, got none in model_type=mamba"),
    ],
)
def test_models_that_do_not_fit_are_refused_before_weights_load(kind, message):
    cls = load("methods", "bottleneck")
    with pytest.raises(UserError, match=message):
        count(empty_model(AutoConfig.for_model(kind, **SIZES)), [], cls, cls.config())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"form": "serial"}, "form"),
        ({"reduction": 0}, "reduction"),
        ({"activation": "swish"}, "activation"),
        ({"s": 0.0}, "s"),
    ],
)
def test_bad_fields_are_named(fields, named):
    with pytest.raises(UserError, match=rf"^bottleneck: .*\b{named}="):
        load("methods", "bottleneck").config(**fields)


@pytest.mark.parametrize(("reduction", "near"), [(3, "2 or 4"), (5, "4 or 8"), (64, "16")])
def test_a_reduction_that_does_not_divide_the_width_names_those_that_do(reduction, near):
    with pytest.raises(UserError, match=rf"^bottleneck: .*width 16, got reduction={reduction}; .*: {near}$"):
        adapted("llama", reduction=reduction)


def test_counts(params):
    d, m = 4096, 256
    assert params("model=llama3_8b method=bottleneck").trainable == 32 * 2 * (2 * d * m + m + d)
    assert params("model=llama3_8b method=bottleneck form=parallel reduction=2").trainable == 32 * (
        2 * d * 2048 + 2048 + d
    )
    # GLUE with adapters of size 64: Houlsby's count, two per block
    assert params("model=roberta_large method=bottleneck").trainable == 24 * 2 * (2 * 1024 * 64 + 64 + 1024)
