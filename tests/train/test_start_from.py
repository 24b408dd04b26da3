"""A run goes on from another one: from its adapter, or on its merged weights; nothing loads the result on another base."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from moved import move

import highrank
from highrank.base.errors import UserError
from highrank.cli import main
from highrank.config.start import content
from highrank.config.words import compose_run
from highrank.interop.combine import Recipe, combine_runs
from highrank.interop.hub_model import merge_run
from highrank.interop.loaded import AdapterSwitch, evaluate_runs
from highrank.interop.lora import export_lora
from highrank.interop.peft import export_run
from highrank.model import adapter_folder
from highrank.report.runs import read_runs
from highrank.train.build import build_model, load_plain
from highrank.train.module import FineTuner
from highrank.train.plan import make_plan
from highrank.train.results import RunDirectory
from highrank.train.saved import begin, load_run, read_run

pytestmark = pytest.mark.integration

SMALL = [
    "model=tiny_llama",
    "task.n_train=8",
    "task.n_test=2",
    "batch_size=2",
    "max_steps=3",
    "lr=0.05",
    "placement=qv",
]
WORDS = [*SMALL, "protocol.max_new_tokens=2", "analyze=false"]
AGAIN = [*WORDS, "task.data_seed=1"]
LORA, HIRA = ["method=lora", "r=2"], ["method=hira", "r=2"]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def train(folder, *words):
    assert main(["run", *words, f"run_dir={folder}"]) == 0
    return folder


def results(folder):
    return json.loads((folder / "results.json").read_text())


def refused(capsys, *words):
    assert main(["run", *words]) == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of LoRA, and one that has gone on from it in each way."""
    root = tmp_path_factory.mktemp("start")
    lora = train(root / "lora", *WORDS, *LORA)
    train(root / "adapter", *AGAIN, *LORA, f"start_from={lora}")
    train(root / "merged", *AGAIN, *HIRA, f"start_from={lora}")
    return root


def loss(folder, when):
    return results(folder)["metrics"][when]["loss"]


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def test_training_begins_where_the_other_run_ended(first, tmp_path):
    with_adapter = evaluate_runs([first / "lora"], ["task.data_seed=1"])[str(first / "lora")]["loss"]
    assert loss(first / "adapter", "before") == with_adapter
    assert loss(first / "merged", "before") == pytest.approx(with_adapter, abs=1e-6)
    for name in ("adapter", "merged"):
        assert abs(loss(first / name, "final") - with_adapter) > 1e-4


def test_the_rule_is_shown_and_recorded(first, capsys):
    source = results(first / "lora")
    for name, said in (
        ("adapter", "adapter of lora on wordmath"),
        ("merged", "merged weights (start_as=merged) of lora"),
    ):
        start = results(first / name)["start"]
        assert (start["as"], start["method"], start["run"]) == (name, "lora", str(first / "lora"))
        assert start["config_hash"] == source["config_hash"]
        assert start["adapter"] == adapter_folder.read_card(first / "lora" / "adapter")["sha256"]
        words = [*LORA, f"start_from={first / 'lora'}", f"start_as={name}", "dry_run=true"]
        assert main(["run", *AGAIN, *words, f"run_dir={first / 'plan'}"]) == 0
        assert said in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert json.loads((first / "plan" / "plan.json").read_text())["start"]["as"] == "merged"
    assert results(first / "merged")["start"]["update_lost"] < 1e-6


def test_the_hash_is_by_what_the_run_holds_and_not_by_its_place(first, tmp_path):
    def hash_of(source, *words):
        return compose_run([*AGAIN, *LORA, f"start_from={source}", *words]).hash

    copy = shutil.copytree(first / "lora", tmp_path / "copy")
    assert hash_of(copy) == hash_of(first / "lora") == results(first / "adapter")["config_hash"]
    assert hash_of(copy, "start_as=merged") != hash_of(copy)
    assert hash_of(first / "adapter") != hash_of(copy) != compose_run([*AGAIN, *LORA]).hash
    other = train(tmp_path / "other", *WORDS, *LORA, "seed=1")
    assert hash_of(other) != hash_of(copy)


def test_a_loaded_run_is_on_its_own_base(first, tmp_path):
    """The trained module, as the run evaluated it, against what every reader makes of the folder."""
    folder = first / "merged"
    _, backbone, adapters = load_run(folder)
    y = logits(backbone.model)
    assert torch.equal(logits(highrank.load(folder).model), y)
    lora = highrank.load(first / "lora")
    lora.adapters.merge()
    with adapters.disabled():
        assert torch.allclose(logits(backbone.model), logits(lora.model), atol=1e-6)
    assert evaluate_runs([folder])[str(folder)] == results(folder)["metrics"]["final"]
    both = evaluate_runs([first / "lora", folder, first / "adapter"])
    assert [found["loss"] for found in both.values()] == [loss(f, "final") for f in map(Path, both)]
    from transformers import AutoModelForCausalLM

    out = merge_run(folder, tmp_path / "model")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(out)), y, atol=1e-5)
    assert "merged weights of a run of lora on wordmath" in (out / "README.md").read_text()
    for part, write in {
        "export": [lambda out: export_run(folder, out), lambda out: export_lora(folder, out, 2)],
        "combine": [lambda out: combine_runs(Recipe("linear", [(str(folder), 1.0), (str(first / "lora"), 1.0)]), out)],
    }.items():
        for each in write:
            with pytest.raises(UserError, match=f"{part}: an adapter's base must be a model with a name"):
                each(tmp_path / "out")


def test_no_other_base_is_taken(first):
    run = read_run(first / "merged")
    plain = load_plain(run, run.make_task())
    for model in (plain.model, highrank.load(first / "lora").adapters.unload()):
        with pytest.raises(UserError, match="got the plain model for an adapter on the merged weights of a run"):
            AdapterSwitch(model, plain.tokenizer).load("a", first / "merged")
    with pytest.raises(UserError, match="got the plain model for an adapter on the merged weights of a run"):
        highrank.load_adapter(plain.model, first / "merged" / "adapter")
    base = load_run(first / "merged")[2].unload()
    with pytest.raises(UserError, match="got the merged weights of a run for an adapter on the plain model"):
        AdapterSwitch(base, plain.tokenizer, run.core.start_hash).load("a", first / "lora")
    with pytest.raises(AssertionError):
        build_model(run, run.make_task())


def test_a_chain_is_followed(first, tmp_path):
    third = train(tmp_path / "third", *WORDS, *LORA, f"start_from={first / 'merged'}", "start_as=merged")
    on_first = evaluate_runs([first / "merged"], ["task.data_seed=0"])[str(first / "merged")]["loss"]
    assert loss(third, "before") == pytest.approx(on_first, abs=1e-6)
    assert evaluate_runs([third])[str(third)] == results(third)["metrics"]["final"]
    fourth = train(tmp_path / "fourth", *AGAIN, *LORA, f"start_from={first / 'adapter'}")
    assert loss(fourth, "before") == loss(first / "adapter", "final")


@pytest.mark.parametrize("method", ["full", "bitfit", "hyperadapt", "layernorm", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kind_of_merged_weight(tmp_path, method, dtype):
    """Made without training, every value moved from its start."""
    model = "tiny_gpt2" if method == "bitfit" else "tiny_llama"
    words = [f"model={model}", f"model.dtype={dtype}", "task.n_train=4", "task.n_test=1", "placement=qv"]
    run = compose_run([*words, f"method={method}"])
    source = tmp_path / "source"
    backbone, adapters = build_model(run, run.make_task())
    move(adapters, 0.05, seed=0)
    directory = RunDirectory(run, source)
    directory.open()
    adapters.save(source / "adapter")
    directory.write(status="done", model={"name": model, **vars(backbone.source)})
    y = logits(backbone.model).float()
    after = compose_run([*words, "method=lora", "r=2", f"start_from={source}", "start_as=merged"])
    make_plan(after, after.make_task())
    started, new = begin(after, after.make_task())
    assert started.model.dtype == getattr(torch, dtype)
    assert torch.allclose(logits(started.model).float(), y, atol=1e-5 if dtype == "float32" else 0.05)
    assert [name for name, p in started.model.named_parameters() if p.requires_grad] == [
        name for name, p in started.model.named_parameters() if name.split(".")[-1] in ("A", "B")
    ]
    assert new.base_run == content(source)


def test_a_stopped_run_goes_on_exactly(first, tmp_path, monkeypatch):
    step, count = FineTuner.training_step, 0

    class Killed(BaseException):
        pass

    def training_step(self, batch, index):
        nonlocal count
        count += 1
        if count == 3:
            raise Killed
        return step(self, batch, index)

    for name, words in (("adapter", LORA), ("merged", HIRA)):
        folder, count = tmp_path / name, 0
        go = [*AGAIN, *words, f"start_from={first / 'lora'}", "checkpoint_every=1", f"run_dir={folder}"]
        with monkeypatch.context() as patch:
            patch.setattr(FineTuner, "training_step", training_step)
            with pytest.raises(Killed):
                main(["run", *go])
        assert main(["run", *go]) == 0
        assert len(results(folder)["resumed"]) == 1
        assert results(folder)["metrics"] == results(first / name)["metrics"]
        tensors, other = (adapter_folder.read(f / "adapter", words[0][7:])[1] for f in (folder, first / name))
        assert all(torch.equal(tensor, other[key]) for key, tensor in tensors.items())


def test_of_a_sweep_the_run_of_the_same_method_and_seed_is_taken(first, tmp_path, capsys):
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    for name in ("lora", "merged"):
        shutil.copytree(first / name, sweep / name)
    (sweep / "sweep.json").write_text(json.dumps({"cells": [{"run": "lora"}, {"run": "merged"}, {"run": "gone"}]}))
    run = compose_run([*AGAIN, *LORA, f"start_from={sweep}"])
    assert (run.core.start_from, run.core.start_as) == (str(sweep / "lora"), "adapter")
    assert run.hash == results(first / "adapter")["config_hash"]
    assert compose_run([*AGAIN, *HIRA, f"start_from={sweep}"]).core.start_from == str(sweep / "merged")
    for words in (["method=hyperadapt"], [*LORA, "seed=1"], ["method=lora", "r=3"]):
        assert "got 0 of 3" in refused(capsys, *AGAIN, *words, f"start_from={sweep}", "dry_run=true")


def test_what_cannot_be_is_refused_before_weights(first, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("highrank.train.build.load_backbone", None)
    lora = f"start_from={first / 'lora'}"

    def said(*words):
        return refused(capsys, *AGAIN, *words, f"run_dir={tmp_path / 'new'}")

    assert "the model must be the same, got model.name=tiny_gpt2" in said(*LORA, lora, "model=tiny_gpt2")
    assert "got method=hira start_as=adapter for a run of lora" in said(*HIRA, lora, "start_as=adapter")
    assert "got r=3 instead of 2, layers=1 instead of all" in said("method=lora", "r=3", "layers=1", lora)
    assert "got seed=1 instead of 0" in said(*LORA, lora, "seed=1")
    assert "start_as is adapter or merged, got start_as=both" in said(*LORA, lora, "start_as=both")
    assert "got start_as=merged without start_from" in said(*LORA, "start_as=merged")
    assert "start_from: a run directory holds config.yaml" in said(*LORA, f"start_from={tmp_path / 'none'}")
    assert "has itself started from merged weights" in said(*HIRA, f"start_from={first / 'merged'}")
    assert "cannot hold merged weights, got model.quantize=int8" in said(*HIRA, lora, "model.quantize=int8")
    assert f"must hold what start_hash says, got {content(first / 'lora')[:12]}" in said(*LORA, lora, "start_hash=ab")

    def damaged(name, change):
        copy = shutil.copytree(first / "lora", tmp_path / name)
        change(copy)
        return said(*LORA, f"start_from={copy}")

    def unfinished(folder):
        found = results(folder) | {"status": "interrupted", "steps": 1, "steps_planned": 3}
        (folder / "results.json").write_text(json.dumps(found))

    assert "got status=interrupted at step 1 of 3" in damaged("unfinished", unfinished)
    assert "results.json is damaged" in damaged("results", lambda f: (f / "results.json").write_text("{"))
    assert "missing or damaged" in damaged("weights", lambda f: (f / "adapter/adapter.safetensors").write_bytes(b"0"))
    assert "is damaged" in damaged("card", lambda f: (f / "adapter/adapter.json").write_text("{}"))
    assert "holds adapter/adapter.json" in damaged("no", lambda f: shutil.rmtree(f / "adapter"))
    config = "config.yaml must be the one trained with"
    assert config in damaged(
        "config", lambda f: (f / "config.yaml").write_text((f / "config.yaml").read_text() + "x: 1")
    )


def test_no_merged_weight(tmp_path, capsys):
    prompt = train(tmp_path / "prompt", *WORDS, "method=prompt_tuning", "num_virtual_tokens=2", "eval_test=false")
    text = refused(capsys, *AGAIN, *LORA, f"start_from={prompt}", f"run_dir={tmp_path / 'new'}")
    assert "start_from: prompt_tuning has no merged weight" in text
    words = ["method=prompt_tuning", "num_virtual_tokens=2", f"start_from={prompt}"]
    assert results(train(tmp_path / "on", *AGAIN, *words, "eval_test=false"))["start"]["as"] == "adapter"


def test_another_kind_of_task_is_refused(first, tmp_path, capsys):
    rows = tmp_path / "rows"
    (rows / "RTE").mkdir(parents=True)
    for split in ("train", "dev"):
        text = "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tentailment\n1\tA.\tC.\tnot_entailment\n"
        (rows / "RTE" / f"{split}.tsv").write_text(text)
    words = ["task=glue/rte", f"task.data={rows}", "task.allow_partial=true", "placement=qv", *LORA]
    said = refused(capsys, "model=tiny_llama", *words, f"start_from={first / 'lora'}", f"run_dir={tmp_path / 'new'}")
    assert "must be of the kind trained on, got glue (classify, 2 labels) after wordmath (generate)" in said


def test_a_run_whose_source_has_changed_or_moved(first, tmp_path):
    source, folder = (shutil.copytree(first / "lora", tmp_path / "source"), tmp_path / "run")
    train(folder, *AGAIN, *HIRA, f"start_from={source}")
    moved = source.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"start_from: a run directory holds config.yaml"):
        load_run(folder)
    expected = results(folder)["metrics"]["final"]
    assert evaluate_runs([folder], [f"start_from={moved}"])[str(folder)] == expected
    shutil.copytree(first / "adapter", source)
    with pytest.raises(UserError, match="the run must be the one started from"):
        load_run(folder)


def test_a_dry_run_does_without(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*AGAIN, *LORA, "start_from=none", f"run_dir={tmp_path / 'plan'}"]
    assert main(["run", *words, "dry_run=true"]) == 0
    out = capsys.readouterr().out
    assert "warning: the run to start from is not there yet, got start_from=none" in out
    assert os.listdir(tmp_path / "plan") == ["plan.json"]
    assert "start_from: a run directory holds" in refused(capsys, *words)


def test_runs_that_go_on_from_their_own_are_one_arm_over_seeds(first, tmp_path):
    sources = [first / "lora", train(tmp_path / "source", *WORDS, *LORA, "seed=1", "eval_test=false")]
    runs = [
        train(tmp_path / f"run{seed}", *AGAIN, *LORA, f"seed={seed}", f"start_from={source}", "max_steps=1")
        for seed, source in enumerate(sources)
    ]
    records, skipped = read_runs([*runs, first / "lora"])
    assert skipped == []
    assert {key for record in records for key in record.axes} == {"start_as", "max_steps", "task.data_seed", "seed"}
    assert records[0].arm == records[1].arm
