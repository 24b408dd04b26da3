"""The untouched base is evaluated once, and never where its outputs could be others."""

import json
import shutil
from types import SimpleNamespace

import pytest

from highrank.cli import main
from highrank.config.words import compose_run
from highrank.data.batches import EvalData
from highrank.train import untouched
from highrank.train.build import build_model

WORDS = ["model=tiny_llama", "task.n_train=8", "task.n_test=3", "max_steps=1", "batch_size=2", "lr=1e-2"]
WORDS += ["placement=qv", "protocol.max_new_tokens=3"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache of every run here, without what others left in it."""
    monkeypatch.setattr(untouched, "cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "untouched"


@pytest.fixture
def ran(tmp_path, capsys):
    """Runs, and returns results, the predictions before training, and whether the base's outputs were there."""

    def run(*words):
        folder = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        assert main(["run", *WORDS, *words, f"run_dir={folder}"]) == 0
        said = "was evaluated before" in capsys.readouterr().out
        results = json.loads((folder / "results.json").read_text())
        assert said == ("untouched" in results)
        return results, [file.read_text() for file in sorted((folder / "predictions").glob("*.before.jsonl"))], said

    return run


def test_runs_of_any_method_and_seed_have_the_same_outputs_of_the_base(ran, cache):
    first, rows, known = ran("method=lora", "r=1")
    assert not known
    (file,) = cache.iterdir()
    for words in (["method=hira", "r=2"], ["method=hyperadapt", "seed=3"], ["method=layernorm"], ["method=full"]):
        results, others, known = ran(*words)
        assert known
        assert results["untouched"] == {"wordmath": file.stem}
        assert results["metrics"]["before"] == first["metrics"]["before"]
        assert others == rows
    assert [file] == list(cache.iterdir())


def test_a_method_that_starts_elsewhere_has_the_base_before_it_too(ran):
    """Virtual tokens that have not trained are not the base."""
    results = [ran("method=lora", "r=1"), ran("method=prompt_tuning", "num_virtual_tokens=2")]
    rows = [[json.loads(line) for line in predictions[0].splitlines()] for _, predictions, _ in results]
    assert [row["output"] for row in rows[0]] == [row["output"] for row in rows[1]]
    assert [row["nats"] for row in rows[0]] == pytest.approx([row["nats"] for row in rows[1]])


def hash_of(*words):
    """The hash of a run's base, without the run."""
    run = compose_run(["model=tiny_llama", "method=lora", "r=1", "task.n_test=3", "placement=all", *words])
    task = run.make_task()
    backbone, adapters = build_model(run, task)
    data = EvalData(task, run.protocol, backbone.tokenizer)
    about = {"name": run.model["name"], **vars(backbone.source)}
    return untouched.outputs_hash(run, SimpleNamespace(adapters=adapters), data, about, run.core.eval_batch_size)


def test_what_changes_an_output_changes_the_hash(monkeypatch):
    words = [
        "task.data_seed=1",
        "task.n_test=2",
        "protocol.max_new_tokens=4",
        "protocol.template='{instruction}'",
        "protocol.do_sample=true",
        "model.dtype=bfloat16",
        "model=tiny_gpt2",
        "eval_batch_size=2",
        "trainer.precision=bf16-mixed",
    ]
    hashes = [hash_of(), *map(hash_of, words), hash_of("protocol.do_sample=true", "seed=1")]
    monkeypatch.setattr(untouched, "versions", lambda: {"torch": "9"})
    hashes.append(hash_of())
    monkeypatch.setattr(untouched, "_code_hash", lambda: "other")
    hashes.append(hash_of())
    assert len(set(hashes)) == len(hashes)


def test_what_changes_no_output_does_not(monkeypatch):
    words = ["method=hira", "seed=1", "lr=1", "task.n_train=4", "protocol.mask_prompt=false", "r=3"]
    assert {hash_of(word) for word in words[:4]} | {hash_of(words[-1])} == {hash_of()}


def test_scores_and_leaks_are_taken_anew(ran):
    """They depend on the training examples, which may be others."""
    first, _, _ = ran("method=lora", "r=1")
    second, rows, known = ran("method=lora", "r=1", "task.n_train=4")
    assert known
    assert {"leaked"} <= json.loads(rows[0].splitlines()[0]).keys()
    assert second["metrics"]["before"]["loss"] == first["metrics"]["before"]["loss"]


def test_a_damaged_file_is_made_again_and_that_is_said(ran, cache, capsys, tmp_path):
    first, _, _ = ran("method=lora", "r=1")
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    for content in (b"", whole[:40], whole[:-1], whole.replace(b"nats", b"nuts", 1)):
        file.write_bytes(content)
        folder = tmp_path / "again"
        assert main(["run", *WORDS, "method=lora", "r=1", f"run_dir={folder}"]) == 0
        assert "is damaged; the base is evaluated again" in capsys.readouterr().out
        assert file.read_bytes() == whole
        assert json.loads((folder / "results.json").read_text())["metrics"]["before"] == first["metrics"]["before"]
        shutil.rmtree(folder)


def test_a_head_is_part_of_the_base(ran, cache, tmp_path, monkeypatch):
    folder = tmp_path / "RTE"
    folder.mkdir()
    for name in ("train", "dev"):
        rows = "".join(f"{i}\tIt rains.\tIt is {name} {i}.\tentailment\n" for i in range(4))
        (folder / f"{name}.tsv").write_text("index\tsentence1\tsentence2\tlabel\n" + rows)
    words = ["model=tiny_bert", "task=glue/rte", f"task.data={tmp_path}", "task.allow_partial=true", "placement=q"]
    first, predictions, known = ran("method=lora", "r=1", *words)
    assert not known
    results, others, known = ran("method=hyperadapt", *words)
    assert (known, others) == (True, predictions)
    assert results["metrics"]["before"] == first["metrics"]["before"]
    monkeypatch.setattr(untouched, "_tensor_hash", lambda tensor: "another head")
    assert not ran("method=lora", "r=1", *words)[2]
    assert len(list(cache.iterdir())) == 2


def test_what_a_run_goes_on_from_is_evaluated_as_it_is(ran, tmp_path):
    ran("method=lora", "r=1")
    results, _, known = ran("method=lora", "r=1", f"start_from={tmp_path / 'run0'}")
    assert not known
    first = json.loads((tmp_path / "run0" / "results.json").read_text())
    assert results["metrics"]["before"] == first["metrics"]["final"]


def test_a_cache_that_cannot_be_written_is_done_without(ran, tmp_path):
    (tmp_path / "cache").write_text("")
    for _ in range(2):
        assert not ran("method=lora", "r=1")[2]
