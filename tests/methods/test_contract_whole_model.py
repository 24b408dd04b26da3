"""What every method promises whose update is no weight, on tiny models. A new one is tested here without being named."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from moved import move

from highrank.base.errors import UserError
from highrank.base.registry import available, load
from highrank.data.encoding import IGNORED
from highrank.model.adapters import attach
from highrank.model.backbones import empty_model, load_backbone
from highrank.model.tiny import tiny_config
from highrank.train.loss import language_model_loss
from highrank.train.plan import count

pytestmark = pytest.mark.contract

METHODS = [name for name in sorted(available("methods")) if not load("methods", name).family.changes_weights]
CASES = [
    pytest.param(name, fields, id="-".join([name, *map(str, fields.values())]))
    for name in METHODS
    for fields in load("methods", name).examples
]
DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt2"]
ON_MODELS = [
    (method, model) for method in METHODS for model in DECODERS if method != "bitfit" or model in ("qwen2", "gpt2")
]
START_AT_THE_BASE = ("bitfit", "layernorm")
BAD = [
    ("prompt_tuning", {"num_virtual_tokens": 0}, "num_virtual_tokens"),
    ("prompt_tuning", {"start": "zeros"}, "start"),
    ("prompt_tuning", {"start": "text"}, "start_text"),
    ("prompt_tuning", {"start_text": "Answer:"}, "start_text"),
    ("p_tuning", {"num_virtual_tokens": 0}, "num_virtual_tokens"),
    ("p_tuning", {"hidden_size": 0}, "hidden_size"),
    ("prefix", {"num_virtual_tokens": 0}, "num_virtual_tokens"),
]


def backbone(name, dtype="float32", shuffled=False):
    return load_backbone({"name": f"tiny_{name}", "dtype": dtype, "shuffled": shuffled}, None)


def adapted(method, fields=None, model=None, dtype="float32", moved=True, seed=0, shuffled=False):
    loaded = backbone(model or ("qwen2" if method == "bitfit" else "llama"), dtype, shuffled)
    cls = load("methods", method)
    fields = cls.examples[0] if fields is None else fields
    adapters = attach(loaded.model, [], cls, cls.config(**fields), seed, tokenizer=loaded.tokenizer)
    if moved:
        move(adapters, 0.5, seed=5)
    return adapters


IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [50, 60, 70, 80, 90, 100]])


@torch.no_grad()
def logits(model, ids=IDS, **kwargs):
    return model(input_ids=ids, **kwargs).logits


@pytest.mark.parametrize(("method", "fields"), CASES)
def test_counts(method, fields):
    adapters = adapted(method, fields)
    cfg = adapters.cfg
    empty = empty_model(adapters.model.config)
    base = sum(p.numel() for p in empty.parameters())
    found = count(empty, [], adapters.method, cfg)
    assert found.trainable == adapters.num_trainable() == adapters.method.num_trainable(empty, cfg)
    assert found.total == base
    assert sum(p.numel() for p in adapters.model.parameters() if p.requires_grad) == found.trainable
    assert adapters.method.sites(empty, cfg)


@pytest.mark.parametrize(("method", "model"), ON_MODELS)
def test_acts_on_the_model_and_goes_without_trace(method, model):
    base = logits(backbone(model).model)
    adapters = adapted(method, model=model)
    changed = logits(adapters.model)
    assert changed.shape == base.shape
    assert not torch.allclose(changed, base, atol=1e-3)
    with adapters.disabled():
        assert torch.equal(logits(adapters.model), base)
    assert torch.equal(logits(adapters.model), changed)
    plain = adapters.unload()
    assert torch.equal(logits(plain), base)
    assert not any(name.startswith("highrank") for name, _ in plain.named_modules())


@pytest.mark.parametrize(("method", "model"), ON_MODELS)
def test_loss_at_supervised_positions_is_the_one_over_all_logits(method, model):
    adapters = adapted(method, model=model)
    mask, labels = torch.ones_like(IDS), IDS.clone()
    mask[1, 4:], labels[:, :2], labels[1, 4:] = 0, IGNORED, IGNORED
    out = adapters.model(input_ids=IDS, attention_mask=mask).logits
    own = F.cross_entropy(out[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    parameters = [p for _, p in adapters.named_parameters()]
    expected = torch.autograd.grad(own, parameters)
    loss, num_targets = language_model_loss(adapters.model, IDS, mask, labels)
    assert num_targets == 6
    torch.testing.assert_close(loss, own, rtol=1e-6, atol=1e-6)
    for found, right in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        # The same fp32 sums in another order.
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)
    assert any(gradient.abs().max() > 0 for gradient in expected)
    assert all(p.grad is None and not p.requires_grad for p in adapters.model.base_model.parameters())


@pytest.mark.parametrize(("method", "model"), ON_MODELS)
def test_decoding_with_a_cache_is_decoding_without(method, model):
    adapters = adapted(method, model=model)
    ids = IDS
    for _ in range(5):
        ids = torch.cat([ids, logits(adapters.model, ids, use_cache=False)[:, -1:].argmax(-1)], dim=1)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(adapters.model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **settings), ids)
    beams = adapters.model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), num_beams=3, **settings)
    assert beams.shape == ids.shape


@pytest.mark.parametrize(("method", "model"), ON_MODELS)
def test_padding_on_the_left_changes_no_answer(method, model):
    """Positions count from behind the virtual tokens, whatever stands between."""
    adapters = adapted(method, model=model)
    short = IDS[:1, 3:]
    both = torch.cat([F.pad(short, (3, 0)), IDS[1:]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    padded = adapters.model.generate(input_ids=both, attention_mask=mask, **settings)
    alone = adapters.model.generate(input_ids=short, attention_mask=torch.ones_like(short), **settings)
    for ours, theirs in zip(padded.logits, alone.logits, strict=True):
        torch.testing.assert_close(ours[:1], theirs, rtol=1e-4, atol=1e-4)  # fp32, other shapes of the products
    assert torch.equal(padded.sequences[:1, 6:], alone.sequences[:, 3:])


@pytest.mark.parametrize("method", [m for m in METHODS if m != "prefix"])
def test_activation_checkpointing_gives_the_same_gradients(method):
    plain, checkpointed = adapted(method), adapted(method)
    checkpointed.model.activation_checkpointing_enable()
    for adapters in (plain, checkpointed):
        adapters.model.train()
        language_model_loss(adapters.model, IDS, torch.ones_like(IDS), IDS)[0].backward()
    for (_, ours), (_, theirs) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("method", METHODS)
def test_the_start_depends_on_the_seed_alone(method):
    first, same, other = (adapted(method, moved=False, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    if method not in START_AT_THE_BASE:
        assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("method", METHODS)
def test_save_and_load(tmp_path, method):
    first = adapted(method)
    first.save(tmp_path)
    second = adapted(method, moved=False, seed=1)
    second.load(tmp_path)
    assert torch.equal(logits(first.model), logits(second.model))
    assert json.loads((tmp_path / "adapter.json").read_text())["method"] == method
    with pytest.raises(UserError, match="probe must match"):
        adapted(method, shuffled=True).load(tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_merging_is_exact_or_an_error(method):
    adapters = adapted(method)
    before = logits(adapters.model)
    if not adapters.method.mergeable:
        with pytest.raises(UserError, match=f"merge: {method} has no merged weight"):
            adapters.merge()
        assert torch.equal(logits(adapters.model), before)
        return
    base = {name: p.clone() for name, p in adapters.model.named_parameters()}
    adapters.merge()
    torch.testing.assert_close(logits(adapters.model), before, rtol=1e-5, atol=1e-5)  # one bias sum, rounded twice
    with pytest.raises(UserError, match="merged already"):
        adapters.merge()
    adapters.unmerge()
    assert all(torch.equal(p, base[name]) for name, p in adapters.model.named_parameters())
    assert torch.equal(logits(adapters.model), before)
    adapters.merge()
    torch.testing.assert_close(logits(adapters.unload()), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_base_and_autocast(method):
    adapters = adapted(method, dtype="bfloat16")
    assert all(p.dtype == torch.float32 for _, p in adapters.named_parameters())
    adapters.model(input_ids=IDS).logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for _, p in adapters.named_parameters())
    adapters = adapted(method)
    with torch.autocast("cpu", torch.bfloat16):
        adapters.model(input_ids=IDS).logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for _, p in adapters.named_parameters())


@pytest.mark.parametrize(("method", "fields", "key"), BAD)
def test_bad_values_name_method_and_field(method, fields, key):
    with pytest.raises(UserError, match=rf"^{method}: .*{key}="):
        load("methods", method).config(**fields)


@pytest.mark.parametrize("method", METHODS)
def test_configs_are_frozen_and_keyword_only(method):
    config = load("methods", method).config
    assert config.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(config))


def test_models_that_do_not_fit():
    with pytest.raises(UserError, match=r"^bitfit: the model has no biases to train, got model_type=llama"):
        adapted("bitfit", model="llama")
    encoder = load_backbone({"name": "tiny_bert", "dtype": "float32"}, None, "classify").model
    for method in ("prompt_tuning", "p_tuning", "prefix"):
        cls = load("methods", method)
        with pytest.raises(UserError, match=rf"^{method}: virtual tokens need a causal language model, got Bert"):
            attach(encoder, [], cls, cls.config())


def test_starts_of_a_prompt():
    table = backbone("llama").model.get_input_embeddings().weight
    text = adapted("prompt_tuning", {"start": "text", "start_text": "ab", "num_virtual_tokens": 4}, moved=False)
    tokens = backbone("llama").tokenizer("ab").input_ids  # <s> a b
    assert torch.equal(text.module.P, table[torch.tensor([*tokens, tokens[0]])])
    sampled = adapted("prompt_tuning", {"start": "sample_vocab"}, moved=False).module.P
    assert all((table == row).all(1).any() for row in sampled)


def test_prefix_refuses_activation_checkpointing():
    """Checkpointed layers are given no cache, and the prefix would be gone without a word."""
    adapters = adapted("prefix")
    adapters.model.activation_checkpointing_enable()
    adapters.model.train()
    with pytest.raises(UserError, match=r"^prefix: .*got checkpoint_activations=true"):
        adapters.model(input_ids=IDS)


def test_bitfit_gradients_are_those_of_the_biases():
    adapters, plain = adapted("bitfit", moved=False), backbone("qwen2").model
    for model in (adapters.model, plain):
        model(input_ids=IDS).logits.square().mean().backward()
    gradients = {name.replace(".", "/"): p.grad for name, p in plain.named_parameters()}
    assert len(adapters.module.delta) == 6
    for name, delta in adapters.module.delta.items():
        torch.testing.assert_close(delta.grad, gradients[f"{name}/bias"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("method", "num_tensors"), [("layernorm", 6), ("bitfit", 9)])
def test_what_a_language_model_does_not_run_on_text_stays_out(method, num_tensors):
    """It would get no gradient: here an attention to an encoder that the model has not, and its norm."""
    from transformers import BartConfig, BartForCausalLM

    sizes = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    model = BartForCausalLM(BartConfig(vocab_size=260, is_decoder=True, is_encoder_decoder=False, **sizes)).eval()
    cls = load("methods", method)
    adapters = attach(model, [], cls, cls.config())
    model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.square().mean().backward()
    gradients = [parameter.grad for _, parameter in adapters.named_parameters()]
    assert len(gradients) == num_tensors
    assert all(gradient is not None for gradient in gradients)


def test_bitfit_leaves_the_head_out_which_trains_in_full():
    model = load_backbone({"name": "tiny_bert", "dtype": "float32"}, None, "classify").model
    expected = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias") and "classifier" not in n)
    cls = load("methods", "bitfit")
    adapters = attach(model, [], cls, cls.config(), heads=["classifier"])
    assert adapters.num_trainable() == expected
    assert adapters.extra == ["classifier.weight", "classifier.bias"]


def test_sizes_of_tiny_models_are_what_the_formulas_say():
    config = tiny_config("llama")
    assert (config["hidden_size"], config["num_hidden_layers"], config["num_key_value_heads"]) == (16, 2, 1)
    for method, expected in (
        ("prompt_tuning", 3 * 16),
        ("p_tuning", 3 * 16 + 3 * (16 * 16 + 16)),
        ("prefix", 3 * 2 * 2 * 8),
    ):
        assert adapted(method).num_trainable() == expected
