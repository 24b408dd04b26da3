"""LoRA folders of any method's update: what PEFT computes with them, what servers ask of them, and what is told of the rest."""

import json
from types import SimpleNamespace

import pytest
import torch
from lora_rules import broken_by
from moved import move
from trained import logits

import highrank
from highrank.base.errors import UserError
from highrank.base.registry import load
from highrank.cli import main
from highrank.interop.hub_model import MOST_ERROR, some_texts
from highrank.interop.hub_model import logits as logits_of
from highrank.interop.lora import LoRA, check_holds, export_lora
from highrank.interop.peft import import_adapter
from highrank.model.backbones import load_backbone
from highrank.model.placement import EXPERTS
from highrank.train.saved import load_run

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised inside PEFT

EXACT = {
    "lora": (2, "lora", {"r": 2}),
    "lora_above_its_rank": (6, "lora", {"r": 2, "placement": "qv"}),
    "above_the_rank_of_a_weight": (12, "lora", {"r": 2, "placement": "qv"}),
    "lora_pissa": (4, "lora", {"r": 2, "init": "pissa", "placement": "all"}),
    "abba": (4, "abba", {"r1": 2, "r2": 2, "placement": "up"}),
    "loha": (4, "loha", {"r": 2, "placement": ["k", "gate"]}),
    "gralora": (4, "gralora", {"r": 2, "K": 2, "placement": "all"}),
    "lora_xs": (3, "lora_xs", {"r": 3, "placement": "o"}),
    "vera": (4, "vera", {"r": 4, "placement": "o"}),
    "delora": (4, "delora", {"r": 2, "placement": "up"}),
    "lokr": (4, "lokr", {"r": 1, "placement": "up"}),
    "hira_truncated": (6, "hira", {"r": 2, "R": "w0_trunc", "R_rank": 3, "placement": "up"}),
    "miss": (3, "miss", {"r": 3, "placement": "down"}),
    "some_layers": (2, "lora", {"r": 2, "layers": 1}),
    "fused_slices": (4, "lora", {"r": 2, "placement": ["q", "v", "up"], "model": "tiny_phi3"}),
    "transposed": (2, "lora", {"r": 2, "placement": "all", "model": "tiny_gpt2"}),
    "biases": (2, "lora", {"r": 2, "placement": "qkvo", "model": "tiny_qwen2"}),
}


def base(model="tiny_llama"):
    return load_backbone({"name": model, "dtype": "float32"}, None).model


def moved(method, model="tiny_llama", **fields):
    """Returns adapters with every tensor moved from its start, on a model that computes with them."""
    adapters = highrank.attach(base(model), method, **fields)
    move(adapters, 0.05, seed=5)
    return adapters


def in_peft(folder, model="tiny_llama"):
    return peft.PeftModel.from_pretrained(base(model), folder).eval()


def fidelity(folder):
    return json.loads((folder / "fidelity.json").read_text())


@pytest.mark.parametrize("case", EXACT)
def test_an_update_of_low_rank_is_exact(tmp_path, case):
    rank, method, fields = EXACT[case]
    model = fields.get("model", "tiny_llama")
    adapters = moved(method, **fields)
    ours = logits(adapters.model)
    assert (ours - logits(base(model))).abs().max() > 1e-5
    lora = LoRA.of(adapters, rank)
    found = lora.fidelity("export", {"error": 0.0, "max_logit_difference": 0.0, "argmax_agreement": 1.0}, accept=False)
    assert found["exact"]
    assert found["relative_error"] < 1e-6
    with adapters.disabled(), lora.acting(adapters.model):
        torch.testing.assert_close(logits(adapters.model), ours, rtol=0, atol=1e-6)
    lora.write("export", tmp_path / "lora", {"base_model_name_or_path": model}, found, "")
    torch.testing.assert_close(logits(in_peft(tmp_path / "lora", model)), ours, rtol=0, atol=1e-6)
    if case != "transposed":  # no server of the two takes GPT-2's Conv1D
        assert broken_by(tmp_path / "lora", base(model)) == []


def test_the_rules_refuse_what_servers_refuse(make_run, tmp_path):
    """A folder as `--format peft` writes it breaks them where the method, or what is adapted, is not for servers."""
    from highrank.interop.peft import export_run

    dora, _ = make_run("model=tiny_llama", "method=dora", "r=2", "placement=up")
    broken = broken_by(export_run(dora, tmp_path / "peft"), base())
    for rule in ("use_dora", "lora_alpha is no whole", "lora_magnitude_vector is no", "lacks {'gate_proj'}"):
        assert any(rule in line for line in broken), rule


APPROXIMATE = {
    "hira": {"r": 2, "placement": "all"},
    "hyperadapt": {"placement": "fc_qkv"},
    "dora": {"r": 2, "placement": "qkvo"},
    "boft": {"placement": "qv"},
}


@pytest.mark.parametrize("method", APPROXIMATE)
def test_which_rank_misses_what_is_a_curve_over_all_weights(method):
    """Longhand, from the singular values of every weight."""
    adapters = moved(method, **APPROXIMATE[method])
    lora = LoRA.of(adapters, 4)
    found = lora.fidelity("export", {"error": 1.0, "argmax_agreement": 0.5}, accept=True)
    values = [torch.linalg.svdvals(adapters.delta_weight(view).double()).square() for view in adapters.views]
    whole = sum(float(squares.sum()) for squares in values)
    curve = {rank: (sum(float(s[rank:].sum()) for s in values) / whole) ** 0.5 for rank in range(1, 17)}
    assert found["curve"] == pytest.approx({rank: curve[rank] for rank in (1, 2, 4, 8, 16)}, abs=1e-6)
    assert found["relative_error"] == pytest.approx(curve[4], rel=1e-5)
    assert found["reached"] == {
        str(error): min(rank for rank, missed in curve.items() if missed <= error)
        for error in (0.5, 0.2, 0.1, 0.05, 0.01)
    }
    assert not found["exact"]


def test_what_the_logits_lose_is_told(make_run, tmp_path):
    """Longhand: the logits of PEFT on the run's own prompts."""
    run, _ = make_run("model=tiny_llama", "method=hira", "r=2", "placement=all")
    out = export_lora(run, tmp_path / "lora", 4, accept=True)
    found = fidelity(out)
    parsed, backbone, adapters = load_run(run)
    texts = some_texts(parsed, backbone)
    assert found["texts"] == len(texts) == 3
    y, again = (torch.cat(logits_of(model.eval(), texts)) for model in (backbone.model, in_peft(out)))
    with adapters.disabled():
        y0 = torch.cat(logits_of(backbone.model, texts))
    assert found["error"] == pytest.approx(float((again - y).norm() / (y - y0).norm()), rel=1e-2)
    assert found["max_logit_difference"] == pytest.approx(float((again - y).abs().max()), rel=1e-2)
    assert found["rank"] == 4
    assert f"| 4 | {found['curve']['4']:.3g} |" in (out / "README.md").read_text()
    assert broken_by(out, base()) == []


def test_a_lora_that_loses_the_update_is_refused_or_accepted(make_run, tmp_path, capsys):
    run, _ = make_run("model=tiny_llama", "method=hira", "r=2", "placement=all")
    words = ["export", str(run), "--format", "lora", "--rank", "2", "--out", str(tmp_path / "lora")]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "a LoRA of rank 2 must keep what training changed, got error=" in error
    assert "rank 4 misses" in error
    assert "16 misses 0" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["trained"]  # nothing half-written
    assert main([*words, "--accept"]) == 0
    assert capsys.readouterr().out.split()[-1] == str(tmp_path / "lora")
    assert fidelity(tmp_path / "lora")["error"] > MOST_ERROR


def test_zeros_stand_beside_what_servers_stack():
    adapters = moved("lora", r=2, placement=["k", "up"], layers=0)
    lora = LoRA.of(adapters, 2)
    beside = [f"model.layers.0.{name}" for name in ("mlp.gate_proj", "self_attn.q_proj", "self_attn.v_proj")]
    assert sorted(lora.pairs.keys() - lora.made) == beside
    assert not any(factor.any() for path in beside for factor in lora.pairs[path])
    assert lora.config["target_modules"] == ["gate_proj", "k_proj", "q_proj", "up_proj", "v_proj"]
    assert lora.config["layers_to_transform"] == [0]
    assert (lora.config["r"], lora.config["lora_alpha"]) == (2, 2)


def test_a_lora_is_read_back(make_run, tmp_path):
    run, model = make_run("model=tiny_llama", "method=abba", "r1=2", "r2=2")
    out = export_lora(run, tmp_path / "lora", 4)
    back = import_adapter(out, tmp_path / "back", ["model=tiny_llama"])
    torch.testing.assert_close(logits(load_run(back)[1].model.eval()), logits(model), rtol=0, atol=1e-6)


def test_full_fine_tuning_says_what_is_left_out(capsys):
    """The layers are exact at full rank; the logits tell the rest."""
    adapters = moved("full")
    ours = logits(adapters.model)
    lora = LoRA.of(adapters, 16)
    with adapters.disabled(), lora.acting(adapters.model):
        assert (logits(adapters.model) - ours).abs().max() > 1e-2
    found = lora.fidelity("export", {"error": 1.0, "argmax_agreement": 0.5}, accept=True)
    assert "export: a LoRA holds no model.embed_tokens.weight, one of 7 parameters" in capsys.readouterr().out
    assert found["relative_error"] < 1e-6
    assert "lm_head.weight" in found["left_out"]
    with pytest.raises(UserError, match=r"a LoRA of rank 16 must keep what training changed, got error=1.00"):
        lora.fidelity("export", {"error": 1.0, "argmax_agreement": 0.5}, accept=False)


def test_merged_is_merge(make_run, tmp_path, capsys):
    run, _ = make_run("model=tiny_llama", "method=hira", "r=2")
    for out, words in (("a", ["merge"]), ("b", ["export", "--format", "merged"])):
        assert main([*words, str(run), "--out", str(tmp_path / out), "--dtype", "bfloat16", "--accept"]) == 0
    for file in ("model.safetensors", "fidelity.json", "config.json", "README.md"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


WORDS = {
    "no rank": (["--format", "lora"], "--format lora needs --rank, got none"),
    "rank that is no number": (["--format", "lora", "--rank", "two"], "invalid int value: 'two'"),
    "rank of a merge": (["--format", "merged", "--rank", "2"], "--rank belongs to --format lora, got --format merged"),
    "dtype of a lora": (["--format", "lora", "--rank", "2", "--dtype", "x"], "--dtype belongs to --format merged"),
    "accept of peft": (["--format", "peft", "--accept"], "--accept belongs to --format lora or merged"),
    "no format": ([], "the following arguments are required: --format"),
}


@pytest.mark.parametrize("case", WORDS)
def test_words_that_do_not_fit_are_refused(tmp_path, capsys, case):
    words, message = WORDS[case]
    assert main(["export", "run", "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err


NOT_HELD = {
    "layernorm": ("generate", "has none \\(LayerNorm tuning: train the weights and biases of the norms.*merge writes"),
    "bitfit": ("generate", r"has none \(BitFit.*bias.*highrank merge writes the changed model"),
    "prompt_tuning": ("generate", "has none .*in front of every sequence.*--format peft writes it for PEFT"),
    "bottleneck": ("generate", "has none .*keep the run, no other program computes it"),
    "compacter": ("generate", "has none .*keep the run, no other program computes it"),
    "lora": (
        "classify",
        "a language model's ΔW alone is written, got task=its_task in RUN with a classifier's new head",
    ),
}


@pytest.mark.parametrize("method", NOT_HELD)
def test_what_a_lora_cannot_hold_is_named(method):
    kind, message = NOT_HELD[method]
    task = SimpleNamespace(kind=kind, name="its_task")
    run = SimpleNamespace(method=load("methods", method), make_task=lambda: task, core=SimpleNamespace(start_as=None))
    with pytest.raises(UserError, match=message):
        check_holds("export", run, "RUN")


def test_a_rank_that_a_weight_cannot_have_is_refused_before_weights_load(make_run, tmp_path, monkeypatch):
    run, _ = make_run("model=tiny_llama", "method=lora")
    monkeypatch.setattr("highrank.train.saved.build_model", None)
    for rank in (0, -1, 17):
        with pytest.raises(
            UserError, match=rf"--rank must be from 1 to 16, .*, got --rank {rank} for .*q_proj of \(16, 16\)"
        ):
            export_lora(run, tmp_path / "out", rank)
    monkeypatch.setattr(
        "highrank.interop.lora.adapted_views", lambda run, model: [SimpleNamespace(path="e.up.0", part=EXPERTS)]
    )
    with pytest.raises(UserError, match=r"adapts linear layers, got the expert e.up.0"):
        export_lora(run, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


def test_what_is_no_finished_run_is_refused(make_run, tmp_path):
    with pytest.raises(UserError, match=r"a run directory holds config.yaml"):
        export_lora(tmp_path, tmp_path / "out", 2)
    run, _ = make_run("model=tiny_llama", "method=lora")
    results = json.loads((run / "results.json").read_text())
    going = results | {"status": "running", "steps": 1, "steps_planned": 4}
    (run / "results.json").write_text(json.dumps(going))
    with pytest.raises(UserError, match="used when its training is over, got status=running at step 1 of 4"):
        export_lora(run, tmp_path / "out", 2)
    (run / "results.json").write_text(json.dumps(results))
    (run / "adapter" / "adapter.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="adapter"):
        export_lora(run, tmp_path / "out", 2)


def test_an_update_of_nothing_is_refused():
    lora = LoRA.of(highrank.attach(base(), "lora", r=2), 2)
    with pytest.raises(UserError, match=r"export: there must be an update, got ΔW = 0 in all 10 weights"):
        lora.fidelity("export", {"error": 0.0}, accept=True)


def test_an_update_that_is_not_finite_is_refused():
    with pytest.raises(UserError, match=r"ΔW must be finite, got NaN or inf in a.b"):
        LoRA(1).add("a.b", torch.tensor([[1.0, float("nan")]]))
