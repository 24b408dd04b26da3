"""Norm tuning against PEFT's on tiny models, in fp64: logits, every gradient, one AdamW step, the merged model."""

import copy

import pytest
import torch

from highrank.base.errors import UserError
from highrank.base.registry import load
from highrank.model.adapters import attach
from highrank.model.backbones import head_modules, load_backbone

pytestmark = pytest.mark.parity

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [50, 60, 70, 80, 90, 100]])
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}  # fp64 sums of a few dozen terms in another order
NORMS = {
    "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
    "qwen3": ["input_layernorm", "post_attention_layernorm", "norm", "q_norm", "k_norm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "bert": ["LayerNorm"],
}


def adapted(model, dtype="float32"):
    kind = "classify" if model == "bert" else "generate"
    base = load_backbone({"name": f"tiny_{model}", "dtype": dtype}, None, kind).model
    plain = copy.deepcopy(base)
    cls = load("methods", "layernorm")
    return plain, attach(base, [], cls, cls.config(), heads=head_modules(base) if model == "bert" else [])


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT, of any norm
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised inside PEFT
@pytest.mark.parametrize("model", NORMS)
def test_peft(model):
    peft = pytest.importorskip("peft")
    plain, adapters = adapted(model)
    adapters.model.double().eval()
    theirs = peft.get_peft_model(plain.double(), peft.LNTuningConfig(target_modules=NORMS[model])).eval()
    named = {
        name.removeprefix("base_model.model.").replace(".ln_tuning_layers.default", ""): parameter
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    ours = {
        f"{name.split('.')[1].replace('/', '.')}.{name.rpartition('.')[2]}": parameter
        for name, parameter in adapters.module.named_parameters()
    }
    assert ours.keys() == named.keys()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in ours.items():
            assert torch.equal(parameter, named[name])
            parameter.add_(0.3 * torch.randn_like(parameter))
            named[name].copy_(parameter)
    models = {"ours": (adapters.model, ours), "theirs": (theirs, named)}
    logits = {}
    for key, (each, parameters) in models.items():
        optimizer = torch.optim.AdamW(parameters.values(), lr=0.01)
        first = each(input_ids=IDS).logits
        first.square().mean().backward()
        optimizer.step()
        logits[key] = first, each(input_ids=IDS).logits
    torch.testing.assert_close(logits["ours"], logits["theirs"], **TOLERANCE)
    for name, parameter in ours.items():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, named[name].grad, **TOLERANCE)
    adapters.merge()
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(adapters.model(input_ids=IDS).logits, merged(input_ids=IDS).logits, **TOLERANCE)


@pytest.mark.parametrize("model", NORMS)
def test_starts_as_the_base(model):
    plain, adapters = adapted(model)
    with torch.no_grad():
        assert torch.equal(adapters.model.eval()(input_ids=IDS).logits, plain.eval()(input_ids=IDS).logits)
    plain, adapters = adapted(model, "bfloat16")
    with torch.no_grad():
        found, expected = (m.eval().base_model(input_ids=IDS).last_hidden_state for m in (adapters.model, plain))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6)  # a few roundings of 2^-9


def test_a_small_step_is_not_rounded_away_on_a_16_bit_base():
    """1e-3 beside a weight of 1 is less than bf16 can say, and less than it can change in a rounded x̂."""
    plain, adapters = adapted("llama", "bfloat16")
    with torch.no_grad():
        base = plain(input_ids=IDS).logits
        for _, parameter in adapters.named_parameters():
            parameter.mul_(1 + 2**-10)
        moved = adapters.model(input_ids=IDS).logits
    assert (moved != base).any()


def test_the_norms_keep_their_own_weights_between_calls():
    plain, adapters = adapted("gpt2")
    before = dict(plain.named_parameters())
    adapters.model(input_ids=IDS)
    with pytest.raises(TypeError):
        adapters.model.transformer.ln_f(IDS.float(), IDS)  # one argument too many
    named = dict(adapters.model.named_parameters())
    assert all(torch.equal(named[name], parameter) for name, parameter in before.items())
    assert not any(named[name].requires_grad for name in before)


def test_nothing_that_trains_decays():
    _, adapters = adapted("gpt2")
    assert set(adapters.module.no_decay) == {name for name, _ in adapters.module.named_parameters()}


def test_counts(params):
    assert params("model=llama3.2_3b method=layernorm").trainable == 175_104  # as in PEFT's method comparison
    assert params("model=llama3_8b method=layernorm").trainable == (2 * 32 + 1) * 4096
    assert params("model=roberta_large method=layernorm").trainable == 2 * 1024 * (2 * 24 + 1)


def test_a_model_without_norm_weights_is_refused():
    from transformers import AutoModelForCausalLM, OlmoConfig

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(OlmoConfig(vocab_size=20, **sizes))
    cls = load("methods", "layernorm")
    with pytest.raises(UserError, match=r"^layernorm: the model has no norms with weights to train, got .*=olmo"):
        attach(model, [], cls, cls.config())
