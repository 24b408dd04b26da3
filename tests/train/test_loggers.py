"""`logger=`: the same run bit for bit, its numbers elsewhere; a logger that is not there is asked for before weights load."""

import csv
import importlib.util
import json

import pytest

from highrank.cli import main
from highrank.train import build, loggers
from highrank.train.module import FineTuner

WORDS = ["model=tiny_llama", "method=lora", "r=2", "task.n_train=16", "task.n_test=2", "batch_size=2", "max_steps=4"]
WORDS += ["protocol.num_validation=2", "protocol.validate_every=2", "checkpoint_every=1", "dropout=0.1"]
STEPS = [0, 1, 2, 3]


class Killed(BaseException):
    """As SIGKILL: nothing in the program catches it."""


def results(folder):
    return json.loads((folder / "results.json").read_text())


def adapter(folder):
    return (folder / "adapter" / "adapter.safetensors").read_bytes()


def go(folder, *words):
    return main(["run", *WORDS, *words, f"run_dir={folder}"])


def killed_then_whole(folder, monkeypatch, *words):
    """Runs, killed in its third step, and again to the end."""
    step = FineTuner.training_step

    def training_step(self, batch, index):
        if self.trainer.global_step == 2:
            raise Killed
        return step(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(FineTuner, "training_step", training_step)
        with pytest.raises(Killed):
            go(folder, *words)
    assert go(folder, *words) == 0


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The run with TensorBoard."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    assert go(folder) == 0
    return folder


def test_csv_has_a_row_per_step_also_of_a_run_that_was_killed(tmp_path, plain, monkeypatch):
    folder = tmp_path / "run"
    killed_then_whole(folder, monkeypatch, "logger=csv")
    with open(folder / "csv" / "metrics.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == STEPS
    assert [int(row["step"]) for row in rows if row["validation/loss"]][:2] == [1, 3]
    assert "method: lora" in (folder / "csv" / "hparams.yaml").read_text()
    assert adapter(folder) == adapter(plain)
    assert results(folder)["metrics"] == results(plain)["metrics"]
    assert "logged" not in results(folder)
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1  # the run's row of the HPARAMS table
    assert len(list(plain.glob("events.out.tfevents.*"))) > 1


def test_mlflow_goes_on_in_its_run_and_has_values_and_what_came_out(tmp_path, plain, monkeypatch):
    tracking = pytest.importorskip("mlflow.tracking")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    folder = tmp_path / "run"
    killed_then_whole(folder, monkeypatch, "logger=mlflow")
    client = tracking.MlflowClient((folder / "mlruns").as_uri())
    (experiment,) = [e for e in client.search_experiments() if e.name == "highrank"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert results(folder)["logged"] == {"to": "mlflow", "id": found.info.run_id}
    assert found.info.status == "FINISHED"
    assert {metric.step for metric in client.get_metric_history(found.info.run_id, "train/loss")} == set(STEPS)
    assert found.data.params["method"] == "lora"
    accuracy = results(folder)["metrics"]["final"]["sets"]["wordmath"]["accuracy"]
    assert found.data.metrics["final/wordmath/accuracy"] == pytest.approx(accuracy)
    assert found.data.metrics["cost/trainable"] == results(folder)["params"]["trainable"]
    assert adapter(folder) == adapter(plain)


def test_wandb_offline_keeps_its_run_in_the_folder(tmp_path, plain, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "run"
    killed_then_whole(folder, monkeypatch, "logger=wandb")
    assert wandb.run is None
    number = results(folder)["logged"]["id"]
    assert results(folder)["logged"]["to"] == "wandb"
    files = list(folder.glob(f"wandb/offline-run-*-{number}/run-{number}.wandb"))
    assert files
    content = b"".join(file.read_bytes() for file in files)
    for tag in (b"train/loss", b"validation/loss", b"final/wordmath/accuracy", b"cost/trainable"):
        assert tag in content
    assert adapter(folder) == adapter(plain)


@pytest.mark.parametrize("name", loggers.REMOTE)
def test_a_package_that_is_missing_is_asked_for_before_weights_load(tmp_path, monkeypatch, capsys, name):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked, *more: None if asked == name else real(asked, *more))
    monkeypatch.setattr(build, "load_backbone", None)
    assert go(tmp_path / "run", f"logger={name}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f'error: run: {name} is an extra, got logger={name}; pip install "highrank[{name}]"'
    assert not (tmp_path / "run").exists()
    sweep = ["run", "-m", *WORDS, f"logger={name}", "seed=0,1", f"sweep_dir={tmp_path / 'sweep'}"]
    assert main(sweep) == 2
    assert f'pip install "highrank[{name}]"' in capsys.readouterr().err


def test_an_unknown_logger_is_refused_with_those_there_are(capsys):
    assert main(["run", *WORDS, "logger=wanbd"]) == 2
    assert "run: logger is one of tensorboard, csv, wandb, mlflow, got logger=wanbd" in capsys.readouterr().err
    assert main(["run", *WORDS, "trainer.logger=false"]) == 2
    assert "use logger=tensorboard|csv|wandb|mlflow" in capsys.readouterr().err


class Broken:
    """A logger without a server, or whose server leaves in the middle."""

    version = "1"

    def __init__(self, opens):
        self.opens = opens

    @property
    def experiment(self):
        if not self.opens:
            raise ConnectionError("api_key not configured\nand more")
        return self

    def log_metrics(self, *_):
        raise ConnectionError("gone")


def directory(folder):
    from highrank.config.words import compose_run
    from highrank.train.results import RunDirectory

    run = compose_run([*WORDS, "logger=wandb", f"run_dir={folder}"])
    made = RunDirectory(run)
    made.open()
    return run, made


def test_a_logger_that_does_not_open_says_how_to_do_without(tmp_path, monkeypatch):
    monkeypatch.setitem(loggers.MAKE, "wandb", lambda *_: Broken(opens=False))
    with pytest.raises(
        loggers.UserError, match="the logger must open, got ConnectionError: api_key not configured for "
    ):
        loggers.make_logger(*directory(tmp_path / "run"), 0)


def test_final_metrics_that_do_not_arrive_end_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(loggers.MAKE, "wandb", lambda *_: Broken(opens=True))
    run, made = directory(tmp_path / "run")
    loggers.finish(loggers.make_logger(run, made, 0), made, {"final/accuracy": 1.0})
    assert "warning: wandb lacks the final metrics, which results.json has: ConnectionError: gone" in (
        capsys.readouterr().out
    )
