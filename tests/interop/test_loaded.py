"""Many adapters on one base: after any walk the base is as it was, and each adapter computes as freshly loaded."""

import json
import random

import pytest
import torch
from trained import logits, write_run

from highrank.base.errors import UserError
from highrank.cli import main
from highrank.data.encoding import Encoded
from highrank.interop.loaded import AdapterSwitch, evaluate_runs
from highrank.model.backbones import load_backbone
from highrank.train.saved import load_run, read_run

WALKS = {
    "tiny_llama": {
        "hira": ["method=hira", "r=2"],
        "dora": ["method=dora", "r=2", "placement=all"],
        "vera": ["method=vera", "r=3"],
        "other_vera": ["method=vera", "r=5", "placement=qv"],
        "prefix": ["method=prefix", "num_virtual_tokens=2"],
    },
    "tiny_gpt2": {
        "slices": ["method=hyperadapt", "placement=qv"],
        "whole": ["method=lora", "r=2", "placement=all"],
        "bitfit": ["method=bitfit"],
    },
    "tiny_bert": {
        "lora": ["method=lora", "r=2", "task=glue/mrpc", "placement=qv"],
        "hira": ["method=hira", "r=2", "task=glue/mrpc", "placement=fc"],
    },
}
NOT_MERGED = ("prefix",)


def backbone(model):
    kind = "classify" if model == "tiny_bert" else "generate"
    return load_backbone({"name": model, "dtype": "float32"}, None, kind).model


@pytest.mark.parametrize("model", WALKS)
def test_any_walk_leaves_base_and_adapters_as_they_were(tmp_path, model):
    runs, fresh, merged = {}, {}, {}
    for name, words in WALKS[model].items():
        runs[name], _ = write_run(tmp_path / name, f"model={model}", *words)
        _, own, adapters = load_run(runs[name])
        fresh[name] = logits(own.model)
        if name not in NOT_MERGED:
            adapters.merge()
            merged[name] = logits(own.model)
    base = backbone(model)
    pristine = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    modules = [(name, type(module)) for name, module in base.named_modules()]
    plain = logits(base)
    assert all((fresh[name] - plain).abs().max() > 1e-3 for name in runs)

    switch = AdapterSwitch(base)
    for name, run in runs.items():
        switch.load(name, run)
        assert torch.equal(logits(base), plain)  # loading lets nothing act
    rng = random.Random(0)
    seen = set()
    for step in range(120):
        name = rng.choice(list(runs))
        action = rng.choice(["use", "use", "disable", "merge", "merge", "unmerge", "save", "compare", "reload"])
        before = (switch.active, switch.merged)
        match action:
            case "use":
                switch.use(name)
            case "disable":
                switch.use(None)
            case "merge" | "unmerge":
                possible = switch.active is not None and switch.merged == (action == "unmerge")
                if possible and switch.active not in NOT_MERGED:
                    getattr(switch, action)()
                else:
                    with pytest.raises(UserError, match="merge: "):
                        getattr(switch, action)()
                    assert (switch.active, switch.merged) == before
            case "save":
                folder = switch.save(name, tmp_path / "saved")
                for file in ("adapter.json", "adapter.safetensors"):
                    assert (folder / file).read_bytes() == (runs[name] / "adapter" / file).read_bytes()
                assert (switch.active, switch.merged) == before
            case "compare":
                found = switch.compare(name, None, [Encoded([5, 6, 7, 8], [])])
                assert found["max_logit_difference"] > 1e-3
                assert switch.compare(name, name, [Encoded([5, 6, 7, 8], [])])["max_logit_difference"] == 0
                assert (switch.active, switch.merged) == before
            case "reload":
                switch.remove(name)
                switch.load(name, runs[name])
        seen.add((action, switch.merged))
        expected = plain if switch.active is None else (merged if switch.merged else fresh)[switch.active]
        assert torch.equal(logits(base), expected), (step, action)
    assert {("save", True), ("use", False), ("compare", True), ("merge", True), ("unmerge", False)} <= seen
    for name in merged:  # each saved while another is in the base's weights
        switch.use(name)
        switch.merge()
        for other, run in runs.items():
            file = switch.save(other, tmp_path / "saved") / "adapter.json"
            assert file.read_bytes() == (run / "adapter" / "adapter.json").read_bytes()
        assert torch.equal(logits(base), merged[name])
    switch.use(None)
    assert [(name, type(module)) for name, module in base.named_modules()] == modules
    assert base.state_dict().keys() == pristine.keys()
    assert all(torch.equal(tensor, pristine[name]) for name, tensor in base.state_dict().items())


def test_an_adapter_that_does_not_fit_leaves_no_trace(make_run, tmp_path):
    run, _ = make_run("model=tiny_llama", "method=lora", "r=2")
    base = backbone("tiny_llama")
    plain = logits(base)
    with torch.no_grad():
        base.model.layers[1].self_attn.q_proj.weight.add_(0.1)
    switch = AdapterSwitch(base)
    with pytest.raises(UserError, match=r"the probe must match"):
        switch.load("a", run)
    with pytest.raises(UserError, match="gpt2 has no part gate"):
        AdapterSwitch(backbone("tiny_gpt2")).load("a", make_run("model=tiny_llama", "placement=gate", name="b")[0])
    assert (switch.adapters, switch.active) == ({}, None)
    with torch.no_grad():
        base.model.layers[1].self_attn.q_proj.weight.copy_(
            backbone("tiny_llama").model.layers[1].self_attn.q_proj.weight
        )
    assert torch.equal(logits(base), plain)
    switch.load("a", run)
    with pytest.raises(UserError, match="given once, got 'a' again"):
        switch.load("a", run)
    for act in (switch.use, switch.remove, lambda name: switch.save(name, tmp_path / "x")):
        with pytest.raises(UserError, match=r"unknown name, got 'aa'"):
            act("aa")
    full, _ = make_run("model=tiny_llama", "method=full", name="full")
    with pytest.raises(UserError, match="full trains the base itself"):
        switch.load("full", full)


@pytest.fixture
def loads(monkeypatch):
    """Names of the models read, in order."""
    names = []

    def counted(spec, *args):
        names.append(spec["name"])
        return load_backbone(spec, *args)

    monkeypatch.setattr("highrank.train.build.load_backbone", counted)
    return names


def test_several_runs_share_their_base(make_run, loads):
    words = {
        "a": ["model=tiny_llama", "method=lora", "r=2"],
        "b": ["model=tiny_gpt2", "method=lora", "r=2"],
        "c": ["model=tiny_llama", "method=hira", "r=2"],
        "d": ["model=tiny_llama", "method=prompt_tuning"],
        "e": ["model=tiny_llama", "method=full"],
    }
    runs = [make_run(*own, name=name, scale=0.3)[0] for name, own in words.items()]
    loads.clear()
    found = evaluate_runs([*runs, runs[0]])
    assert sorted(loads) == ["tiny_gpt2", "tiny_llama", "tiny_llama"]  # full fine-tuning has one of its own
    assert set(found) == {str(run) for run in runs}
    for run in runs:
        assert evaluate_runs([run]) == {str(run): found[str(run)]}


def test_other_words_for_the_task(make_run, capsys, monkeypatch):
    run, _ = make_run("model=tiny_llama", "method=lora", "r=2")
    assert main(["eval", str(run), "task.n_test=2", "task.data_seed=7", "protocol.max_new_tokens=3"]) == 0
    found = json.loads("{" + capsys.readouterr().out.split("{", 1)[1])
    assert found["sets"]["wordmath"]["n"] == 2
    monkeypatch.setattr("highrank.train.build.load_backbone", None)
    for words, message in [
        (["r=4"], "a saved adapter is used as it was trained, got r=4"),
        (["model=tiny_gpt2"], "used as it was trained, got model=tiny_gpt2"),
        (["taks=gsm8k"], "did you mean 'task'"),
        (["task=gsm9k"], "unknown name, got task=gsm9k"),
        (["task=glue/mrpc"], "of the kind trained on, got task=glue (classify, 2 labels)"),
        (["--tasks", "x"], "--tasks belongs to --engine lm_eval"),
        (["--engine", "lm_eval"], "needs --tasks"),
    ]:
        assert main(["eval", str(run), *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["eval"]) == 2
    assert "eval: a folder is needed" in capsys.readouterr().err


def test_another_task_keeps_the_run_and_takes_the_protocol_of_its_family(make_run):
    folder, _ = make_run("model=tiny_llama", "method=lora", "r=3", "protocol=hira", "protocol.num_beams=1", "lr=0.01")
    trained, run = read_run(folder), read_run(folder, ["task=gsm8k", "task.n_test=5"])
    assert (run.task.name, run.task_cfg.n_test) == ("gsm8k", 5)
    assert (run.method_cfg, run.core.lr, run.model) == (trained.method_cfg, trained.core.lr, trained.model)
    assert run.protocol.name == "hira"
    assert run.protocol.num_beams == 1
    assert read_run(folder, ["protocol=clean"]).protocol.name == "clean"
    assert read_run(folder, ["task.n_test=1"]).task_cfg.n_train == trained.task_cfg.n_train


def test_leaks_are_counted_against_what_was_trained_on(make_run, monkeypatch):
    """Tested on another draw that happens to hold a question of the training set."""
    folder, _ = make_run("model=tiny_llama", "method=lora", "r=2")
    trained = read_run(folder)
    task = trained.make_task()
    known = task.train()[0]
    monkeypatch.setattr(type(task), "test", lambda self: {"wordmath": [known]})
    with pytest.warns(UserWarning, match=".*"):
        (found,) = evaluate_runs([folder], ["task.data_seed=11"]).values()
    assert found["sets"]["wordmath"]["leaked"] == 1
