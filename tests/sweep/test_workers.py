"""A worker of a sweep: what its runs share is loaded once, and every run is the one that it would be by itself."""

import csv
import gzip
import json
from pathlib import Path

import pytest

from highrank.base.errors import UserError
from highrank.base.files import sha256
from highrank.cli import main
from highrank.config.words import compose_run
from highrank.model.backbones import load_backbone
from highrank.sweep.jobs import Job, together
from highrank.sweep.launch import Local
from highrank.train.ready import load_shared, shared_by

SMALL = ["task.n_train=8", "task.n_test=2", "max_steps=2", "batch_size=2", "lr=0.05", "protocol.max_new_tokens=2"]
WRITES = ["model=tiny_llama", "task=wordmath", *SMALL]


@pytest.fixture
def classes(tmp_path):
    """Returns words for a task of classes, whose model gets a new head that the seed draws."""
    folder = tmp_path / "glue" / "RTE"
    folder.mkdir(parents=True)
    for split in ("train", "dev"):
        with gzip.open(folder / f"{split}.tsv.gz", "wt") as file:
            writer = csv.writer(file, delimiter="\t", lineterminator="\n")
            writer.writerow(["index", "sentence1", "sentence2", "label"])
            writer.writerows(
                [i, f"{split} {i}", f"{split} {i % 3}", ["entailment", "not_entailment"][i % 2]] for i in range(6)
            )
    return [
        "model=tiny_bert",
        "task=glue/rte",
        f"task.data={tmp_path / 'glue'}",
        "task.allow_partial=true",
        *SMALL[2:5],
    ]


def execute(folder, *runs, shared=True):
    """Executes runs in one worker, or each with nothing shared; returns the run directories."""
    jobs = []
    for words in runs:
        run = compose_run(words)
        name = f"{len(jobs)}"
        job = Job(
            words, str(folder / name), str(folder / f"{name}.txt"), run.hash, main, shared_by(run) if shared else None
        )
        jobs.append(job)
    notes = [note for _, note in Local(1).run(jobs)]
    assert notes == ["exit status 0"] * len(jobs), [Path(job.log).read_text() for job in jobs]
    return [Path(job.run_dir) for job in jobs]


def outcome(run):
    """Returns everything that a run says of its numbers."""
    results = json.loads((run / "results.json").read_text())
    said = {
        key: results[key]
        for key in ("metrics", "model", "data", "params", "steps", "tokens", "protocol", "config_hash")
    }
    weights = [sha256(file) for file in sorted(run.glob("adapter/*.safetensors"))]
    predictions = {file.name: file.read_text() for file in sorted(run.glob("predictions/*"))}
    assert weights
    assert predictions
    return said, weights, predictions


def test_runs_of_a_worker_are_bitwise_those_of_processes_of_their_own(tmp_path, classes):
    """Several methods one after another on one model: text, virtual tokens with fewer positions, whole weights, a new head."""
    methods = [["method=lora", "r=2"], ["method=prompt_tuning"], ["method=full"], ["method=hira", "r=2"]]
    runs = [(*WRITES, *method) for method in methods]
    runs += [(*classes, "method=lora", "r=2"), (*classes, "method=full"), (*classes, "method=lora", "r=2", "seed=1")]
    warm = execute(tmp_path / "warm", *runs)
    cold = execute(tmp_path / "cold", *runs, shared=False)
    for one, other in zip(warm, cold, strict=True):
        assert outcome(one) == outcome(other)


def test_a_model_that_changes_under_a_sweep_is_loaded_again_and_said(tmp_path, capsys):
    backbone = load_backbone({"name": "tiny_llama", "dtype": "float32"}, None)
    base = tmp_path / "base"
    backbone.model.save_pretrained(base)
    backbone.tokenizer.save_pretrained(base)
    run = compose_run([*WRITES[1:], "model=hf:own", f"path={base}", "model.dtype=float32", "method=lora"])
    ready = load_shared(run)
    assert ready.base() is ready.backbone
    assert ready.tokens(ready.backbone, ready.protocol) is ready.encoded
    backbone.model.get_input_embeddings().weight.data += 1
    backbone.model.save_pretrained(base)
    capsys.readouterr()
    assert ready.base() is None
    assert "a file of the model changed since the sweep loaded it" in capsys.readouterr().out
    again = load_shared(run)
    assert again.backbone.source.sha != ready.backbone.source.sha
    assert ready.tokens(again.backbone, ready.protocol) is None


SAME = [["method=hira"], ["lr=0.1"], ["r=3"], ["max_steps=9"], ["general_text=rows.txt"]]
OTHER = [["seed=1"], ["model.dtype=bfloat16"], ["task.n_train=9"], ["protocol.max_length=64"], ["model=tiny_gpt2"]]


def test_what_runs_share(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.txt").write_text("a text\n")
    asked = shared_by(compose_run(WRITES))
    assert {shared_by(compose_run([*WRITES, *words])) for words in SAME} == {asked}
    others = {shared_by(compose_run([*WRITES, *words])) for words in OTHER}
    assert len(others | {asked}) == len(OTHER) + 1
    alone = [["trainer.devices=2"], ["trainer.accelerator=gpu"]]
    assert {shared_by(compose_run([*WRITES, *words])) for words in alone} == {None}


def test_what_cannot_be_loaded_is_each_runs_own_error(tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "llama"}')
    run = compose_run(words := ["model=hf:own", f"path={broken}", *WRITES[1:]])
    with pytest.raises(UserError, match="weights are read from safetensors only"):
        load_shared(run)
    job = Job(tuple(words), str(tmp_path / "run"), str(tmp_path / "log.txt"), run.hash, main, shared_by(run))
    assert [note for _, note in Local(1).run([job])] == ["exit status 2"]
    assert Path(job.log).read_text().count("weights are read from safetensors only") == 1


def test_runs_that_share_stand_next_to_each_other():
    jobs = [Job((), str(place), "", "", main, shared) for place, shared in enumerate("abacab")]
    assert [job.run_dir for job in together(jobs)] == ["0", "2", "4", "1", "5", "3"]
