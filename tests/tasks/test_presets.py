"""Every preset of the papers' experiments composes, says its own command, and dry-runs without weights and data."""

import json
from pathlib import Path

import highrank.configs
import pytest

from highrank.config import compose_run
from highrank.plan import make_plan

ROOT = Path(highrank.configs.__path__[0]) / "experiment"
PRESETS = sorted(str(file.relative_to(ROOT).with_suffix("")) for file in ROOT.rglob("*.yaml"))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_opens_with_its_command(name):
    lines = (ROOT / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1] == f"# python run.py experiment={name}"
    assert lines[2].startswith("# ")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_dry_runs(name, monkeypatch):
    monkeypatch.delenv("HIGHRANK_DATA", raising=False)
    plan = make_plan(compose_run([f"experiment={name}", "dry_run=true"]))
    assert plan.params.trainable > 0
    assert plan.steps > 0


def plan_of(words, monkeypatch):
    monkeypatch.delenv("HIGHRANK_DATA", raising=False)
    return make_plan(compose_run([*words.split(), "dry_run=true"]))


STEPS = [  # as the papers' batch sizes and epochs imply
    ("hyperadapt/glue_sst2", 5_270),
    ("hyperadapt/glue_mrpc", 580),
    ("hyperadapt/glue_cola", 1_340),
    ("hyperadapt/glue_qnli", 8_190),
    ("hyperadapt/glue_rte", 400),
    ("hyperadapt/glue_stsb", 450),
    ("hyperadapt/math10k", 117),
    ("peft/metamath", 5_000),
]


@pytest.mark.parametrize(("name", "steps"), STEPS)
def test_steps(name, steps, monkeypatch):
    assert plan_of(f"experiment={name}", monkeypatch).steps == steps


def test_a_preset_can_be_overridden(monkeypatch):
    run = compose_run(["experiment=hira/commonsense170k", "r=16", "lr=2e-4", "model=llama2_7b", "protocol=clean"])
    assert (run.method_cfg.r, run.core.lr, run.model["name"], run.protocol.name) == (16, 2e-4, "llama2_7b", "clean")
    printed = plan_of("experiment=hyperadapt/math10k_boft_printed", monkeypatch).params.trainable
    stated = plan_of("experiment=hyperadapt/math10k_boft_printed butterfly_factor=4", monkeypatch).params.trainable
    assert (printed, stated) == (6_356_992, 21_299_200)


def test_a_dry_run_counts_the_data_where_there_is_some(run_cli, folder, tmp_path):
    words = ["task=gsm8k", f"task.data={folder}", "task.allow_partial=true", "model=tiny_llama", "method=lora", "r=1"]
    status, _, err = run_cli(*words, "placement=q", "dry_run=true", f"run_dir={tmp_path / 'run'}")
    assert status == 0, err
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["num_train"] == 3
