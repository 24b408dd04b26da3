"""Memory runs out: evaluation goes on in smaller batches, training says what to change or does it itself."""

import json

import pytest
import torch
from safetensors.torch import load_file

from highrank.cli import main
from highrank.module import FineTuner

WORDS = ["model=tiny_llama", "method=lora", "r=2", "task.n_train=24", "task.n_test=7", "batch_size=8", "epochs=2"]
ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: x"),
    "python": MemoryError(),
}


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture
def limit(monkeypatch):
    """Returns a function that lets a method of FineTuner refuse batches of more than `rows`; it returns their sizes."""

    def set_limit(name, rows, error="cpu"):
        real, seen = getattr(FineTuner, name), []

        def limited(self, batch, *more):
            size = len(batch["input_ids"])
            seen.append(size)
            if size > rows:
                raise ERRORS[error]
            return real(self, batch, *more)

        monkeypatch.setattr(FineTuner, name, limited)
        return seen

    return set_limit


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(["run", *WORDS, f"run_dir={folder}"]) == 0
    return folder


@pytest.mark.parametrize("error", ERRORS)
def test_evaluation_halves_its_batch_and_finds_the_same(tmp_path, limit, whole, error):
    seen = limit("predict_step", 2, error)
    folder = tmp_path / "run"
    assert main(["run", *WORDS, "eval_batch_size=7", f"run_dir={folder}"]) == 0
    assert seen == [7, 3, 1, 1, 1, 1, 1, 1, 1, *[1] * 7]
    assert results(folder)["metrics"] == results(whole)["metrics"]
    for name in ("wordmath", "wordmath.before"):
        file = f"predictions/{name}.jsonl"
        assert (folder / file).read_bytes() == (whole / file).read_bytes()


def test_evaluation_of_one_example_that_does_not_fit(tmp_path, limit, capsys):
    limit("predict_step", 0)
    assert main(["run", *WORDS, f"run_dir={tmp_path}"]) == 2
    assert "must fit into memory" in capsys.readouterr().err
    assert results(tmp_path)["status"] == "oom"


def test_training_says_what_to_change(tmp_path, limit, capsys):
    limit("loss", 4, "cuda")
    assert main(["run", *WORDS, f"run_dir={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert "run: a step must fit into memory, got OutOfMemoryError: CUDA out of memory." in err
    assert "with batch_size=8; halve batch_size and double accumulate" in err
    assert "checkpoint_activations=true or auto_microbatch=true" in err
    assert "Traceback" not in err
    found = results(tmp_path)
    assert found["status"] == "oom"
    assert "out of memory" in found["error"]


def test_auto_microbatch_takes_the_same_steps_in_smaller_parts(tmp_path, limit, whole, monkeypatch):
    seen = limit("loss", 3)
    folder, batches = tmp_path / "run", []
    step = FineTuner.training_step
    monkeypatch.setattr(
        FineTuner, "training_step", lambda self, b, i: (batches.append(len(b["labels"])), step(self, b, i))[1]
    )
    assert main(["run", *WORDS, "auto_microbatch=true", f"run_dir={folder}"]) == 0
    found = results(folder)
    assert (found["status"], found["parts"], found["steps"]) == ("done", 4, results(whole)["steps"])
    assert batches == [8] * 8  # two tries that failed at once, then every batch of the unbroken run, whole
    assert seen[:2] == [8, 4]
    assert set(seen[2:]) == {2}
    expected = load_file(whole / "adapter" / "adapter.safetensors")
    for name, tensor in load_file(folder / "adapter" / "adapter.safetensors").items():
        # The same sums in another order, and Adam divides each gradient by its own size: a share of lr * steps.
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-4)
    assert results(folder)["metrics"]["before"] == results(whole)["metrics"]["before"]


def test_memory_that_runs_out_later_costs_no_finished_step(tmp_path, limit, monkeypatch):
    """The run goes on from its last checkpoint, at the micro-batch size that fits; a later try starts with it."""
    folder, steps, fails = tmp_path / "run", [], [True]
    real = FineTuner.training_step

    def step(self, batch, index):
        steps.append((self.trainer.global_step, self.parts))
        if self.trainer.global_step == 4 and fails:
            fails.clear()
            raise ERRORS["cpu"]
        return real(self, batch, index)

    monkeypatch.setattr(FineTuner, "training_step", step)
    assert main(["run", *WORDS, "auto_microbatch=true", "checkpoint_every=3", f"run_dir={folder}"]) == 0
    assert steps == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (3, 2), (4, 2), (5, 2)]


def test_one_example_that_does_not_fit(tmp_path, limit, capsys):
    seen = limit("loss", 0)
    assert main(["run", *WORDS, "auto_microbatch=true", "eval_before=false", f"run_dir={tmp_path}"]) == 2
    assert seen == [8, 4, 2, 1]
    assert "must fit into memory" in capsys.readouterr().err
    assert results(tmp_path)["status"] == "oom"


def test_other_errors_are_not_taken_for_it(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(FineTuner, "loss", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        main(["run", *WORDS, "auto_microbatch=true", f"run_dir={tmp_path}"])
    assert results(tmp_path)["status"] == "failed"
