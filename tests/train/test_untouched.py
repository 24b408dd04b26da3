"""What the untouched model answers is computed once and then read again: the same to the bit, or computed anew."""

import json

import pytest
from near import results, saved

from highrank.cli import main
from highrank.model.backbones import load_backbone
from highrank.train import untouched

SMALL = ["task.n_train=8", "task.n_test=5", "batch_size=4", "max_steps=1", "placement=qv"]


def save_tiny(name, folder, **spec):
    tiny = load_backbone({"name": name, "dtype": "float32", **spec}, None)
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders with a model, and with the same numbers in other places."""
    folder = tmp_path_factory.mktemp("bases")
    save_tiny("tiny_llama", folder / "llama")
    save_tiny("tiny_llama", folder / "other", shuffled=True)
    return folder


@pytest.fixture
def run(tmp_path, bases, monkeypatch, capsys):
    """Returns a function that runs and returns the run directory and what was said; the cache is the test's own."""
    monkeypatch.setenv("HIGHRANK_CACHE", str(tmp_path / "cache"))

    def call(name, *words, base="llama", cache="cache"):
        monkeypatch.setenv("HIGHRANK_CACHE", str(tmp_path / cache))
        model = ["model=hf:someone/own", "model.dtype=float32", f"path={bases / base}"]
        assert main(["run", *model, *SMALL, f"run_dir={tmp_path / name}", *words]) == 0
        return tmp_path / name, " ".join(capsys.readouterr().out.split())

    return call


def kept(tmp_path):
    return sorted((tmp_path / "cache" / "untouched").glob("*"))


def check_before(folder, other):
    """Both runs say the same of the untouched model, in every digit."""
    assert results(folder)["metrics"]["before"] == results(other)["metrics"]["before"]
    names = [file.name for file in (folder / "predictions").glob("*.before.jsonl")]
    assert names
    for name in names:
        assert saved(folder / "predictions" / name) == saved(other / "predictions" / name)


def test_a_later_run_of_another_method_reads_what_the_first_one_found(run, tmp_path):
    first, said = run("first", "method=hira", "r=2")
    assert results(first)["base_reused"] == []
    assert "kept from an earlier run" not in said
    later, said = run("later", "method=lora", "r=4", "seed=3", "lr=0.1", "max_steps=2")
    assert results(later)["base_reused"] == ["wordmath"]
    assert "wordmath: the untouched model's answers are kept from an earlier run" in said
    alone, _ = run("alone", "method=lora", "r=4", "seed=3", "lr=0.1", "max_steps=2", cache="empty")
    assert results(alone)["base_reused"] == []
    check_before(first, later)
    check_before(alone, later)
    for key in ("steps", "tokens"):
        assert results(later)[key] == results(alone)[key]
    assert results(later)["metrics"]["final"] == results(alone)["metrics"]["final"]
    files = [folder / "adapter" / "adapter.safetensors" for folder in (later, alone)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(kept(tmp_path)) == 1


@pytest.mark.parametrize(
    ("words", "base"),
    [
        (["protocol=hyperadapt"], "llama"),
        (["protocol.max_new_tokens=3"], "llama"),
        (["task.n_test=4"], "llama"),
        (["eval_batch_size=2"], "llama"),
        (["model.dtype=bfloat16"], "llama"),
        ([], "other"),
    ],
    ids=str,
)
def test_another_question_model_or_way_of_computing_is_answered_anew(run, tmp_path, words, base):
    run("first", "method=lora")
    second, _ = run("second", "method=lora", *words, base=base)
    assert results(second)["base_reused"] == []
    assert len(kept(tmp_path)) == 2


def test_so_is_it_by_other_code(run, tmp_path, monkeypatch):
    run("first", "method=lora")
    monkeypatch.setattr(untouched, "_code", lambda: "another")
    assert results(run("second", "method=lora", "lr=0.1")[0])["base_reused"] == []


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-1], lambda b: b[:40] + bytes([b[40] ^ 1]) + b[41:]])
def test_a_damaged_file_is_made_again_and_that_is_said(run, tmp_path, damage):
    first, _ = run("first", "method=lora")
    (file,) = kept(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    second, said = run("second", "method=lora", "lr=0.1")
    assert "is damaged; what it held is made again" in said
    assert results(second)["base_reused"] == []
    assert file.read_bytes() == whole
    check_before(first, second)


def test_before_is_the_base_by_itself_whatever_the_method_starts_as(run):
    """Virtual tokens and a random start of HyperAdapt answer otherwise than the base from the first step on."""
    plain, _ = run("plain", "method=lora")
    for name, words in {
        "tokens": ["method=prompt_tuning"],
        "noise": ["method=hyperadapt", "init_std=0.5"],
        "full": ["method=full"],
    }.items():
        before = results(run(name, *words)[0])["metrics"]["before"]
        assert before["loss"] == pytest.approx(results(plain)["metrics"]["before"]["loss"], rel=1e-5)


def test_a_run_that_goes_on_from_an_adapter_begins_with_what_that_has_learned(run):
    first, _ = run("first", "method=lora", "max_steps=4", "lr=0.05")
    second, _ = run("second", "method=lora", f"start_from={first}", "start_as=adapter")
    merged, _ = run("merged", "method=hira", f"start_from={first}")
    again, _ = run("again", "method=lora", f"start_from={first}", "start_as=merged")
    assert results(second)["base_reused"] == results(merged)["base_reused"] == []
    assert results(again)["base_reused"] == ["wordmath"]
    learned = results(first)["metrics"]["final"]["loss"]
    for folder in (second, merged, again):
        assert results(folder)["metrics"]["before"]["loss"] == pytest.approx(learned, rel=1e-4)


def test_a_new_head_is_the_seeds_and_so_are_its_answers(run, tmp_path):
    (tmp_path / "RTE").mkdir()
    for split in ("train", "dev"):
        rows = [f"{i}\t{split} {i}\tb\t{'not_' if i % 2 else ''}entailment\n" for i in range(8)]
        (tmp_path / "RTE" / f"{split}.tsv").write_text("index\tsentence1\tsentence2\tlabel\n" + "".join(rows))
    words = ["task=glue/rte", f"task.data={tmp_path}", "task.allow_partial=true"]
    first, _ = run("first", *words, "method=lora")
    same, _ = run("same", *words, "method=hyperadapt")
    other, _ = run("other", *words, "method=lora", "seed=1")
    assert results(same)["base_reused"] == ["glue"]
    assert results(other)["base_reused"] == []
    check_before(first, same)


def test_options_that_were_ranked_come_back_by_their_numbers(run, tmp_path):
    for part in ("train", "test"):
        rows = [{"instruction": f"{part}: is {i} odd?", "output": "yes" if i % 2 else "no"} for i in range(6)]
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ["task=jsonl", *(f"task.{part}={tmp_path / part}.jsonl" for part in ("train", "test"))]
    words = [*task, "task.choices=[yes,no]", "protocol.choose=likelihood"]
    first, _ = run("first", *words, "method=lora")
    second, _ = run("second", *words, "method=hira")
    assert results(second)["base_reused"] == ["jsonl"]
    check_before(first, second)


def test_random_models_are_answered_anew(run_cli, tmp_path, monkeypatch):
    monkeypatch.setenv("HIGHRANK_CACHE", str(tmp_path / "cache"))
    for lr in (0.1, 0.2):
        assert run_cli("model=tiny_llama", "method=lora", *SMALL, f"lr={lr}")[0] == 0
    assert kept(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_done_without(run, tmp_path):
    (tmp_path / "file").write_text("")
    first, _ = run("first", "method=lora", cache="file")
    second, _ = run("second", "method=lora", "lr=0.1", cache="file")
    assert results(second)["base_reused"] == []
    check_before(first, second)
