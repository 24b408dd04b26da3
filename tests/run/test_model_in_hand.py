"""Adapters on a model as its caller has it, which no run has prepared: modes, number types, caches, masks, generation settings."""

import copy
import pickle

import pytest
import torch
from moved import move
from torch.nn.utils.parametrizations import weight_norm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

import highrank
from highrank.base.errors import UserError
from highrank.base.registry import load
from highrank.model.tiny import tiny_config

pytestmark = pytest.mark.integration

VIRTUAL = ("prefix", "prompt_tuning", "p_tuning")
P = {"num_virtual_tokens": 3}
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def tiny(kind="llama", cls=AutoModelForCausalLM, **fields):
    torch.manual_seed(0)
    return cls.from_config(AutoConfig.for_model(**{**tiny_config(kind), **fields})).eval()


def moved(adapters):
    """Takes the adapters off their start."""
    move(adapters, 0.3, seed=1)
    return adapters


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", VIRTUAL)
def test_a_model_that_names_no_token_to_pad_with(method, kind):
    model = tiny(kind, pad_token_id=None)
    highrank.attach(model, method, **P)
    out = model(input_ids=IDS, use_cache=False).logits
    assert out.shape == (1, 5, model.config.vocab_size)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("method", VIRTUAL)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_generation_without_a_cache_is_that_with_one(method, kind):
    model = tiny(kind)
    moved(highrank.attach(model, method, **P))
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = [model.generate(IDS, use_cache=use_cache, **settings).tolist() for use_cache in (True, False)]
    assert written[0] == written[1]


@pytest.mark.parametrize("method", [*VIRTUAL, "hira"])
def test_the_start_and_the_generator_of_a_model_in_training_mode(method):
    """GPT-2 has dropout, which draws numbers."""
    starts = []
    for mode in (True, False):
        model = tiny("gpt2").train(mode)
        torch.manual_seed(3)
        adapters = highrank.attach(model, method, **(P if method in VIRTUAL else {"r": 2}))
        state = torch.get_rng_state()
        torch.manual_seed(3)
        assert torch.equal(state, torch.get_rng_state())
        assert all(module.training == mode for module in model.modules())
        starts.append([parameter.detach().clone() for _, parameter in adapters.named_parameters()])
    assert all(map(torch.equal, *starts))


@pytest.mark.parametrize(
    "settings",
    [
        {"cache_implementation": "static"},
        {"num_return_sequences": 3},
        {"stop_strings": ["x"]},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 4, "max_length": 3, "do_sample": True},
    ],
)
def test_the_model_s_own_generation_settings(settings):
    model = tiny()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    own = copy.deepcopy(model.generation_config)
    highrank.attach(model, "prompt_tuning", **P)
    assert model.generation_config == own


@pytest.mark.parametrize("method", VIRTUAL)
def test_a_cache_without_room_is_refused(method):
    model = tiny()
    highrank.attach(model, method, **P)
    with pytest.raises(UserError, match="leave out cache_implementation"):
        model.generate(IDS, max_new_tokens=2, cache_implementation="static", pad_token_id=0)


@pytest.mark.parametrize("method", VIRTUAL)
def test_a_cache_of_another_call_is_refused(method):
    model = tiny()
    highrank.attach(model, method, **P)
    settings = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    first = model.generate(IDS, return_dict_in_generate=True, **settings)
    longer = torch.cat([first.sequences, IDS], dim=1)
    name = "cache" if hasattr(first, "cache") else "past_key_values"  # before and from 5.24 on
    with pytest.raises(UserError, match="call generate without past_key_values"):
        model.generate(longer, **{name: getattr(first, name)}, **settings)


@pytest.mark.parametrize("method", VIRTUAL)
def test_embeddings_instead_of_tokens(method):
    model = tiny()
    moved(highrank.attach(model, method, **P))
    embedded = model.get_input_embeddings()(IDS)
    by_tokens, by_embeddings = model(input_ids=IDS).logits, model(inputs_embeds=embedded).logits
    torch.testing.assert_close(by_tokens, by_embeddings)


def test_a_mask_for_each_position():
    model = tiny()
    moved(highrank.attach(model, "prefix", **P))
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    added = torch.zeros(1, 1, 5, 5).masked_fill(~allowed, torch.finfo(torch.float32).min)
    expected = model(input_ids=IDS, use_cache=False).logits
    for mask in (allowed, added):
        torch.testing.assert_close(model(input_ids=IDS, attention_mask=mask, use_cache=False).logits, expected)
    model = tiny()
    highrank.attach(model, "prompt_tuning", **P)
    with pytest.raises(UserError, match="the mask must be one of tokens"):
        model(input_ids=IDS, attention_mask=added)


def test_token_types():
    model = tiny("gpt2")
    highrank.attach(model, "prompt_tuning", **P)
    assert model(input_ids=IDS, token_type_ids=torch.ones_like(IDS)).logits.shape[1] == 5


@pytest.mark.parametrize("method", ["bitfit", "layernorm", "bottleneck", "compacter", "lora", "prefix"])
def test_a_copy_is_its_own(method):
    fields = {"lora": {"r": 2}, "prefix": P, "bottleneck": {"reduction": 4}, "compacter": {"reduction": 4}}.get(
        method, {}
    )
    model = tiny("gpt2")
    adapters = moved(highrank.attach(model, method, **fields))
    twin = copy.deepcopy(model)
    before = twin(input_ids=IDS).logits
    moved(adapters)
    assert torch.equal(twin(input_ids=IDS).logits, before)
    assert not torch.allclose(model(input_ids=IDS).logits, before)
    assert torch.equal(pickle.loads(pickle.dumps(twin))(input_ids=IDS).logits, before)


@pytest.mark.parametrize("method", ["hira", "dora", "abba", "layernorm", "bottleneck", "prefix"])
def test_adapters_are_fp32_whatever_the_default_is(method):
    fields = {"prefix": P, "bottleneck": {"reduction": 4}, "abba": {"r1": 2, "r2": 2}}.get(method, {})
    model = tiny()
    torch.set_default_dtype(torch.bfloat16)
    try:
        adapters = highrank.attach(model, method, **fields)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for _, parameter in adapters.named_parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bert"])
def test_norms_of_every_number_type(kind, dtype):
    cls = {"t5": AutoModelForSeq2SeqLM, "bert": AutoModelForSequenceClassification}.get(kind, AutoModelForCausalLM)
    model = tiny(kind, cls).to(dtype)
    if kind == "t5":  # as from_pretrained leaves these in fp32
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.float() if ".wo." in name and dtype == torch.float16 else parameter.data
    batch = {"input_ids": IDS, **({"decoder_input_ids": IDS} if kind == "t5" else {})}
    before = model(**batch).logits
    adapters = highrank.attach(model, "layernorm")
    torch.testing.assert_close(model(**batch).logits.float(), before.float(), rtol=0.02, atol=0.02)
    model(**batch).logits.sum().backward()
    assert all(parameter.grad is not None for _, parameter in adapters.named_parameters())


def test_what_fails_leaves_the_model_as_it_was(monkeypatch):
    model = tiny()
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    def fail(*args, **kwargs):
        raise ValueError("no")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(UserError, match="must take virtual tokens"):
        highrank.attach(model, "prompt_tuning", **P)
    monkeypatch.undo()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not hasattr(model, "highrank_adapter")
    now = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    assert now <= hooks + 1  # the head reads its input as one block, also after `unload`
    highrank.attach(model, "prompt_tuning", **P)


@pytest.mark.parametrize("method", ["vera", "lora", "bitfit", "layernorm"])
def test_a_start_that_fails_leaves_the_model_as_it_was(method, monkeypatch):
    model, fields = tiny("gpt2"), {"vera": {"r": 2}, "lora": {"r": 2}}.get(method, {})
    before = [name for name, _ in model.named_modules()]

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(load("methods", method), "reset_parameters", fail)
    with pytest.raises(MemoryError):
        highrank.attach(model, method, **fields)
    monkeypatch.undo()
    assert [name for name, _ in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    highrank.attach(model, method, **fields)


def test_a_cache_that_checkpointing_does_not_keep():
    model = tiny().train()
    model.activation_checkpointing_enable()
    highrank.attach(model, "prefix", **P)
    with pytest.raises(UserError, match="of a model in hand switch it off"):
        model(input_ids=IDS)


def test_tensors_of_inference_mode_are_refused():
    with torch.inference_mode():
        model = tiny()
    with pytest.raises(UserError, match="inference mode"):
        highrank.attach(model, "lora", r=2)


def test_a_weight_that_is_computed_is_no_place():
    model = tiny()
    weight_norm(model.model.layers[0].self_attn.q_proj)
    with pytest.raises(UserError, match="q_proj"):
        highrank.attach(model, "lora", placement="q", r=2)
