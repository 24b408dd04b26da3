"""Placement parts resolve to the right weights on every architecture, and to nothing else."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from highrank.base.errors import UserError
from highrank.model.backbones import empty_model
from highrank.model.placement import PARTS, parse_layers, parse_placement, resolve, weight_of
from highrank.model.tiny import DECODERS, ENCODERS, tiny_config


def tiny(name):
    return empty_model(AutoConfig.for_model(**tiny_config(name)), "classify" if name in ENCODERS else "generate")


EXPECTED_Q = {
    "llama": "model.layers.1.self_attn.q_proj",
    "mistral": "model.layers.1.self_attn.q_proj",
    "qwen2": "model.layers.1.self_attn.q_proj",
    "qwen3": "model.layers.1.self_attn.q_proj",
    "gemma": "model.layers.1.self_attn.q_proj",
    "phi3": "model.layers.1.self_attn.qkv_proj[q]",
    "gpt2": "transformer.h.1.attn.c_attn[q]",
    "bert": "bert.encoder.layer.1.attention.self.query",
    "roberta": "roberta.encoder.layer.1.attention.self.query",
    "distilbert": "distilbert.transformer.layer.1.attention.q_lin",
}
WITHOUT_GATE = ("gpt2", *ENCODERS)


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_every_part_of_every_architecture(name):
    model = tiny(name)
    parts = [p for p in PARTS if p != "gate" or name not in WITHOUT_GATE]
    views = resolve(model, parts, fused="split")
    assert [v.part for v in views] == parts * 2
    assert {v.layer for v in views} == {0, 1}
    assert next(v for v in views if v.part == "q" and v.layer == 1).name == EXPECTED_Q[name]
    for view in views:
        assert weight_of(model.get_submodule(view.path), view.rows).shape == view.shape
        assert not any(word in view.path for word in ("head", "embed", "pooler", "classifier", "score"))
    assert len({v.name for v in views}) == len(views)


@pytest.mark.parametrize("name", WITHOUT_GATE)
def test_all_means_the_parts_there_are_but_a_named_part_must_exist(name):
    assert {v.part for v in resolve(tiny(name), "all", fused="split")} == set(PARTS) - {"gate"}
    with pytest.raises(UserError, match="has no part gate, got placement=gate; it has: q, k, v, o, up, down"):
        resolve(tiny(name), "gate")


def test_similar_suffixes_are_told_apart():
    """`output.dense` also ends `attention.output.dense`, and `c_proj` is in attention and MLP of GPT-2."""
    assert [v.path for v in resolve(tiny("bert"), "down", layers=0)] == ["bert.encoder.layer.0.output.dense"]
    assert [v.path for v in resolve(tiny("gpt2"), "o", layers=0)] == ["transformer.h.0.attn.c_proj"]


def test_fused_policies():
    model = tiny("phi3")
    fused = resolve(model, "all", layers=0)
    assert [(v.part, v.rows) for v in fused] == [("q+k+v", None), ("o", None), ("gate+up", None), ("down", None)]
    split = resolve(model, "all", layers=0, fused="split")
    assert [(v.part, v.rows) for v in split] == [
        ("q", (0, 16)),
        ("k", (16, 24)),
        ("v", (24, 32)),
        ("o", None),
        ("gate", (0, 32)),
        ("up", (32, 64)),
        ("down", None),
    ]
    # fc_qkv wants up without gate, so auto splits everywhere rather than fuse q, k, v and split up.
    assert [v.part for v in resolve(model, "fc_qkv", layers=0)] == ["q", "k", "v", "up", "down"]
    with pytest.raises(UserError, match=r"fused=fused adapts a fused matrix whole, got a placement without gate"):
        resolve(model, "fc_qkv", fused="fused")


def test_conv1d_is_seen_as_out_by_in():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_config("gpt2")))
    module = model.transformer.h[0].attn.c_attn
    view = resolve(model, "v", layers=0)[0]
    W = weight_of(module, view.rows)
    assert view.shape == (16, 16)
    assert torch.equal(W, module.weight[:, 32:48].T)
    assert W.data_ptr() == module.weight[:, 32:].data_ptr()  # a view, not a copy


def test_any_model_through_an_explicit_map():
    model = tiny("llama")
    assert resolve(model, "q", architecture={"blocks": "layers", "q": "self_attn.q_proj"}) == resolve(model, "q")
    custom = {"blocks": "model.layers", "q": "self_attn.q_proj", "up": "mlp.up_proj[4:20]"}
    views = resolve(model, ["q", "up"], architecture=custom)
    assert [(v.part, v.rows, v.shape) for v in views[:2]] == [("q", None, (16, 16)), ("up", (4, 20), (16, 16))]
    with pytest.raises(UserError, match="has no part k"):
        resolve(model, "qk", architecture=custom)
    with pytest.raises(UserError, match=r"no module model.layers.0.self_attn.q_prj .*did you mean .*self_attn.q_proj"):
        resolve(model, "q", architecture={"blocks": "model.layers", "q": "self_attn.q_prj"})
    with pytest.raises(UserError, match=r"rows of .* lie in \[0, 32\)"):
        resolve(model, "up", architecture={"blocks": "model.layers", "up": "mlp.up_proj[4:200]"})
    with pytest.raises(UserError, match=r"rows of .* are matched once"):
        resolve(
            model, ["q", "k"], architecture={"blocks": "layers", "q": "mlp.up_proj[0:16]", "k": "mlp.up_proj[8:24]"}
        )
    with pytest.raises(UserError, match="needs 'blocks'"):
        resolve(model, "q", architecture={"q": "self_attn.q_proj"})


def test_a_block_matched_twice_is_an_error():
    model = torch.nn.Module()
    model.a, model.b, model.config = tiny("llama"), tiny("llama"), tiny("llama").config
    with pytest.raises(UserError, match=r"matched once, got layer 0 at both a.model.layers.0 and b.model.layers.0"):
        resolve(model, "q")


def test_nothing_matched_is_an_error():
    with pytest.raises(UserError, match="must match at least one weight"):
        resolve(tiny("llama"), "q", architecture={"blocks": "decoder", "q": "self_attn.q_proj"})


@pytest.mark.parametrize(
    ("placement", "parts"),
    [
        ("fc", ("up", "down")),
        ("qkvo", ("q", "k", "v", "o")),
        (["down", "q"], ("q", "down")),
        (["qk", "fc"], ("q", "k", "up", "down")),
        ("all", PARTS),
    ],
)
def test_sets_and_lists(placement, parts):
    assert parse_placement(placement) == parts


@pytest.mark.parametrize("placement", ["qvk", ["q", "gates"], ["q", 5], [["q"]], []])
def test_unknown_placements_name_near_ones(placement):
    with pytest.raises(UserError, match=r"placement: .*got placement=.*(did you mean|it is one of|use a set)"):
        parse_placement(placement)


@pytest.mark.parametrize(
    ("layers", "chosen"), [("all", [0, 1, 2, 3]), ("1-2", [1, 2]), (3, [3]), ("0", [0]), ([2, 0], [0, 2])]
)
def test_layers(layers, chosen):
    assert list(parse_layers(layers, 4)) == chosen


@pytest.mark.parametrize(
    "layers",
    ["2-9", "3-1", "0-999999999", "0-9999999999", "x", -1, [], [1, 1], 4, ["a"], [0.5], 1.5, None, True, {"a": 1}],
)
def test_bad_layers(layers):
    with pytest.raises(UserError, match=r"layers: .*got layers="):
        parse_layers(layers, 4)


@pytest.mark.parametrize("placement", [5, None, 1.5, {"q": 1}])
def test_a_placement_is_a_text_or_a_list(placement):
    with pytest.raises(UserError, match=r"placement: give a set such as fc_qkv, or a list .*got placement="):
        parse_placement(placement)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("foo", "a map of parts to paths is needed, got architecture=foo"),
        (["q"], "a map of parts to paths is needed"),
        ({"blocks": "layers", "q": 5}, "a path is a text, got q=5"),
        ({"blocks": None, "q": "x"}, "a path is a text, got blocks=None"),
        ({}, "needs 'blocks'"),
        ({"blocks": "layers", "q": "input_layernorm"}, "linear layer .*got .*input_layernorm=LlamaRMSNorm"),
        ({"blocks": "layers", "q": "mlp"}, "linear layer .*got .*mlp=LlamaMLP"),
        ({"blocks": "layers", "q": "mlp.act_fn"}, "linear layer .*got .*act_fn=SiLU"),
    ],
)
def test_bad_maps(architecture, message):
    with pytest.raises(UserError, match=message):
        resolve(tiny("llama"), "q", architecture=architecture)


def test_an_embedding_is_no_linear_layer():
    model = tiny("llama")
    model.model.layers[0].table = torch.nn.Embedding(4, 4)
    with pytest.raises(UserError, match=r"linear layer .*got model.layers.0.table=Embedding"):
        resolve(model, "q", layers=0, architecture={"blocks": "layers", "q": "table"})
