"""A run that leaves the finite numbers says so, saves none of them, and keeps what was finite."""

import csv
import json
import math

import pytest
import torch

from highrank.cli import main
from highrank.model.adapters import attach
from highrank.model.backbones import load_backbone
from highrank.model.placement import resolve
from highrank.plugin import UserError, load
from highrank.train import checkpoint
from highrank.train.module import FineTuner

pytestmark = pytest.mark.integration

WORDS = [
    *("model=tiny_llama", "method=lora", "r=2", "task.n_train=24", "task.n_test=3", "batch_size=4", "max_steps=8"),
    *("eval_before=false", "checkpoint_every=2", "schedule=constant"),
]


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture
def broken_from(monkeypatch):
    """Lets the loss (or its gradient alone) be `value` from the step `at` on, where the rate is above 0.1."""

    def set_up(at, value=math.nan, gradient=False):
        real = FineTuner.loss

        def loss(self, batch):
            found, n = real(self, batch)
            if self.training and self.trainer.global_step >= at and self.core.lr > 0.1:
                bad = value * found if gradient else torch.full_like(found, value)
                found = found + (bad - bad.detach() if gradient else bad)
            return found, n

        monkeypatch.setattr(FineTuner, "loss", loss)

    return set_up


@pytest.mark.parametrize(("value", "gradient"), [(math.nan, False), (math.inf, False), (math.inf, True)])
@pytest.mark.parametrize("words", [[], ["accumulate=2"]])
def test_a_run_that_diverges(value, gradient, words, broken_from, tmp_path, capsys):
    broken_from(5, value, gradient)
    folder = tmp_path / "run"
    assert main(["run", *WORDS, "lr=1", *words, f"run_dir={folder}"]) == 1
    said = "run: training diverged, got the loss or its gradient not finite at step 6 of 8"
    assert f"error: {said}" in capsys.readouterr().err
    found = results(folder)
    assert (found["status"], found["error"].startswith(said)) == ("diverged", True)
    assert not (folder / "adapter").exists()
    kept = checkpoint.read(folder / "checkpoints" / "last.ckpt")
    assert kept["global_step"] == 4
    assert all(tensor.isfinite().all() for tensor in kept["state_dict"].values())
    before = {file: file.read_bytes() for file in (folder / "checkpoints").iterdir()}
    assert main(["run", *WORDS, "lr=1", *words, f"run_dir={folder}"]) == 1
    assert "it did so before, and nothing was run again" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in (folder / "checkpoints").iterdir()} == before
    assert main(["eval", str(folder)]) == 2
    assert "Traceback" not in capsys.readouterr().err


ENORMOUS = ["optimizer=sgd", "max_grad_norm=0", "warmup_ratio=0"]


def test_a_last_step_that_leaves_the_finite_numbers_saves_nothing(tmp_path, capsys):
    words = [word for word in WORDS if not word.startswith(("method=", "r=", "max_steps="))]
    words += [*ENORMOUS, "method=full", "lr=1e38", "max_steps=1", "batch_size=1"]
    assert main(["run", *words, f"run_dir={tmp_path}"]) == 1
    assert "got a trained parameter not finite" in capsys.readouterr().err
    assert results(tmp_path)["status"] == "diverged"
    assert not list(tmp_path.rglob("adapter.safetensors"))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_sweep_records_it_and_goes_on(tmp_path, capsys):
    words = ["run", "-m", *WORDS, *ENORMOUS, "lr=1e30,1e-3", f"sweep_dir={tmp_path}"]
    assert main(words) == 0
    with (tmp_path / "table.csv").open() as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["diverged", "done"]
    assert "diverged: run: training diverged" in " ".join(capsys.readouterr().out.split())
    assert main(words) == 0
    assert "2 done before" in capsys.readouterr().out


def test_an_adapter_that_is_not_finite_is_neither_saved_nor_loaded(tmp_path):
    cls = load("methods", "lora")

    def make():
        model = load_backbone({"name": "tiny_llama", "dtype": "float32"}, None).model
        return attach(model, resolve(model, "q"), cls, cls.config(r=2))

    adapters = make()
    adapters.save(tmp_path / "good")
    with torch.no_grad():
        next(iter(adapters.by_view.values())).B.fill_(math.nan)
    with pytest.raises(UserError, match=r"must be finite to be saved, got NaN or inf in model.layers.0.*B"):
        adapters.save(tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    other = make()
    with torch.no_grad():
        other.base_weight(other.views[0])[0, 0] = math.nan
    with pytest.raises(UserError, match="the probe must match the one saved"):
        other.load(tmp_path / "good")
