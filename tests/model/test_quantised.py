"""Quantised bases: the same numbers as their dequantised weights, and how often these are made."""

import importlib.util
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from moved import move
from torch import nn

import highrank
from highrank.base.errors import UserError
from highrank.base.registry import available, load
from highrank.config.words import compose_run
from highrank.model import quantised
from highrank.model.adapters import attach
from highrank.model.backbones import load_backbone
from highrank.model.placement import resolve, weight_of
from highrank.model.quantised import KINDS, QuantisedWeight, dequantise_model
from highrank.train.loss import language_model_loss
from highrank.train.plan import make_plan

INSTALLED = {kind: importlib.util.find_spec(library) is not None for kind, library in KINDS.items()}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the libraries say about kernels that they do not find
    for library in {KINDS[kind] for kind, found in INSTALLED.items() if found}:
        importlib.import_module(library)

kinds = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.skipif(not found, reason=f"{KINDS[kind]} is not installed (extra quant)"))
        for kind, found in INSTALLED.items()
    ],
)
METHODS = [name for name in sorted(available("methods")) if load("methods", name).family.keeps_base]
NEED_THE_MATRIX = {"boha", "dora", "hilora", "hira", "sum"}
pytestmark = [pytest.mark.usefixtures("wide"), pytest.mark.filterwarnings("ignore:.*Enum subclass.*")]


def plan_of(run):
    return make_plan(run, run.make_task())


def adapted(method, kind, dense=False, dtype="float32", model="tiny_qwen2", placement="all"):
    backbone = load_backbone({"name": model, "dtype": dtype, "quantize": kind}, None)
    if dense:
        dequantise_model(backbone.model)
    cls = load("methods", method)
    cfg = cls.config(**cls.examples[0])
    views = resolve(backbone.model, placement) if cls.family.changes_weights else []
    adapters = attach(backbone.model, views, cls, cfg, tokenizer=backbone.tokenizer)
    move(adapters, 0.05, seed=1)
    return adapters


def step(adapters):
    ids = torch.randint(4, 260, (2, 11), generator=torch.Generator().manual_seed(0))
    adapters.model.train()
    loss, _ = language_model_loss(adapters.model, ids, torch.ones_like(ids), ids)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in adapters.named_parameters()}


@pytest.fixture
def times_dequantised(monkeypatch):
    counted = []
    made = quantised.dequantise
    monkeypatch.setattr(quantised, "dequantise", lambda layer: counted.append(layer) or made(layer))
    return counted


@kinds
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_that_of_the_dequantised_weights(method, kind, times_dequantised):
    adapters = adapted(method, kind)
    times_dequantised.clear()
    loss, gradients = step(adapters)
    # Once per adapted layer and step, forward and backward together, and never for what acts on activations alone.
    assert len(times_dequantised) == (len(adapters.layers) if method in NEED_THE_MATRIX else 0)
    expected_loss, expected = step(adapted(method, kind, dense=True))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)  # fp32, the products in another order
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


@kinds
@pytest.mark.parametrize("method", sorted(set(METHODS) - NEED_THE_MATRIX))
def test_no_dense_matrix_waits_for_backward(method, kind):
    adapters = adapted(method, kind, placement="qv")
    layers = [
        module
        for module in adapters.model.modules()
        if isinstance(module, nn.Linear) and quantised.is_quantised(module)
    ]
    shapes = {torch.Size((layer.out_features, layer.in_features)) for layer in layers}
    shapes |= {shape[::-1] for shape in shapes}
    held = {parameter.data_ptr() for _, parameter in adapters.named_parameters()}
    held |= {buffer.data_ptr() for buffer in adapters.model.buffers()}  # frozen, and there between steps too
    kept = []

    def keep(tensor):
        if type(tensor) is torch.Tensor and tensor.shape in shapes and tensor.data_ptr() not in held:
            kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(adapters)
    assert len(layers) == 2 * 7
    assert not kept


@kinds
def test_decoding_with_hyperadapt_makes_no_matrix(kind, times_dequantised):
    adapters = adapted("hyperadapt", kind)
    times_dequantised.clear()
    with torch.inference_mode():
        adapters.model.eval().generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert not times_dequantised


@kinds
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weight_that_an_adapter_sees(kind, dtype):
    plain = load_backbone({"name": "tiny_llama", "dtype": dtype}, None).model
    model = load_backbone({"name": "tiny_llama", "dtype": dtype, "quantize": kind}, None).model
    path = "model.layers.0.mlp.down_proj"
    exact, layer = plain.get_submodule(path).weight, model.get_submodule(path)
    W = weight_of(layer)
    assert isinstance(W, QuantisedWeight)
    assert (W.shape, len(W), W.dtype, W.dim()) == (exact.shape, len(exact), exact.dtype, 2)
    error = (W.dense.float() - exact.float()).norm() / exact.float().norm()
    assert 0 < error < {"int8": 0.01, "int4": 0.15, "nf4": 0.12}[kind]
    x = torch.randn(3, exact.shape[1], dtype=exact.dtype)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    torch.testing.assert_close(F.linear(x, W), F.linear(x, W.dense), rtol=tolerance, atol=tolerance)
    assert torch.equal(W + 1, W.dense + 1)
    assert torch.equal(W[2:5].T, W.dense[2:5].T)
    assert W.to(W.dtype) is W
    head = [module for module in (model.lm_head, model.get_input_embeddings()) if not quantised.is_quantised(module)]
    assert len(head) == 2


@kinds
def test_a_part_of_a_fused_projection(kind):
    backbone = load_backbone({"name": "tiny_phi3", "dtype": "float32", "quantize": kind}, None)
    method = load("methods", "lora")
    adapters = attach(backbone.model, resolve(backbone.model, "qv", fused="split"), method, method.config(r=2))
    base = load_backbone({"name": "tiny_phi3", "dtype": "float32", "quantize": kind}, None).model
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(adapters.model(ids).logits, base(ids).logits, rtol=1e-5, atol=1e-6)


@kinds
def test_merging_says_into_which_base(run_cli, tmp_path, capsys, kind):
    from transformers import AutoModelForCausalLM

    from highrank.cli import main

    words = ["model=tiny_llama", f"model.quantize={kind}", "r=2", "max_steps=2", "batch_size=2"]
    status, out, err = run_cli(*words, "task.n_train=4", "task.n_test=2", "eval_before=false", "lr=1e-2")
    assert status == 0, err
    run = out.strip().splitlines()[-1]
    assert f"highrank merge {run} --out {run}/merged model.quantize=null\n" in out  # what to try next
    assert main(["merge", run, "--out", str(tmp_path / "any")]) == 2
    err = capsys.readouterr().err
    assert f"got model.quantize={kind}; add model.quantize=null" in err
    assert not (tmp_path / "any").exists()
    found = {}
    for base in ("null", kind):
        folder = tmp_path / base
        assert main(["merge", run, "--out", str(folder), "--force", f"model.quantize={base}"]) == 0
        found[base] = AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp.down_proj.weight
        assert json.loads((folder / "fidelity.json").read_text())["max_logit_difference"] < 1e-5
    assert (found["null"] - found[kind]).abs().max() > 1e-5  # the quantisation error


@kinds
def test_trained_numbers_that_mean_something_beside_one_base_are_not_sent_to_another(run_cli, tmp_path, kind):
    from highrank.interop.combine import check_combine
    from highrank.interop.hub_model import merge_run
    from highrank.train.saved import read_run

    words = ["model=tiny_llama", "method=lora_xs", f"model.quantize={kind}", "r=2", "max_steps=2", "batch_size=2"]
    status, out, err = run_cli(*words, "task.n_train=4", "task.n_test=2", "eval_before=false")
    assert status == 0, err
    run = out.strip().splitlines()[-1]
    assert f"highrank merge {run} --out {run}/merged model.quantize={kind}\n" in out  # what to try next
    with pytest.raises(
        UserError, match=rf"lora_xs with .* alone: highrank merge {run} --out DIR model.quantize={kind}$"
    ):
        check_combine({run: read_run(run)})
    match = rf"got model.quantize={kind}; add model.quantize={kind} for the dequantised ones$"
    with pytest.raises(UserError, match=match):
        merge_run(run, tmp_path / "out")
    with pytest.raises(UserError, match=r"needs the exact base .*; load the base as it was in training$"):
        merge_run(run, tmp_path / "out", words=["model.quantize=null"])


@kinds
def test_an_exported_adapter_says_on_which_base_it_was_trained(run_cli, tmp_path, kind):
    from highrank.cli import main

    words = ["model=tiny_llama", "method=lora", f"model.quantize={kind}", "r=2", "max_steps=2", "batch_size=2"]
    status, out, err = run_cli(*words, "task.n_train=4", "task.n_test=2", "eval_before=false")
    assert status == 0, err
    assert main(["export", out.strip().splitlines()[-1], "--format", "peft", "--out", str(tmp_path / "peft")]) == 0
    assert f"the base quantised to {kind}, not its own weights" in (tmp_path / "peft/README.md").read_text()


@kinds
def test_a_quantised_weight_cannot_hold_the_merged_one(kind):
    adapters = adapted("lora", kind)
    with pytest.raises(UserError, match="a quantised weight cannot hold W'"):
        adapters.merge()
    assert not adapters.merged


@pytest.mark.skipif(not INSTALLED["nf4"], reason="bitsandbytes is not installed (extra quant)")
def test_rows_that_nf4_gets_wrong_are_refused(monkeypatch):
    monkeypatch.undo()  # narrow again
    with pytest.raises(UserError, match=r"multiples of 64, got layers\.0\.self_attn\.q_proj\.in_features=16"):
        load_backbone({"name": "tiny_llama", "dtype": "float32", "quantize": "nf4"}, None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_library_is_named_with_its_extra(monkeypatch, kind):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"quantize={kind} needs {KINDS[kind]}.*highrank\[quant\]"):
        load_backbone({"name": "tiny_llama", "dtype": "float32", "quantize": kind}, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.quantize=int3"], "quantize is one of int8, int4, nf4, or null, got model.quantize=int3"),
        (["model.quantize=int8", "method=full"], "got model.quantize=int8 with method=full"),
        (["model.quantize=int8", "trainer=fsdp"], "trainer.strategy=fsdp"),
    ],
)
def test_bad_input(words, message):
    with pytest.raises(UserError) as error:
        compose_run(["model=tiny_llama", *words])
    assert message in str(error.value)


def test_null_is_the_run_without_the_key():
    assert compose_run(["model=tiny_llama", "model.quantize=null"]).hash == compose_run(["model=tiny_llama"]).hash


@kinds
def test_full_fine_tuning_of_a_model_in_hand_is_refused(kind):
    model = load_backbone({"name": "tiny_qwen2", "dtype": "float32", "quantize": kind}, None).model
    trains = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(UserError, match="full: a quantised base stays as it is"):
        highrank.attach(model, "full")
    assert [parameter.requires_grad for parameter in model.parameters()] == trains


def test_the_plan_counts_quantised_bytes():
    plans = {
        kind: plan_of(compose_run(["model=llama3_8b", "dry_run=true", f"model.quantize={kind}"]))
        for kind in ("null", "int8", "nf4")
    }
    assert len({plan.params for plan in plans.values()}) == 1
    linear = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    saved = {kind: plans["null"].memory_bytes["weights"] - plans[kind].memory_bytes["weights"] for kind in plans}
    assert saved["int8"] == pytest.approx(linear, rel=0.01)
    assert saved["nf4"] == pytest.approx(1.5 * linear, rel=0.02)


def test_only_linear_layers_below_the_head_are_quantised():
    model = load_backbone({"name": "tiny_llama", "dtype": "float32"}, None).model
    names = [name for name, _ in quantised.linears(model)]
    assert len(names) == 2 * 7
    assert not any("head" in name or "embed" in name for name in names)
    assert isinstance(model.lm_head, nn.Linear)
