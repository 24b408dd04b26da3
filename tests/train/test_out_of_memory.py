"""Memory runs out: evaluation goes on in smaller batches, training says what to change or does it itself."""

import json

import pytest
import torch
from near import near, saved
from safetensors.torch import load_file

from highrank.cli import main
from highrank.config.words import compose_run
from highrank.model.backbones import load_backbone
from highrank.train import build
from highrank.train import forgetting as forgetting_module
from highrank.train.build import build_model
from highrank.train.memory import DoesNotFit, halving
from highrank.train.module import FineTuner
from highrank.train.results import RunDirectory

pytestmark = pytest.mark.integration

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
    seen = limit("outputs", 2, error)
    folder = tmp_path / "run"
    assert main(["run", *WORDS, "eval_batch_size=7", f"run_dir={folder}"]) == 0
    assert seen == [7, 3, 1, 1, 1, 1, 1, 1, 1, *[1] * 7]
    assert results(folder)["metrics"] == near(results(whole)["metrics"])
    for name in ("wordmath", "wordmath.before"):
        file = f"predictions/{name}.jsonl"
        assert saved(folder / file) == near(saved(whole / file))


def test_evaluation_repeats_only_what_did_not_fit(tmp_path, limit, whole, monkeypatch):
    seen, real, sizes = limit("outputs", 9), FineTuner.outputs, [3, 1]

    def outputs(self, batch, index=0):
        found = real(self, batch, index)
        if len(found) > sizes[min(len(seen), 2) - 1]:
            raise ERRORS["cuda"]
        return found

    monkeypatch.setattr(FineTuner, "outputs", outputs)
    folder = tmp_path / "run"
    assert main(["run", *WORDS, "eval_batch_size=3", "eval_before=false", f"run_dir={folder}"]) == 0
    assert seen == [3, 3, 1, 1, 1, 1]  # the first three were done; the second batch failed, the third was not tried
    assert results(folder)["metrics"]["final"] == near(results(whole)["metrics"]["final"])
    file = "predictions/wordmath.jsonl"
    assert saved(folder / file) == near(saved(whole / file))


def test_the_test_loss_halves_its_batch_too(tmp_path, limit, whole):
    seen = limit("losses", 2)
    folder = tmp_path / "run"
    assert main(["run", *WORDS, "eval_batch_size=7", "eval_before=false", f"run_dir={folder}"]) == 0
    assert seen == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert results(folder)["metrics"]["final"] == near(results(whole)["metrics"]["final"])
    file = "predictions/wordmath.jsonl"
    assert saved(folder / file) == near(saved(whole / file))


def test_evaluation_of_one_example_that_does_not_fit(tmp_path, limit, capsys):
    limit("outputs", 0)
    assert main(["run", *WORDS, f"run_dir={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert "error: evaluation: a batch must fit into memory, got RuntimeError" in err
    assert "with eval_batch_size=1; use a device with more memory" in err
    assert results(tmp_path)["status"] == "oom"


HELD_OUT = [
    *("model=tiny_llama", "method=lora", "r=2", "task.n_train=24", "batch_size=2", "max_steps=4", "eval_test=false"),
    *("protocol.num_validation=5", "protocol.validate_every=2", "protocol.selection=best", "eval_batch_size=5"),
]


def test_validation_halves_its_batch_and_finds_the_same(tmp_path, limit):
    assert main(["run", *HELD_OUT, f"run_dir={tmp_path / 'whole'}"]) == 0
    seen = limit("loss", 2)
    assert main(["run", *HELD_OUT, f"run_dir={tmp_path / 'run'}"]) == 0
    assert seen == [
        2,
        2,
        5,
        2,
        2,
        1,
        2,
        2,
        2,
        2,
        1,
        2,
        2,
        1,
    ]  # two steps, a validation, two steps, a validation, the last
    expected, found = results(tmp_path / "whole"), results(tmp_path / "run")
    assert found["validation"]["loss"] == pytest.approx(expected["validation"]["loss"], rel=1e-6)
    assert [best["step"] for best in found["selected"]] == [best["step"] for best in expected["selected"]]
    one, other = (tmp_path / name / "adapter" / "adapter.safetensors" for name in ("whole", "run"))
    assert one.read_bytes() == other.read_bytes()


def test_validation_of_one_example_that_does_not_fit(tmp_path, monkeypatch, capsys):
    """Smaller parts of a training batch would not help it."""
    real, seen = FineTuner.loss, []

    def loss(self, batch):
        seen.append(len(batch["labels"]))
        if not torch.is_grad_enabled():
            raise ERRORS["cuda"]
        return real(self, batch)

    monkeypatch.setattr(FineTuner, "loss", loss)
    assert main(["run", *HELD_OUT, "auto_microbatch=true", f"run_dir={tmp_path}"]) == 2
    assert seen == [2, 2, 5, 2, 1]
    assert "with eval_batch_size=1; use a device with more memory" in capsys.readouterr().err
    assert (results(tmp_path)["status"], results(tmp_path).get("parts")) == ("oom", None)


def test_forgetting_halves_its_batch_and_finds_the_same(tmp_path, monkeypatch):
    file = tmp_path / "general.txt"
    file.write_text("The river is long.\nCats sleep most of the day.\nSo do dogs.\nIt rained.\nIt did not.")
    run = compose_run(WORDS)
    backbone, adapters = build_model(run, run.make_task())

    def measure():
        found = forgetting_module.forgetting(adapters, backbone.tokenizer, file, 5)
        return [found["adapted_loss"], found["base_loss"]]

    expected, real, seen, most = measure(), forgetting_module.language_model_loss, [], 2

    def limited(model, ids, *more):
        seen.append(len(ids))
        if len(ids) > most:
            raise ERRORS["python"]
        return real(model, ids, *more)

    monkeypatch.setattr(forgetting_module, "language_model_loss", limited)
    assert measure() == pytest.approx(expected, rel=1e-6)
    assert seen == [5, 2, 2, 1, 2, 2, 1]
    most = 0
    with pytest.raises(DoesNotFit, match="with eval_batch_size=1"):
        measure()


def test_a_sharded_model_halves_nothing(tmp_path, limit, monkeypatch, capsys):
    """Its other processes would wait for this one within their step."""

    def attempt(batch_size):
        raise ERRORS["cuda"]

    for module in ("memory", "module"):
        monkeypatch.setattr(f"highrank.train.{module}.is_sharded", lambda model: True)
    with pytest.raises(DoesNotFit, match="with eval_batch_size=8; use a smaller eval_batch_size"):
        halving(attempt, 8, torch.nn.Identity())
    seen = limit("outputs", 2)
    assert main(["run", *WORDS, "eval_batch_size=7", f"run_dir={tmp_path}"]) == 2
    assert seen == [7]
    assert "with eval_batch_size=7; use a smaller eval_batch_size" in capsys.readouterr().err
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
    loaded, load = [], load_backbone
    monkeypatch.setattr(build, "load_backbone", lambda *given: (loaded.append(1), load(*given))[1])
    assert main(["run", *WORDS, "auto_microbatch=true", f"run_dir={folder}"]) == 0
    assert len(loaded) == 1  # one model serves every try
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


def test_a_try_that_failed_leaves_nothing_behind(tmp_path, limit, monkeypatch):
    """Memory may run out when gradients, random numbers and a batch are used up already."""
    words = [*WORDS, "dropout=0.1", "accumulate=2", "eval_test=false", "auto_microbatch=true"]
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "kept", lambda *_: {"parts": 2})
        assert main(["run", *words, f"run_dir={tmp_path / 'whole'}"]) == 0
    real, fails = FineTuner.on_before_optimizer_step, [True]

    def on_before_optimizer_step(self, optimizer):
        if fails.pop() if fails else False:
            raise ERRORS["cuda"]
        real(self, optimizer)

    monkeypatch.setattr(FineTuner, "on_before_optimizer_step", on_before_optimizer_step)
    assert main(["run", *words, f"run_dir={tmp_path / 'run'}"]) == 0
    expected, found = results(tmp_path / "whole"), results(tmp_path / "run")
    assert (found["parts"], found["steps"], found["tokens"]) == (2, expected["steps"], expected["tokens"])
    one, other = (tmp_path / name / "adapter" / "adapter.safetensors" for name in ("whole", "run"))
    assert one.read_bytes() == other.read_bytes()


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
