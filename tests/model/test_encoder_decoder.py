"""An encoder and a decoder in one model: T5's kin write texts under every method that changes weights."""

import json
import re

import pytest
import torch
from model_types import move, telling
from transformers import AutoConfig, AutoModelForSeq2SeqLM, GenerationConfig

import highrank
from highrank.base.errors import UserError
from highrank.base.registry import available, load
from highrank.cli import main
from highrank.data.batches import pad
from highrank.data.encoding import IGNORED
from highrank.model.adapters import attach
from highrank.model.backbones import empty_model, load_backbone, modules_on_text
from highrank.model.encoder_decoder import everywhere, parted, start_token
from highrank.model.language import check_causal, padding_moves
from highrank.model.placement import resolve
from highrank.model.tiny import tiny_config, tiny_tokenizer
from highrank.train.loss import example_losses, language_model_loss
from highrank.train.outputs import generate, rank_options

GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
M2M = {
    **{"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 2},
}
CONFIGS = {
    "t5": tiny_config("t5"),
    "t5, gated": tiny_config("t5") | GATED,
    "mt5": tiny_config("t5") | {"model_type": "mt5"},
    "umt5": tiny_config("t5") | {"model_type": "umt5"},
    "m2m_100": {key: tiny_config("t5")[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    | {"model_type": "m2m_100", **M2M},
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [50, 60, 70, 80], [100, 90]]
ANSWERS = [[20, 21, 2], [30, 2], [40, 41, 42, 2]]
END = 2


def built(name="t5"):
    torch.manual_seed(0)
    return telling(AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**CONFIGS[name])))


def adapted(method, model=None, fields=None, moved=True):
    model, cls = built() if model is None else model, load("methods", method)
    views = resolve(model, "all") if cls.family.placed else []
    fields = cls.examples[0] if fields is None else fields
    adapters = attach(model, views, cls, cls.config(**fields), tokenizer=tiny_tokenizer())
    if moved:
        move(adapters)
    model.eval()
    return adapters


def rows():
    """Returns a batch as training has it: prompt and answer in one row, padded behind."""
    ids = [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    labels = [[IGNORED] * len(prompt) + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    return pad(ids, 0), pad([[1] * len(row) for row in ids], 0), pad(labels, IGNORED)


def closed(prompts):
    """Returns prompts as T5's tokenizer writes them, and their mask."""
    texts = [[*prompt, END] for prompt in prompts]
    return {"input_ids": pad(texts, 0), "attention_mask": pad([[1] * len(text) for text in texts], 0)}


# What each of the two reads


def test_a_row_is_parted_into_what_each_of_the_two_reads():
    given, targets = parted(built(), *rows(), IGNORED)
    for name, tensor in closed(PROMPTS).items():
        assert torch.equal(given[name], tensor)
    assert targets.tolist() == [[20, 21, 2, IGNORED], [30, 2, IGNORED, IGNORED], [40, 41, 42, 2]]
    assert given["decoder_input_ids"].tolist() == [[0, 20, 21, 2], [0, 30, 2, 0], [0, 40, 41, 42]]


def test_where_a_row_is_padded_does_not_matter():
    ids, mask, labels = rows()
    behind = parted(built(), ids, mask, labels, IGNORED)
    order = mask.argsort(dim=1, stable=True)  # padding first
    front = parted(built(), *(tensor.gather(1, order) for tensor in (ids, mask, labels)), IGNORED)
    assert torch.equal(front[1], behind[1])
    assert all(torch.equal(front[0][name], tensor) for name, tensor in behind[0].items())


def test_without_a_first_token_there_is_no_answer():
    model = built()
    model.config.decoder_start_token_id = None
    with pytest.raises(UserError, match=r"needs a token to begin with, got decoder_start_token_id=null in .* of a t5"):
        start_token(model)
    assert start_token(load_backbone({"name": "tiny_llama", "dtype": "float32"}, None).model) is None


# Loss, answers, ranks


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_is_the_models_own(name):
    model = adapted("hira", built(name)).model
    ids, mask, labels = rows()
    with torch.no_grad():
        own = model(**closed(PROMPTS), labels=pad(ANSWERS, IGNORED)).loss
        alone = [
            model(**closed([prompt]), labels=torch.tensor([answer])).loss * len(answer)
            for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
        ]
    found, num_targets = language_model_loss(model, ids, mask, labels)
    torch.testing.assert_close(found.detach(), own, rtol=1e-5, atol=0)
    assert num_targets == sum(map(len, ANSWERS))
    found = torch.tensor(example_losses(model, ids, mask, labels))
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_text_is_the_models_own_and_does_not_depend_on_the_batch(name):
    model = adapted("hira", built(name)).model
    front = {
        "input_ids": pad(PROMPTS, 0, left=True),
        "attention_mask": pad([[1] * len(row) for row in PROMPTS], 0, left=True),
    }
    tokenizer, decoding = tiny_tokenizer(), {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        texts = generate(model, tokenizer, front, decoding, 0)
        start = CONFIGS[name]["decoder_start_token_id"]
        settings = GenerationConfig(**decoding, eos_token_id=END, pad_token_id=0, decoder_start_token_id=start)
        own = [model.generate(**closed([row]), generation_config=settings)[0, 1:] for row in PROMPTS]
    assert texts == tokenizer.batch_decode(own, skip_special_tokens=True)
    assert any(texts)


def test_an_option_is_as_likely_as_the_model_finds_it():
    model = adapted("hira").model
    tails = ANSWERS[:2] * len(PROMPTS)
    batch = {
        "input_ids": pad(PROMPTS, 0, left=True),
        "attention_mask": pad([[1] * len(row) for row in PROMPTS], 0, left=True),
        "index": torch.arange(len(PROMPTS)),
        "owner": torch.tensor([0, 0, 1, 1, 2, 2]),
        "tail_ids": pad(tails, 0),
        "tail_mask": pad([[1] * len(row) for row in tails], 0),
        "tail_labels": pad(tails, IGNORED),
    }
    with torch.no_grad():
        found = dict(rank_options(model, batch))
        for place, prompt in enumerate(PROMPTS):
            for option, answer in enumerate(ANSWERS[:2]):
                own = model(**closed([prompt]), labels=torch.tensor([answer])).loss
                assert found[place][option] == pytest.approx(-float(own) * len(answer), rel=1e-5)


def test_padding_and_later_tokens_are_looked_at():
    model = built()
    check_causal(model)
    assert not padding_moves(model)
    forward = model.encoder.forward

    def blind(*args, attention_mask=None, **kwargs):
        return forward(*args, attention_mask=torch.ones_like(attention_mask), **kwargs)

    model.encoder.forward = blind
    assert padding_moves(model)
    model = built()
    model.lm_head.register_forward_pre_hook(lambda head, args: (args[0] + args[0].mean(1, keepdim=True),))
    with pytest.raises(UserError, match=r"got one whose logits move by .*: t5"):
        check_causal(model)


# Placement


def test_every_part_is_found_in_both():
    found = {(view.layer, view.part, view.path) for view in resolve(built(), "all")}
    expected = set()
    for layer in range(4):
        stack, i = ("encoder", "decoder")[layer // 2], layer % 2
        feed_forward = f"{stack}.block.{i}.layer.{1 + layer // 2}.DenseReluDense"
        expected |= {(layer, part, f"{stack}.block.{i}.layer.0.SelfAttention.{part}") for part in "qkvo"}
        expected |= {(layer, "up", f"{feed_forward}.wi"), (layer, "down", f"{feed_forward}.wo")}
        if stack == "decoder":
            expected |= {(layer, part, f"decoder.block.{i}.layer.1.EncDecAttention.{part}") for part in "qkvo"}
    assert found == expected


def test_layers_count_from_the_encoder_on():
    assert [view.path for view in resolve(built(), "q", "2")] == [
        "decoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.q",
    ]
    with pytest.raises(UserError, match="the model has layers 0-3, got layers=4"):
        resolve(built(), "q", 4)


@pytest.mark.parametrize("name", ["t5, gated", "mt5", "umt5", "m2m_100"])
def test_kin_have_their_parts_too(name):
    gated = name != "m2m_100"
    counts = {"q": 6, "k": 6, "v": 6, "o": 6, **({"gate": 4} if gated else {}), "up": 4, "down": 4}
    views = resolve(empty_model(AutoConfig.for_model(**CONFIGS[name])), "all")
    assert {part: sum(view.part == part for view in views) for part in counts} == counts
    assert len(views) == sum(counts.values())


def test_a_weights_neighbours_are_those_of_its_own_stack():
    model = built()
    cls = load("methods", "hilora")
    seen = {}

    class Looks(cls):
        def reset_parameters(self, W, site):
            seen[site.name] = site.neighbours()
            super().reset_parameters(W, site)

    views = resolve(model, ["q", "down"])
    weights = {view.path: model.get_submodule(view.path).weight.detach().clone() for view in views}
    attach(model, views, Looks, cls.config())
    for stack, i, at in (("encoder", 1, 1), ("decoder", 2, 0)):
        for place in (f"layer.{i}.DenseReluDense.wo", "layer.0.SelfAttention.q"):
            expected = [weights[f"{stack}.block.{number}.{place}"] for number in (0, 1)]
            found = seen[f"{stack}.block.{at}.{place}"]
            assert len(found) == 2
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_whole_models_method_reaches_both():
    names = {name for name, module in modules_on_text(built()) if name.endswith("layer_norm")}
    assert len(names) == 2 * 2 + 2 * 3 + 2
    assert "encoder.final_layer_norm" in names
    assert "decoder.block.1.layer.1.layer_norm" in names


# Methods

METHODS = sorted(available("methods"))
WRITE_INTO_WEIGHTS = [name for name in METHODS if load("methods", name).mergeable and name != "bitfit"]


@pytest.mark.parametrize("method", WRITE_INTO_WEIGHTS)
@torch.no_grad()
def test_a_method_acts_merges_and_goes_without_a_trace(method):
    model = built()
    given = everywhere(model, closed(PROMPTS[:1]))
    base = model(**given).logits
    adapters = adapted(method, model)
    found = model(**given).logits
    assert not torch.allclose(found, base, atol=1e-3)
    adapters.merge()
    # fp32 sums, in some methods of a product of matrices, over six layers
    torch.testing.assert_close(model(**given).logits, found, rtol=1e-3, atol=1e-3 * float(found.std()))
    if adapters.keeps_base:
        adapters.unmerge()
        assert torch.equal(model(**given).logits, found)
        assert torch.equal(adapters.unload()(**given).logits, base)


@pytest.mark.parametrize(
    "method", [name for name in METHODS if name not in ("bitfit", "prompt_tuning", "p_tuning", "prefix")]
)
def test_a_method_learns_everywhere(method):
    adapters = adapted(method)
    language_model_loss(adapters.model, *rows())[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for _, p in adapters.named_parameters())
    learns = [any(bool(p.grad.any()) for p in adapter.parameters()) for adapter in adapters.by_view.values()]
    assert all(learns)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix"])
def test_virtual_tokens_are_refused_with_the_reason(method):
    with pytest.raises(UserError, match=rf"^{method}: virtual tokens stand in front of .* decoder in one, t5: use"):
        adapted(method)


def test_biases_that_are_not_there_are_not_trained():
    with pytest.raises(UserError, match="no biases to train, got model_type=t5"):
        adapted("bitfit")
    assert adapted("bitfit", built("m2m_100")).num_trainable() > 0


# Runs

WORDS = ("model=tiny_t5", "task.n_train=8", "task.n_test=2", "max_steps=2", "batch_size=4", "protocol.max_new_tokens=4")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["packing=true"],
            r"^error: run: packing=true is for a decoder that goes on with its text, got t5, whose encoder",
        ),
        (["protocol.mask_prompt=false"], r"^error: run: protocol=clean, which has mask_prompt=false, is for a decoder"),
        (["general_text={here}"], r"^error: run: general_text=.* is for a decoder that goes on"),
        (["task=glue/sst2"], r"^error: model: an encoder and a decoder in one .* a classify task, got t5; they write"),
        (["task=jsonl", "task.train={chat}", "task.test={chat}"], r"^error: run: a conversation is for a decoder"),
        (["layers=4"], "the model has layers 0-3"),
    ],
)
def test_what_the_two_cannot_do_is_said_in_one_line(run_cli, tmp_path, words, said):
    chat = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}\n'
    (tmp_path / "chat.jsonl").write_text(chat)
    (tmp_path / "here.txt").write_text("A text.\n")
    words = [word.format(here=tmp_path / "here.txt", chat=tmp_path / "chat.jsonl") for word in words]
    status, _, err = run_cli(*WORDS, *words)
    assert status == 2
    assert re.search(said, err), err
    assert err.count("\n") == 1


@pytest.mark.parametrize("method", ["hyperadapt", "full"])
def test_a_run_is_trained_evaluated_merged_and_read_again(run_cli, tmp_path, capsys, method):
    run, merged = tmp_path / "run", tmp_path / "merged"
    status, _, err = run_cli(*WORDS, f"method={method}", "lr=0.01", f"run_dir={run}")
    assert status == 0, err
    results = json.loads((run / "results.json").read_text())
    before, after = (results["metrics"][when]["sets"]["wordmath"]["loss"] for when in ("before", "final"))
    assert after < before
    assert main(["merge", str(run), "--out", str(merged)]) == 0
    assert main(["eval", str(run)]) == 0
    capsys.readouterr()
    ours, again = highrank.load(run).model, AutoModelForSeq2SeqLM.from_pretrained(merged).eval()
    given = everywhere(again, closed(PROMPTS))
    with torch.no_grad():
        torch.testing.assert_close(again(**given).logits, ours(**given).logits, rtol=1e-4, atol=1e-5)
    loaded = load_backbone({"name": "merged", "dtype": "float32"}, str(merged))
    assert start_token(loaded.model) == 0
