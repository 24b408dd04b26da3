"""Every model type that needs no map, against every check of experiments/robustness/model_types.py."""

import json

import model_types as robustness
import pytest
import torch
from moved import move
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from highrank.base.errors import UserError
from highrank.base.registry import load
from highrank.cli import main
from highrank.model.adapters import attach
from highrank.model.backbones import empty_model, load_backbone
from highrank.model.language import padding_moves
from highrank.model.placement import notes, resolve, weight_of
from highrank.model.tiny import tiny_tokenizer
from highrank.train.outputs import of_one_length

CASES = [(name, check) for name in robustness.TYPES for check in robustness.checks_of(name)]


@pytest.mark.parametrize(("name", "check"), CASES, ids=["-".join(case) for case in CASES])
def test_a_model_type_passes_a_check(name, check):
    robustness.CHECKS[check](name)


def test_there_are_at_least_sixty_model_types():
    assert len({name.partition("/")[0] for name in robustness.TYPES}) >= 60


@pytest.mark.parametrize(
    ("method", "trainable"),
    [("prompt_tuning", 20 * 32), ("prefix", 20 * 2 * 2 * 16), ("lora", 2 * 16 * (32 + 32 + 32 + 16))],
)
def test_the_plan_of_a_model_that_also_sees_is_that_of_its_language_model(run_cli, tmp_path, method, trainable):
    config = robustness.tiny("gemma3")
    config.save_pretrained(tmp_path)
    words = [f"method={method}", "dry_run=true", *(["placement=qv"] if method == "lora" else [])]
    status, _, err = run_cli("model=hf:org/sees", f"path={tmp_path}", f"run_dir={tmp_path / 'run'}", *words)
    assert status == 0, err
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["params"]["trainable"] == trainable


def test_a_model_that_also_sees_pads_with_its_tokenizers_token():
    model = robustness.built("gemma3/classes")
    assert robustness.tiny("gemma3/classes").text_config.pad_token_id == 3
    assert (model.config.pad_token_id, model.config.text_config.pad_token_id) == (0, 0)


# What a model does with its tokens


def folder(path, model):
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return {"name": "x", "dtype": "float32"}, str(path)


def test_a_model_that_sees_the_future_is_refused_when_it_loads(tmp_path):
    model = AutoModelForCausalLM.from_config(robustness.tiny("xlm-roberta"))
    spec = folder(tmp_path, model)
    with pytest.raises(UserError, match=r"causal language model, got one whose logits move by .*: xlm-roberta; try"):
        load_backbone(*spec)
    model.config.is_decoder = True
    load_backbone(*folder(tmp_path, AutoModelForCausalLM.from_config(model.config)))


def test_a_batch_is_cut_into_prompts_of_one_length():
    batch = {
        "input_ids": torch.tensor([[0, 0, 5], [6, 7, 8], [0, 0, 9]]),
        "attention_mask": torch.tensor([[0, 0, 1], [1, 1, 1], [0, 0, 1]]),
        "index": torch.tensor([3, 1, 2]),
        "owner": torch.tensor([0, 0, 1, 2]),
        **{name: torch.tensor([[10], [11], [12], [13]]) for name in ("tail_ids", "tail_mask", "tail_labels")},
    }
    short, long = of_one_length(batch)
    assert short["input_ids"].tolist() == [[5], [9]]
    assert long["input_ids"].tolist() == [[6, 7, 8]]
    assert all(part["attention_mask"].all() for part in (short, long))
    assert (short["index"].tolist(), long["index"].tolist()) == ([3, 2], [1])
    assert (short["owner"].tolist(), long["owner"].tolist()) == ([0, 0, 1], [0])
    assert (short["tail_ids"].tolist(), long["tail_ids"].tolist()) == ([[10], [11], [13]], [[12]])


@pytest.mark.parametrize(("name", "moves"), [("llama", False), ("opt", False), ("mpt", False), ("bart", True)])
def test_padding_that_moves_a_row_is_found(name, moves):
    assert padding_moves(robustness.built(name)) == moves


@pytest.mark.parametrize(
    ("name", "method", "said"),
    [
        ("gemma4_text", "prompt_tuning", r"^prompt_tuning: .*gemma4_text"),
        # by the argument for its cache, which transformers 5.24 has and 5.23 has not
        ("mamba", "prefix", r"^prefix: .*mamba|^model: a decoder takes its key-value cache as .*, got MambaModel"),
    ],
)
def test_a_model_that_takes_no_virtual_tokens_is_named(name, method, said):
    sizes = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 260}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **robustness.SIZES, **sizes))
    cls = load("methods", method)
    with pytest.raises(UserError, match=said):
        attach(model, [], cls, cls.config())


# Classes


def tiny(name):
    return AutoModelForCausalLM.from_config(robustness.tiny(name))


@pytest.mark.parametrize(
    ("name", "path", "kind"),
    [
        ("qwen3_moe", "mlp.gate", "Qwen3MoeTopKRouter"),
        ("mixtral", "mlp.gate", "MixtralTopKRouter"),
        ("gpt_oss", "mlp.router", "GptOssTopKRouter"),
        ("gpt_oss", "mlp.experts", "GptOssExperts"),
    ],
)
def test_a_weight_matrix_makes_no_linear_layer(name, path, kind):
    with pytest.raises(
        UserError, match=rf"is a linear layer \(Linear, Conv1D or a quantised one\), got .*{path}={kind}"
    ):
        resolve(tiny(name), "gate", architecture={"blocks": "model.layers", "gate": path})


def test_a_subclass_that_computes_something_else_is_no_linear_layer():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Renamed(nn.Linear):
        pass

    model = tiny("llama")
    model.model.layers[1].self_attn.q_proj = Renamed(32, 32)
    assert len(resolve(model, "q")) == 2
    model.model.layers[1].self_attn.q_proj = Doubled(32, 32)
    with pytest.raises(UserError, match=r"got model.layers.1.self_attn.q_proj=Doubled"):
        resolve(model, "q", architecture={"blocks": "layers", "q": "self_attn.q_proj"})


def test_experts_are_a_part_by_its_own_name():
    model = empty_model(robustness.tiny("mixtral"))
    with pytest.raises(
        UserError, match=r"mixtral has no part up, down, got placement=fc_qkv; it has: q, k, v, o, experts"
    ):
        resolve(model, "fc_qkv")
    assert {view.part for view in resolve(model, "all")} == {"q", "k", "v", "o"}
    views = resolve(model, ["q", "experts"], layers=1)
    assert [(view.path, view.rows, view.shape) for view in views[:3]] == [
        ("model.layers.1.self_attn.q_proj", None, (32, 32)),
        ("model.layers.1.mlp.experts.up.0", (48, 96), (48, 32)),
        ("model.layers.1.mlp.experts.down.0", None, (32, 48)),
    ]
    assert len(views) == 1 + 2 * 4
    (up, *_) = resolve(empty_model(robustness.tiny("gpt_oss")), "experts")
    assert (up.rows, up.shape) == ((1, 2, 2), (48, 32))  # gates and ups take turns
    with pytest.raises(UserError, match="llama has no part experts"):
        resolve(empty_model(robustness.tiny("llama")), "experts")


def test_a_run_adapts_experts_and_merges_them(tmp_path, run_cli):
    config = robustness.tiny("mixtral")
    config.max_position_embeddings = 1024
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    words = [
        "model=hf:org/mixtral",
        f"path={tmp_path / 'base'}",
        "model.dtype=float32",
        "placement=experts",
        "method=hira",
        "r=2",
    ]
    words += ["task.n_train=8", "task.n_test=2", "max_steps=2", "batch_size=2", "protocol.max_new_tokens=4"]
    status, out, err = run_cli(*words, f"run_dir={tmp_path / 'run'}")
    assert status == 0, err
    assert "experts × 16" in out
    plan = json.loads((tmp_path / "run" / "results.json").read_text())["params"]
    assert plan["trainable"] == 2 * 4 * 2 * (2 * (48 + 32))
    assert main(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0
    base, merged = (
        load_backbone({"name": "x", "dtype": "float32"}, str(tmp_path / f)).model for f in ("base", "merged")
    )
    after, before = dict(merged.named_parameters()), dict(base.named_parameters())
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(after[name], before[name])}
    assert after.keys() == before.keys()
    assert changed == {"gate_up_proj", "down_proj"}
    gate = after["model.layers.0.mlp.experts.gate_up_proj"][:, :48]
    assert torch.equal(gate, before["model.layers.0.mlp.experts.gate_up_proj"][:, :48])


# Blocks


def test_a_part_is_adapted_where_it_is():
    model = empty_model(AutoConfig.for_model("mimo_v2_flash"))
    views = resolve(model, ["q", "up"])
    assert [view.layer for view in views if view.part == "up"] == [0]
    assert notes(model.config, views) == ["up in 1 of 48 layers"]
    with pytest.raises(UserError, match=r"has no up in these layers, got layers=4-9; layers with it: 0$"):
        resolve(model, "up", layers="4-9")


def test_shared_layers_have_one_adapter_and_the_plan_says_so(run_cli, tmp_path):
    robustness.tiny("albert").save_pretrained(tmp_path)
    words = ["task=glue/sst2", "placement=qv", "dry_run=true", "method=lora"]
    status, out, err = run_cli("model=hf:org/albert", f"path={tmp_path}", *words)
    assert status == 0, err
    assert "q × 1, v × 1" in out
    assert "2 layers share the weights, and so the adapters, of 1" in out


@pytest.mark.parametrize(("name", "kind"), [("t5", "classify"), ("bart", "classify"), ("mt5", "regress")])
def test_encoder_and_decoder_in_one_only_write(name, kind):
    with pytest.raises(UserError, match=rf"an encoder and a decoder in one model .* {kind} task, got {name}"):
        empty_model(AutoConfig.for_model(name), kind)


# Rows head by head


@pytest.mark.parametrize(
    ("name", "blocks", "q", "message"),
    [
        ("gpt_neox", "layers", "attention.query_key_value[0:32]", r"head by head, got q=.*its q is .*\[0:8 of 24\]"),
        ("bloom", "h", "self_attention.query_key_value[0:32]", "head by head"),
        ("falcon", "h", "self_attention.query_key_value[0:8 of 24]", r"its q is .*\[0:16 of 32\]"),
        ("llama", "layers", "mlp.up_proj[0:12]", r"must not cut through a head, .*\[0:12\] with heads of 8 rows"),
        ("llama", "layers", "mlp.up_proj[0:8 of 20]", "must not cut through a head"),
    ],
)
def test_a_map_that_cuts_across_heads_is_refused(name, blocks, q, message):
    with pytest.raises(UserError, match=message):
        resolve(tiny(name), "q", architecture={"blocks": blocks, "q": q})


def test_a_map_may_give_rows_of_every_period():
    model = tiny("llama")
    (view,) = resolve(model, "up", 0, architecture={"blocks": "layers", "up": "mlp.up_proj[1:3 of 6]"})
    assert (view.rows, view.shape) == ((1, 3, 6), (16, 32))
    W = model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight_of(model.model.layers[0].mlp.up_proj, view.rows), W.view(8, 6, 32)[:, 1:3].flatten(0, 1))
    with pytest.raises(UserError, match=r"repeat after one period that divides 48, got 7"):
        resolve(model, "up", architecture={"blocks": "layers", "up": "mlp.up_proj[1:3 of 7]"})


@pytest.mark.parametrize("method", ["lora", "hira", "hyperadapt", "dora", "boft", "vera"])
@pytest.mark.parametrize("placement", ["q", "qv", "qkv"])
def test_head_by_head_rows_compute_what_merging_writes(method, placement):
    """A copy of the rows is kept: it follows the base when that changes."""
    model, cls = tiny("gpt_neox").eval(), load("methods", method)
    views = resolve(model, placement, fused="split")
    adapters = attach(model, views, cls, cls.config())
    move(adapters, 0.05, seed=0)
    ids = torch.tensor([[5, 6, 7, 8]])

    @torch.no_grad()
    def check():
        before = model(input_ids=ids).logits
        adapters.merge()
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-5)  # fp32 sums
        adapters.unmerge()
        assert torch.equal(model(input_ids=ids).logits, before)
        return before

    first = check()
    if method != "dora":  # whose magnitudes are those of the base it started from
        with torch.no_grad():
            adapters.layers[views[0].path].base.weight.mul_(1.5)
        assert not torch.equal(check(), first)
    model(input_ids=ids).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for _, p in adapters.named_parameters())


def test_a_layer_that_is_written_into_gives_a_copy_away_and_no_other_does():
    adapters = robustness.adapted("falcon", "hyperadapt")
    for _ in range(2):
        adapters.model(input_ids=torch.tensor([[5, 6, 7, 8]] * 8)).logits.square().sum().backward()
    overwritten = {path for path, layer in adapters.layers.items() if layer.overwritten}
    assert overwritten == {f"transformer.h.{layer}.mlp.dense_4h_to_h" for layer in (0, 1)}
