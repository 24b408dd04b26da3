"""packing=true: examples that share a row give the loss and the gradients that they give alone, or are refused."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from moved import move
from packaging import version
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

from highrank.base.errors import UserError
from highrank.cli import main
from highrank.config.run_config import config_hash
from highrank.config.words import compose_run
from highrank.data.batches import TrainingData, collate, collate_packed
from highrank.data.encoding import IGNORED, Encoded
from highrank.model.tiny import DECODERS
from highrank.train.build import build_model
from highrank.train.effect import check_packing
from highrank.train.loss import language_model_loss
from highrank.train.module import FineTuner

pytestmark = pytest.mark.integration

LENGTHS = (9, 14, 5, 20, 11, 2)
SIZES = {
    **{"vocab_size": 260, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
    **{"intermediate_size": 32, "max_position_embeddings": 64},
}
WINDOW = {**SIZES, "sliding_window": 6}  # shorter than the texts
EXACT = {
    "llama": SIZES,
    "mistral": WINDOW,
    "qwen2": {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "gemma3_text": {**WINDOW, "head_dim": 8},
    "phi3": SIZES,
    "gpt2": {"vocab_size": 260, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neox": SIZES,
    "olmo2": SIZES,
    "falcon": {**SIZES, "num_kv_heads": 1},
}
REFUSED = {
    "bloom": {"vocab_size": 260, "hidden_size": 16, "n_layer": 2, "n_head": 2},  # its mask is not made from positions
    "opt": {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "mamba": {"vocab_size": 260, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},  # remembers
}

if version.parse(transformers.__version__) < version.parse("5.24"):  # whose Falcon lets examples meet
    REFUSED["falcon"] = EXACT.pop("falcon")


def texts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 250, (n,), generator=generator).tolist() for n in LENGTHS]


def examples():
    return [Encoded(ids, [IGNORED] * (len(ids) // 3) + ids[len(ids) // 3 :]) for ids in texts()]


def random_model(model_type, **config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config)).double().eval()
    move(model, 0.1)
    return model


def test_rows_are_filled_and_each_example_counts_from_zero():
    batch = collate_packed(examples(), 0, longest=25)
    assert batch["input_ids"].shape == (
        3,
        25,
    )  # 20 + 5, 14 + 11, 9 + 2 of 61 tokens; one example per row would be 6 x 20
    assert int(batch["attention_mask"].sum()) == sum(LENGTHS)
    starts = [(row == 0).nonzero().flatten().tolist() for row in batch["position_ids"]]
    assert starts == [[0, 20], [0, 14], [0, 9, 11]]  # the last is the padding
    found = []
    for ids, labels, row in zip(batch["input_ids"], batch["labels"], starts, strict=True):
        for at, end in zip(row, [*row[1:], len(ids)], strict=True):
            found.append((ids[at:end].tolist(), labels[at:end].tolist()))
    expected = [(list(e.input_ids), [IGNORED, *e.labels[1:]]) for e in examples()]
    assert sorted(pair for pair in found if any(pair[0])) == sorted(expected)
    assert collate_packed(examples(), 0, longest=1)["input_ids"].shape == (6, 20)  # none fits beside another
    assert collate_packed(examples(), 0, longest=100)["input_ids"].shape == (1, 61)


@pytest.mark.parametrize("model_type", EXACT)
def test_loss_and_gradients_are_those_of_rows_of_their_own(model_type):
    model, found = random_model(model_type, **EXACT[model_type]), []
    for batch in (collate(examples(), 0), collate_packed(examples(), 0, longest=30)):
        model.zero_grad()
        loss, num_targets = language_model_loss(model, **batch)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((loss.detach(), num_targets, gradient))
    (apart, n, gradient), (packed, same_n, same) = found
    assert n == same_n
    assert torch.isclose(packed, apart, rtol=1e-6, atol=0)
    assert (same - gradient).abs().max() < 1e-6 * gradient.abs().max()
    check_packing(SimpleNamespace(model=model), texts()[:3])


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_model_that_lets_them_meet_is_refused(model_type):
    model = random_model(model_type, **REFUSED[model_type])
    with pytest.raises(
        UserError, match=r"texts in one row must be computed as they are alone, got a difference of [\d.]+%"
    ):
        check_packing(SimpleNamespace(model=model, method=None), texts()[:3])


class WithoutPositions(torch.nn.Module):
    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.embeddings = torch.nn.Embedding(260, 4)

    def get_input_embeddings(self):
        return self.embeddings

    def forward(self, input_ids, use_cache, attention_mask=None):
        return SimpleNamespace(logits=self.embeddings(input_ids))


def test_so_is_one_that_takes_no_positions():
    with pytest.raises(UserError, match=r"unexpected keyword argument 'position_ids'"):
        check_packing(SimpleNamespace(model=WithoutPositions()), texts()[:3])


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("method", ["hira", "hyperadapt", "dora"])
def test_an_adapters_gradient_is_the_same_with_every_micro_batch_cut_in_parts_or_not(name, method):
    run = compose_run([f"model=tiny_{name}", f"method={method}", "task.n_train=4", "task.n_test=1"])
    task = run.make_task()
    backbone, adapters = build_model(run, task)
    with torch.no_grad():
        for _, parameter in adapters.named_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    module = FineTuner(adapters, task, backbone.tokenizer, run.core, 1, run.protocol)
    module.train()
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):  # GPT-2's, which draws for each position
            part.p = 0.0
    found = []
    for batch, rows in (
        (collate(examples(), 0), 9),
        (collate_packed(examples(), 0, 30), 9),
        (collate_packed(examples(), 0, 30), 1),
    ):
        adapters.model.zero_grad()
        loss, _ = module.loss_by_rows(batch, rows)
        loss.backward()
        found.append((loss.detach(), torch.cat([p.grad.flatten() for _, p in adapters.named_parameters()])))
    for loss, gradient in found[1:]:
        assert torch.isclose(loss, found[0][0], rtol=1e-6, atol=0)
        assert (gradient - found[0][1]).abs().max() < 1e-6 * found[0][1].abs().max() + 1e-7


WORDS = [
    "model=tiny_llama",
    "method=lora",
    "r=2",
    "lr=1e-2",
    "task.n_train=24",
    "task.n_test=2",
    "batch_size=6",
    "max_steps=4",
]
QUICK = [*WORDS, "eval_before=false", "protocol.max_new_tokens=2", "protocol.max_length=2000"]


def test_a_packed_run_takes_the_same_steps(tmp_path):
    for packing in ("false", "true"):
        assert main(["run", *QUICK, f"packing={packing}", f"run_dir={tmp_path / packing}"]) == 0
    plain, packed = (load_file(tmp_path / name / "adapter" / "adapter.safetensors") for name in ("false", "true"))
    assert plain.keys() == packed.keys()
    for name in plain:
        assert torch.allclose(plain[name], packed[name], rtol=1e-3, atol=1e-5), name  # four steps of Adam
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("false", "true")]
    assert results[0]["tokens"] == results[1]["tokens"]
    assert results[0]["config_hash"] != results[1]["config_hash"]


def test_a_run_without_packing_has_the_hash_it_had():
    resolved = compose_run(QUICK).resolved
    assert resolved["packing"] is False
    assert config_hash(resolved) == config_hash({key: value for key, value in resolved.items() if key != "packing"})


def test_rows_hold_as_many_tokens_as_the_cut_off_allows():
    run = compose_run([*QUICK, "packing=true"])
    task = run.make_task()
    backbone, _ = build_model(run, task)
    rules = replace(run.protocol, max_length=2000)
    data = TrainingData(task, rules, backbone.tokenizer, 8, 8, 0, packing=True)
    batches = list(data.train_dataloader())
    assert sum(int(batch["attention_mask"].sum()) for batch in batches) == sum(len(e.input_ids) for e in data.examples)
    assert all(batch["input_ids"].shape[1] <= 2000 and len(batch["input_ids"]) < 8 for batch in batches)


def test_what_cannot_be_packed_is_told_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(FineTuner, "training_step", lambda *args: pytest.fail("it trains"))
    for words, what in (
        (["method=prefix", "num_virtual_tokens=2"], "method=prefix"),
        (["method=prompt_tuning", "num_virtual_tokens=2"], "method=prompt_tuning"),
    ):
        given = [word for word in QUICK if word not in ("method=lora", "r=2")]
        assert main(["run", *given, *words, "packing=true", "dry_run=true", f"run_dir={tmp_path / 'plan'}"]) == 2
        assert (
            f"packing is for language models without virtual tokens, which stand before each example, got {what}"
            in (capsys.readouterr().err)
        )
    monkeypatch.setattr(
        masking_utils, "find_packed_sequence_indices", lambda positions: None
    )  # as a library may forget
    assert main(["run", *QUICK, "packing=true", f"run_dir={tmp_path / 'run'}"]) == 2
    assert (
        "packing: texts in one row must be computed as they are alone, got a difference of" in capsys.readouterr().err
    )
