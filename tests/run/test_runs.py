"""`run.py` end to end on tiny models: every method, every kind of task, and what a run leaves behind."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from highrank.base.registry import available, load
from highrank.config.words import spelled

pytestmark = pytest.mark.integration

TINY = ["model=tiny_llama", "max_steps=2", "batch_size=2", "task.n_train=8", "task.n_test=3"]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("method", sorted(available("methods")))
def test_every_method_runs(run_cli, method):
    fields = [f"{key}={spelled(value)}" for key, value in load("methods", method).examples[0].items()]
    model = ["model=tiny_qwen2"] if method == "bitfit" else []  # llama has no biases
    status, out, err = run_cli(f"method={method}", *TINY, *fields, *model)
    assert status == 0, err
    folder = Path(out.strip().splitlines()[-1])  # the last line is the run directory
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == "done"
    assert results["steps"] == 2


def test_what_a_run_leaves(run_cli):
    status, out, _ = run_cli(*TINY, "r=2", "seed=3")
    assert status == 0
    folder = Path(out.strip().splitlines()[-1])
    results = json.loads((folder / "results.json").read_text())
    wanted = {"status", "config_hash", "git", "versions", "model", "data", "protocol", "params", "metrics", "time"}
    assert wanted | {"memory", "tokens", "seed"} <= set(results)
    assert set(results["params"]) == {"trainable", "total", "percent", "frozen_extra", "head"}
    assert set(results["metrics"]) == {"before", "final"}
    assert results["metrics"]["final"]["sets"]["wordmath"]["n"] == 3
    assert "unparsed" in results["metrics"]["final"]["sets"]["wordmath"]
    assert all(set(row) >= {"name", "rows", "sha256"} for row in results["data"])
    assert results["seed"] == 3

    rows = [json.loads(line) for line in (folder / "predictions" / "wordmath.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert all({"id", "prompt", "output", "parsed", "gold", "correct"} <= set(row) for row in rows)
    assert "method:" in (folder / "config.yaml").read_text()

    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    saved = sum(t.numel() for t in checkpoint["state_dict"].values())
    assert saved == results["params"]["trainable"]  # nothing frozen

    events = EventAccumulator(str(folder)).Reload()
    scalars = events.Tags()["scalars"]
    assert "train/loss" in scalars
    assert "final/wordmath/accuracy" in scalars
    assert "hp_metric" not in scalars


def test_the_same_seed_gives_the_same_adapter(run_cli, tmp_path):
    tensors = []
    for name in "ab":
        status, _, _ = run_cli(*TINY, "r=2", f"run_dir={tmp_path / name}")
        assert status == 0
        tensors.append((tmp_path / name / "adapter" / "adapter.safetensors").read_bytes())
    assert tensors[0] == tensors[1]


@pytest.mark.parametrize(
    "words",
    [
        ["schedule=cosine", "warmup_steps=1", "weight_decay=0.1", "accumulate=2"],
        ["schedule=constant", "warmup_ratio=0.5", "optimizer=sgd", "max_grad_norm=0"],
        ["trainer.precision=bf16-mixed", "optimizer=adam"],
        ["model.dtype=bfloat16", "model.shuffled=true"],
        ["model=tiny_phi3", "placement=all", "fused=fused"],
        ["model=tiny_phi3", "placement=fc_qkv", "fused=split"],
        ["model=tiny_gpt2", "placement=qv"],
        ["placement=[q,up]", "architecture={blocks: model.layers, q: self_attn.q_proj, up: 'mlp.up_proj[4:20]'}"],
        ["layers=1", "placement=[q,down]", "eval_before=false", "epochs=0.5"],
    ],
)
def test_options(run_cli, words):
    status, _, err = run_cli(*TINY, "r=2", *words)
    assert status == 0, err


def test_merge_and_eval_of_a_finished_run(run_cli, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    from highrank.cli import main

    _, out, _ = run_cli(*TINY, "r=2")
    folder = Path(out.strip().splitlines()[-1])
    assert main(["merge", str(folder), "--out", str(tmp_path / "merged")]) == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert main(["merge", str(folder), "--out", str(tmp_path / "merged")]) == 2
    assert "must be new or empty" in capsys.readouterr().err
    assert main(["eval", str(folder)]) == 0
    again = json.loads(capsys.readouterr().out)  # nothing else is on standard output
    assert again == json.loads((folder / "results.json").read_text())["metrics"]["final"]


def test_dry_run_loads_no_weights(run_cli):
    status, out, _ = run_cli("model=llama3_8b", "r=32", "dry_run=true")
    assert status == 0
    assert "56,623,104" in out
    assert "0.7002 %" in out
    plan = json.loads((Path(out.strip().splitlines()[-1]) / "plan.json").read_text())
    assert plan["matched"] == {"q": 32, "k": 32, "v": 32, "up": 32, "down": 32}
    assert plan["params"]["trainable"] == 56_623_104
    assert {"steps", "tokens", "memory_bytes"} <= set(plan)


def test_dry_run_of_a_method_whose_update_is_no_weight(run_cli):
    status, out, _ = run_cli("model=llama3_8b", "method=p_tuning", "dry_run=true")
    assert status == 0
    plan = json.loads((Path(out.strip().splitlines()[-1]) / "plan.json").read_text())
    assert (plan["placement"], plan["matched"]) == (None, {"virtual tokens": 20})
    assert plan["params"]["trainable"] == 50_425_856
    status, _, err = run_cli("model=llama3_8b", "method=bitfit", "dry_run=true")
    assert status == 2
    assert "bitfit: the model has no biases to train, got model_type=llama" in err


@pytest.mark.parametrize(
    ("words", "commands"),
    [
        (["r=2"], ["highrank analyze", "highrank merge", "tensorboard --logdir"]),
        (["method=bitfit", "model=tiny_qwen2"], ["highrank merge", "tensorboard --logdir", "highrank eval"]),
        (["method=prompt_tuning"], ["tensorboard --logdir", "highrank eval"]),
    ],
)
def test_a_run_ends_with_the_commands_to_try_next(run_cli, tmp_path, words, commands):
    from highrank.cli import main

    folder = tmp_path / "a run"
    for _ in range(2):  # the second finds the first finished
        _, out, _ = run_cli(*TINY, *words, f"run_dir={folder}")
        *_, said = out.partition("try next:\n")
        *lines, last = said.splitlines()
        assert last == str(folder)
        assert [line.strip().partition(" '")[0] for line in lines] == commands
    for line in lines:
        command, *rest = shlex.split(line)
        assert command != "highrank" or main(rest) == 0


def test_a_run_needs_neither_a_home_nor_the_repositorys_folder(tmp_path):
    (tmp_path / "home").write_text("a file")
    kept = {key: value for key, value in os.environ.items() if key not in ("HIGHRANK_CACHE", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *TINY, "r=2", "output=here"],
        env={**kept, "HOME": str(tmp_path / "home"), "MPLCONFIGDIR": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    folder = tmp_path / done.stdout.splitlines()[-1]
    assert folder.is_relative_to(tmp_path / "here")
    assert json.loads((folder / "results.json").read_text())["status"] == "done"


def test_merge_of_a_run_that_has_no_merged_weight(run_cli, tmp_path, capsys):
    from highrank.cli import main

    _, out, _ = run_cli(*TINY, "method=prompt_tuning")
    folder = Path(out.strip().splitlines()[-1])
    assert main(["merge", str(folder), "--out", str(tmp_path / "merged")]) == 2
    assert "merge: prompt_tuning has no merged weight" in capsys.readouterr().err
    assert main(["eval", str(folder)]) == 0
    again = json.loads(capsys.readouterr().out)  # nothing else is on standard output
    assert again == json.loads((folder / "results.json").read_text())["metrics"]["final"]


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_usable_directory(tmp_path, sent, status):
    """The signal goes to a real process in the middle of training."""
    words = [
        "model=tiny_llama",
        "r=2",
        "max_steps=100000",
        "task.n_test=2",
        "eval_before=false",
        f"run_dir={tmp_path / 'r'}",
    ]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    events = tmp_path / "r"
    deadline = time.monotonic() + 120
    while not list(events.glob("events.*.[0-9]")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(sent)
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    assert out.strip().splitlines()[-1] == str(tmp_path / "r")
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    assert results["status"] == "interrupted"
    assert results["steps"] > 0
    assert (tmp_path / "r" / "adapter" / "adapter.safetensors").is_file()
    assert (tmp_path / "r" / "checkpoints" / "last.ckpt").is_file()


def test_output_that_nobody_reads_on_ends_quietly():
    program = "import sys; from highrank.cli import main; sys.exit(main())"
    command = f"{shlex.join([sys.executable, '-c', program])} --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("141", "")


def test_the_list_of_core_keys_is_a_decision():
    """A new key is a promise to users; adding one means adding it here too."""
    from highrank.config.run_config import CORE_KEYS

    assert (
        *("path", "placement", "layers", "fused", "architecture", "start_from", "start_as", "start_hash", "seed"),
        *("lr", "head_lr", "optimizer", "betas", "weight_decay", "schedule", "warmup_steps", "warmup_ratio"),
        *("epochs", "max_steps", "batch_size", "accumulate", "max_grad_norm"),
        *("compile", "packing", "checkpoint_activations", "auto_microbatch", "eval_batch_size"),
        *("patience", "min_delta", "eval_before", "eval_test", "eval_also", "general_text"),
        "analyze",
        *("output", "run_dir", "logger", "resume", "checkpoint_every", "dry_run"),
    ) == CORE_KEYS
