"""Merged model folders: what transformers loads from them is the adapted model, and what rounding took is told."""

import json
import shlex

import pytest
import torch
from trained import logits
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from highrank.base.errors import UserError
from highrank.base.saved import read_results
from highrank.cli import main
from highrank.config.words import compose_run
from highrank.interop.hub_model import MOST_ERROR, compare, merge_run
from highrank.train.saved import load_run, read_run

CASES = {
    "hira": ["model=tiny_llama", "method=hira", "r=2"],
    "tied_and_transposed_slices": ["model=tiny_gpt2", "method=hira", "r=2", "placement=qv", "R=w0_smooth"],
    "tied": ["model=tiny_gemma", "method=mora", "r=2", "placement=all"],
    "fused_whole": ["model=tiny_phi3", "method=hyperadapt", "placement=all", "fused=fused"],
    "fused_slices": ["model=tiny_phi3", "method=dora", "r=2", "placement=[q,v,up]"],
    "biases": ["model=tiny_qwen2", "method=bitfit"],
    "full": ["model=tiny_gpt2", "method=full"],
    "classifier": ["model=tiny_bert", "task=glue/mrpc", "method=lora", "r=2", "placement=qv"],
}


@pytest.fixture
def some_pairs(monkeypatch):
    """Texts for the classifier without its data."""
    from highrank.data.task import LabelledText

    texts = [LabelledText(str(i), "one text", 0, "and another") for i in range(3)]
    cls = compose_run(["task=glue/mrpc", "model=tiny_bert", "method=lora"]).task
    monkeypatch.setattr(cls, "test", lambda self: {"test": texts})


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_the_adapted_model(make_run, tmp_path, some_pairs, case):
    run, model = make_run(*CASES[case])
    ours = logits(model)
    out = merge_run(run, tmp_path / "merged", accept=True)
    auto = AutoModelForSequenceClassification if case == "classifier" else AutoModelForCausalLM
    merged = auto.from_pretrained(out)
    # fp32: W' is rounded once per entry, then the products are summed in another order
    torch.testing.assert_close(logits(merged), ours, rtol=1e-5, atol=1e-5 * ours.abs().max().item())
    assert not any("highrank" in name for name, _ in merged.named_parameters())
    tied = merged.config.tie_word_embeddings and case != "classifier"
    assert tied == (case in ("tied", "tied_and_transposed_slices", "full"))
    if tied:
        assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    found = json.loads((out / "fidelity.json").read_text())
    assert found["dtype"] == "float32"
    assert found["max_logit_difference"] < 1e-5
    assert found["argmax_agreement"] == 1
    assert found["error"] < 1e-4
    assert found["update_lost"] < 1e-3


SMALL_UPDATE = ["model=tiny_llama", "model.dtype=bfloat16", "method=lora", "r=2"]


def test_what_rounding_takes_is_measured(make_run, tmp_path):
    """Longhand, over the whole model: the share of the update in weights that bf16 leaves as they were."""
    run, _ = make_run(*SMALL_UPDATE, scale=1e-4)
    found = json.loads((merge_run(run, tmp_path / "merged", accept=True) / "fidelity.json").read_text())
    assert 0.05 < found["update_lost"] < 0.95
    _, backbone, adapters = load_run(run)
    update = torch.cat([adapters.delta_weight(view).flatten() for view in adapters.views]).double().abs()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    stayed = [merged.get_parameter(f"{v.path}.weight") == adapters.base_weight(v) for v in adapters.views]
    stayed = torch.cat([same.flatten() for same in stayed])
    assert found["update_lost"] == pytest.approx(float(update[stayed].sum() / update.sum()), rel=1e-6)

    exact = backbone.model.float()
    y, rounded = logits(exact), logits(merged.float())
    with adapters.disabled():
        y0 = logits(exact)
    assert float((rounded - y).norm() / (y - y0).norm()) > MOST_ERROR
    assert found["error"] > MOST_ERROR


def test_a_merge_that_loses_the_update_is_refused_or_accepted(make_run, tmp_path, capsys):
    run, _ = make_run(*SMALL_UPDATE, scale=1e-4)
    words = ["merge", str(run), "--out", str(tmp_path / "merged")]
    assert main(words) == 2
    assert "rounding to bfloat16 must keep what training changed, got error=" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["trained"]  # nothing half-written
    assert main([*words, "--dtype", "float32"]) == 0
    assert capsys.readouterr().out.split()[-1] == str(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float32"
    assert main([*words[:-1], str(tmp_path / "forced"), "--force"]) == 0


def test_bad_merges_are_refused_before_weights_load(make_run, tmp_path, monkeypatch):
    lora, prompt = (
        make_run("model=tiny_llama", "method=lora"),
        make_run("model=tiny_llama", "method=prompt_tuning", name="prompt"),
    )
    monkeypatch.setattr("highrank.train.saved.build_model", None)
    with pytest.raises(UserError, match="merge: prompt_tuning has no merged weight"):
        merge_run(prompt[0], tmp_path / "out")
    with pytest.raises(UserError, match="--dtype is one of float32, bfloat16, float16, got --dtype int8"):
        merge_run(lora[0], tmp_path / "out", "int8")
    with pytest.raises(UserError, match="merge: the output folder must be new or empty"):
        merge_run(lora[0], lora[0])
    (tmp_path / "trained" / "adapter" / "adapter.json").unlink()
    with pytest.raises(UserError, match=r"a run directory holds adapter/adapter.json"):
        merge_run(lora[0], tmp_path / "out")


def test_compare_is_what_it_says():
    y = [torch.tensor([[0.0, 2.0], [3.0, 1.0]]), torch.tensor([[1.0, 0.0]])]
    other = [torch.tensor([[0.0, 2.5], [0.0, 1.0]]), torch.tensor([[1.0, 0.0]])]
    base = [torch.zeros(2, 2), torch.zeros(1, 2)]
    found = compare(y, other, base)
    assert found["max_logit_difference"] == 3
    assert found["argmax_agreement"] == pytest.approx(2 / 3)
    assert found["error"] == pytest.approx((9.25 / 15) ** 0.5)
    assert compare(y, y, y)["error"] == 0  # nothing was changed, nothing is lost


MADE = [
    ["method=hira", "R=w0_trunc", "R_rank=3", "placement=[down,q]", "layers=1"],
    ["method=boft", "block_size=0", "block_num=2", "lr=1e-5", "betas=[0.8,0.99]", "model.dtype=bfloat16"],
    ["method=prompt_tuning", "start=text", "start_text='It\\'s 3, not \"4\": ok\\\\'", "num_virtual_tokens=2"],
    [
        "method=lora",
        "model=tiny_phi3",
        "architecture={blocks: model.layers, q: 'self_attn.qkv_proj[0:16]'}",
        "placement=q",
    ],
    ["method=lora", "protocol=hira", "protocol.stop=['\n\n','###']", "trainer.max_time='00:01:00:00'", "seed=3"],
]


@pytest.mark.parametrize("words", MADE, ids=range(len(MADE)))
def test_the_card_holds_the_command_that_makes_the_run(make_run, words):
    from highrank.interop.card import model_card

    folder, _ = make_run("model=tiny_llama", *words) if "tiny_phi3" not in str(words) else make_run(*words)
    run = read_run(folder)
    card = model_card(run, folder, "transformers", {"fidelity": "error 0"})
    command = card.split("```")[1].split("python run.py ")[1]
    assert compose_run(shlex.split(command)).hash == run.hash == read_results(folder)["config_hash"]
    for fact in (run.protocol.hash, "tiny_", "seed 0", run.method.name, "fidelity"):
        assert fact in card


def test_the_card_of_a_finished_run_has_data_and_scores(make_run, tmp_path):
    from highrank.interop.card import model_card

    folder, _ = make_run("model=tiny_llama", "method=lora")
    results = read_results(folder)
    results |= {
        "data": [{"name": "d/train", "sha256": "abc", "rows": 8}],
        "metrics": {"final": {"sets": {"wordmath": {"n": 3, "accuracy": 12.345}}}},
        "params": {"trainable": 1234, "total": 99999, "percent": 1.2},
        "steps": 2,
    }
    (folder / "results.json").write_text(json.dumps(results))
    card = model_card(read_run(folder), folder, "peft")
    assert "d/train, 8 rows, sha256 abc" in card
    assert "| wordmath | after training | n 3, accuracy 12.35 |" in card
    assert "1,234 of 99,999 (1.2000 %)" in card
    assert "W' = W + (alpha / r) B A" in card
