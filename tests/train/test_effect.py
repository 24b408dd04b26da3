"""A method that a library leaves out, or applies where it should not, is an error and no number."""

import pytest
import torch

from highrank.base.errors import UserError
from highrank.model import whole_model
from highrank.model.adapters import attach
from highrank.model.backbones import load_backbone
from highrank.model.weight_adapters import AdaptedLinear
from highrank.plugin import load
from highrank.train.effect import check_decoding

WORDS = ["model=tiny_llama", "task.n_train=16", "task.n_test=2", "batch_size=4", "max_steps=2"]
PROMPT = [1, 50, 60, 70, 80]
CASES = [("prompt_tuning", {}), ("prompt_tuning", {"start": "sample_vocab"}), ("p_tuning", {}), ("prefix", {})]


def adapted(method, fields, dtype="float32", model="tiny_llama"):
    backbone = load_backbone({"name": model, "dtype": dtype}, None)
    cls = load("methods", method)
    for name, parameter in backbone.model.named_parameters():
        if "self_attn" in name:  # random weights attend to everything alike; these tell positions apart
            parameter.data *= 8
    return attach(backbone.model, [], cls, cls.config(**fields), tokenizer=backbone.tokenizer)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2", "tiny_qwen3"])
@pytest.mark.parametrize(("method", "fields"), CASES)
def test_decoding_with_the_cache_agrees(method, fields, dtype, model):
    check_decoding(adapted(method, fields, dtype, model), PROMPT)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("method", "fields"), [case for case in CASES if case[0] != "prefix"])
def test_virtual_tokens_in_front_of_every_step_are_an_error(method, fields, dtype, monkeypatch):
    """What transformers 5.24 did by renaming the cache's argument: no call looked as if it had a cache."""
    monkeypatch.setattr(whole_model, "is_start", lambda arguments: True)
    adapters = adapted(method, fields, dtype)
    with pytest.raises(UserError, match=f"^{method}: decoding with the cache must agree .* LlamaForCausalLM with tra"):
        check_decoding(adapters, PROMPT)


def test_a_prefix_that_no_call_sees_is_an_error(monkeypatch, run_cli):
    monkeypatch.setattr(load("methods", "prefix"), "hooks", lambda method, model: [])
    status, _, err = run_cli("method=prefix", *WORDS, "eval_before=false")
    assert status == 2
    assert "prefix: every adapter must move the loss, got no gradient at 1 of 1 (first: prefix)" in err


def test_a_run_reports_no_score_of_virtual_tokens_at_every_step(monkeypatch, run_cli, tmp_path):
    monkeypatch.setattr(whole_model, "is_start", lambda arguments: True)
    status, _, err = run_cli("method=prompt_tuning", *WORDS, f"run_dir={tmp_path / 'run'}")
    assert status == 2
    assert "prompt_tuning: decoding with the cache must agree" in err
    assert not (tmp_path / "run" / "predictions").exists()


def test_an_adapter_that_is_not_computed_with_is_an_error(monkeypatch, run_cli):
    original = AdaptedLinear.forward

    def forward(layer, x):
        return layer.base(x) if layer.base.in_features == 32 else original(layer, x)  # the down projections

    monkeypatch.setattr(AdaptedLinear, "forward", forward)
    status, _, err = run_cli("method=hira", "r=2", *WORDS)
    assert status == 2
    assert "hira: every adapter must move the loss, got no gradient at 2 of 10 (first: model.layers.0.mlp.down_p" in err
    assert "in LlamaForCausalLM with transformers 5." in err


def test_a_model_without_any_adapter_in_its_computation_is_an_error(monkeypatch, run_cli):
    monkeypatch.setattr(AdaptedLinear, "forward", lambda layer, x: layer.base(x))
    status, _, err = run_cli("method=lora", "r=2", *WORDS)
    assert status == 2
    assert "lora: every adapter must move the loss, got no gradient at 10 of 10" in err


def test_the_check_of_decoding_draws_no_random_number():
    adapters = adapted("prompt_tuning", {})
    before = torch.get_rng_state()
    check_decoding(adapters, PROMPT)
    assert torch.equal(torch.get_rng_state(), before)
