"""A run that was stopped goes on as if it had not been: same batches, same numbers, bit for bit."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from highrank import run as run_module
from highrank.cli import main
from highrank.train import checkpoint
from highrank.train.checkpoint import read
from highrank.train.module import FineTuner
from highrank.train.stopping import StopOnSignal

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "experiments" / "reliability"


class Killed(BaseException):
    """Nothing in the program catches it: what is on disk is all that is left, as after SIGKILL."""


@pytest.fixture
def reliability(monkeypatch):
    """The scripts of experiments/reliability, importable."""
    monkeypatch.syspath_prepend(SCRIPTS)
    yield
    for file in SCRIPTS.glob("*.py"):
        sys.modules.pop(file.stem, None)


@pytest.fixture
def words(reliability):
    from recorded import WORDS

    return [*WORDS, "epochs=2", "checkpoint_every=2"]


@pytest.fixture(autouse=True)
def quiet_steps(monkeypatch):
    """Every test ends with the training step that it began with."""
    monkeypatch.setattr(FineTuner, "training_step", FineTuner.training_step)


@pytest.fixture
def try_run(monkeypatch, words):
    """Returns a function that runs words in `folder`, each micro-batch recorded: the exit status, or None if killed."""
    from recorded import record

    def call(folder, *more, kill_at=None, hook=None):
        step, count = FineTuner.training_step, 0

        def training_step(self, batch, index):
            nonlocal count
            count += 1
            if hook is not None:
                hook(count)
            loss = step(self, batch, index)
            if count == kill_at:
                raise Killed
            return loss

        with monkeypatch.context() as patch:
            patch.setattr(FineTuner, "training_step", training_step)
            record(Path(f"{folder}.batches"))
            try:
                return main(["run", *words, f"run_dir={folder}", *more])
            except Killed:
                return None

    return call


@pytest.fixture
def compare(reliability):
    from kill import differences

    return differences


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same run, undisturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    sys.path.insert(0, str(SCRIPTS))
    with pytest.MonkeyPatch.context() as patch:
        import recorded

        patch.setattr(FineTuner, "training_step", FineTuner.training_step)
        recorded.record(Path(f"{folder}.batches"))
        assert main(["run", *recorded.WORDS, "epochs=2", "checkpoint_every=2", f"run_dir={folder}"]) == 0
    sys.path.remove(str(SCRIPTS))
    return folder


def results(folder):
    return json.loads((folder / "results.json").read_text())


# 18 micro-batches, 10 steps, a validation after steps 3, 6 and 9, checkpoints after every second
@pytest.mark.parametrize("kill_at", [1, 4, 6, 9, 10, 12, 13, 18])
def test_a_killed_run_is_the_unbroken_run(tmp_path, try_run, whole, compare, kill_at):
    folder = tmp_path / "run"
    assert try_run(folder, kill_at=kill_at) is None
    assert results(folder)["status"] == "running"
    assert try_run(folder) == 0
    assert compare(whole, folder) == []
    assert len(results(folder).get("resumed", [])) == (kill_at > 4)


def test_a_run_killed_again_and_again_is_the_unbroken_run(tmp_path, try_run, whole, compare):
    folder = tmp_path / "run"
    for kill_at in (5, 3, 6, 2):
        assert try_run(folder, kill_at=kill_at) is None
    assert try_run(folder) == 0
    assert compare(whole, folder) == []
    batches = Path(f"{folder}.batches").read_text().splitlines()
    assert len(batches) > len(Path(f"{whole}.batches").read_text().splitlines())  # some were done twice


@pytest.mark.parametrize("fails", ["torch.save", "os.replace", "_digest"])
def test_killed_while_saving(tmp_path, try_run, whole, compare, monkeypatch, fails):
    folder, count = tmp_path / "run", 0
    owner, name = {"torch.save": (torch, "save"), "os.replace": (os, "replace"), "_digest": (checkpoint, "_digest")}[
        fails
    ]
    real = getattr(owner, name)

    def kill(*arguments):
        nonlocal count
        checkpoints = "ckpt" in str(arguments[0]) or fails == "torch.save"
        count += checkpoints
        if count == 8:
            raise Killed
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, kill)
        assert try_run(folder) is None
    assert try_run(folder) == 0
    assert compare(whole, folder) == []


def test_finished_phases_are_not_repeated(tmp_path, try_run, whole, compare, monkeypatch):
    folder, evaluated = tmp_path / "run", []
    real = run_module.evaluate

    def evaluate(trainer, *more):
        evaluated.append(trainer.global_step)
        if evaluated == [0, 10]:
            raise Killed
        return real(trainer, *more)

    monkeypatch.setattr(run_module, "evaluate", evaluate)
    assert try_run(folder) is None
    assert try_run(folder) == 0
    assert evaluated == [0, 10, 10]  # before; final; final again
    assert (
        Path(f"{folder}.batches").read_text() == Path(f"{whole}.batches").read_text()
    )  # and no step was trained again
    assert compare(whole, folder) == []


EARLY = ["patience=1", "min_delta=9"]  # the second validation, after step 6 of 10, ends training


@pytest.fixture(scope="module")
def early(tmp_path_factory, whole):
    """A run that its held-out loss has ended, undisturbed."""
    return tmp_path_factory.mktemp("early") / "run"


@pytest.mark.parametrize("kill_at", [11, "evaluation"])
def test_a_run_that_stops_early_does_so_at_the_same_step(tmp_path, early, try_run, compare, monkeypatch, kill_at):
    if not early.exists():
        assert try_run(early, *EARLY) == 0
    folder, real = tmp_path / "run", run_module.evaluate

    def evaluate(trainer, *more):
        if kill_at == "evaluation" and trainer.global_step == 6:
            raise Killed
        return real(trainer, *more)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "evaluate", evaluate)
        assert try_run(folder, *EARLY, kill_at=kill_at) is None
    assert try_run(folder, *EARLY) == 0
    assert compare(early, folder) == []
    assert results(folder)["stopped"] == results(early)["stopped"]
    if kill_at == "evaluation":
        assert Path(f"{folder}.batches").read_text() == Path(f"{early}.batches").read_text()


def test_the_newest_checkpoint_is_damaged(tmp_path, try_run, whole, compare, capsys):
    folder = tmp_path / "run"
    assert try_run(folder, kill_at=14) is None
    last = folder / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-7])
    capsys.readouterr()
    assert try_run(folder) == 0
    said = "because last.ckpt is damaged: its sha256 does not match"
    assert said in " ".join(capsys.readouterr().out.split())
    assert said in results(folder)["resumed"][0]
    assert compare(whole, folder) == []


def test_both_checkpoints_are_damaged(tmp_path, try_run, capsys):
    folder = tmp_path / "run"
    assert try_run(folder, kill_at=14) is None
    for name in ("last.ckpt", "previous.ckpt"):
        (folder / "checkpoints" / name).write_bytes(b"")
    assert try_run(folder) == 2
    assert "goes on from a whole checkpoint, got last.ckpt is damaged" in capsys.readouterr().err


def test_resume_never_starts_afresh(tmp_path, try_run, whole, compare):
    folder = tmp_path / "run"
    assert try_run(folder, kill_at=14) is None
    assert try_run(folder, "resume=never") == 0
    assert compare(whole, folder) == []
    assert "resumed" not in results(folder)
    assert len(Path(f"{folder}.batches").read_text().splitlines()) == 14 + 20


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_saves_at_the_next_step_and_exits(tmp_path, try_run, whole, compare, sent):
    """It comes between the two micro-batches of step 3, after which a validation is due."""
    folder = tmp_path / "run"
    status = try_run(folder, hook=lambda count: os.kill(os.getpid(), sent) if count == 5 else None)
    assert status == (130 if sent == signal.SIGINT else 143)
    found = results(folder)
    assert (found["status"], found["steps"]) == ("interrupted", 3)
    content = read(folder / "checkpoints" / "last.ckpt")
    assert (content["global_step"], content["place"]) == (3, {"epoch": 0, "batch": 6})
    assert try_run(folder) == 0
    assert compare(whole, folder) == []


def test_a_signal_during_evaluation(tmp_path, try_run, whole, compare, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(StopOnSignal, "on_predict_start", lambda self, *_: os.kill(os.getpid(), signal.SIGTERM))
        assert try_run(folder) == 143
    assert results(folder)["status"] == "interrupted"
    assert try_run(folder) == 0
    assert compare(whole, folder) == []


@pytest.mark.parametrize("during", ["validation_step", "outputs"])
def test_a_signal_after_training(tmp_path, try_run, whole, compare, monkeypatch, during):
    """In the last validation, or the evaluation of the test set: no step is trained again."""
    folder, real, handlers, evaluated = tmp_path / "run", getattr(FineTuner, during), [], []
    evaluate = run_module.evaluate

    def step(self, batch, index=0):
        if self.trainer.state.fn != "fit" and self.num_tokens > 0:
            handlers.append(signal.getsignal(signal.SIGTERM))
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(FineTuner, during, step)
        patch.setattr(run_module, "evaluate", lambda *given: (evaluated.append(1), evaluate(*given))[1])
        assert try_run(folder) == 143
    assert [handler.__func__ for handler in handlers] == [StopOnSignal._note]
    assert len(evaluated) == (1 if during == "validation_step" else 2)
    assert (results(folder)["status"], results(folder)["steps"]) == ("interrupted", 10)
    assert try_run(folder) == 0
    assert Path(f"{folder}.batches").read_text() == Path(f"{whole}.batches").read_text()
    assert compare(whole, folder) == []


def test_slurm_gets_a_job_back_that_it_warned(tmp_path, try_run, monkeypatch):
    scontrol, folder = tmp_path / "bin" / "scontrol", tmp_path / "run"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/asked\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(scontrol.parent), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    for sent in (signal.SIGTERM, signal.SIGUSR1):
        assert try_run(folder, hook=lambda count, sent=sent: os.kill(os.getpid(), sent)) == 143
    assert (tmp_path / "asked").read_text() == "requeue 17\n"


def test_what_changed_is_refused(tmp_path, try_run, capsys):
    folder = tmp_path / "run"
    assert try_run(folder, kill_at=14) is None
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    file = folder / "results.json"
    found = results(folder)
    for change, message in [
        ({"model": {**found["model"], "sha": "another"}}, "goes on with the model it had, got sha256 of tiny_llama"),
        ({"data": [{**found["data"][0], "sha256": "another"}]}, "goes on with the data it had, got sha256 of "),
    ]:
        file.write_text(json.dumps({**found, **change}))
        assert try_run(folder) == 2
        err = capsys.readouterr().err
        assert message in err
        assert "instead of" in err
        assert "another" in err
        assert "start afresh with resume=never" in err
    file.write_bytes(before[file])
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert try_run(folder, "lr=0.5") == 2
    assert "keeps its config" in capsys.readouterr().err


def test_another_number_of_processes_is_refused(tmp_path, try_run, capsys):
    folder = tmp_path / "run"
    assert try_run(folder, kill_at=14) is None
    last = folder / "checkpoints" / "last.ckpt"
    content = read(last)
    checkpoint.write(last, {**content, "processes": 2 * content["processes"]})
    assert try_run(folder) == 2
    assert "as many processes as it had, got 1 instead of 2" in capsys.readouterr().err


def test_training_does_not_depend_on_an_evaluation_before_it(tmp_path, try_run, whole):
    """Evaluation draws random numbers of its own: else a run that has it behind it could not go on exactly."""
    folder = tmp_path / "run"
    assert try_run(folder, "eval_before=false") == 0
    files = [run / "adapter" / "adapter.safetensors" for run in (whole, folder)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_checkpoints_hold_nothing_frozen_and_are_small(whole):
    trainable = 4 * results(whole)["params"]["trainable"]
    for file in (whole / "checkpoints").iterdir():
        assert file.stat().st_size <= 1.02 * 3 * trainable + 256 * 1024
    assert {f.name for f in (whole / "checkpoints").iterdir()} >= {"last.ckpt", "previous.ckpt"}


@pytest.mark.parametrize("kill_at", [4, 14])  # before the first checkpoint, and behind some
def test_tensorboard_shows_each_step_once(tmp_path, try_run, kill_at):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    assert try_run(folder, kill_at=kill_at) is None
    assert EventAccumulator(str(folder)).Reload().Scalars("train/loss")  # the first try left some
    assert try_run(folder) == 0
    steps = [event.step for event in EventAccumulator(str(folder)).Reload().Scalars("train/loss")]
    assert steps == sorted(set(steps))
    assert len(steps) == 10


def test_sigkill(tmp_path, reliability, capsys):
    """A real process and a real SIGKILL, twice; `kill.py` does this at more points."""
    import kill

    kill.main(["--kills=2", "--per-run=2", f"--json={tmp_path / 'kill.json'}"])
    assert "kills: tried 2, survived 2" in capsys.readouterr().out


def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path, words, whole, compare):
    """The limit on file sizes stands for the disk: a checkpoint of 40 KB does not fit, everything before it does."""
    from recorded import finish

    folder = tmp_path / "run"
    assert finish(folder, words, largest_file=20_000) == 2
    said = Path(f"{folder}.err").read_text()
    assert said.startswith("error: run: its files must be writable, got OSError: [Errno 27] File too large")
    assert "Traceback" not in said
    assert not list((folder / "checkpoints").glob("*.partial"))
    assert finish(folder, words) == 0
    assert compare(whole, folder) == []


def test_damage_is_never_loaded(reliability, capsys):
    import damage

    damage.main(["--saves=2", "--per-save=10"])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 6  # three files, flipped bits and truncations
    assert all(line.endswith("silent loads 0") for line in said)
