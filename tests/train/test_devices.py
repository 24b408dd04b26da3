"""Several processes: the steps, the numbers and the files of one."""

import contextlib
import io
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from near import check_same, near, results, saved
from safetensors.torch import load_file

from highrank.base.processes import Share
from highrank.base.registry import available
from highrank.cli import main
from highrank.data.batches import LengthBuckets
from highrank.train import stopping
from highrank.train.stopping import StopOnSignal
from highrank.train.trainer import lightning_arguments

pytestmark = pytest.mark.integration

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
TWO = ["trainer.accelerator=cpu", "trainer.devices=2"]
# 13 batches: the last round of two processes is half full, and so is the last step of four micro-batches.
WORDS = [
    *("model=tiny_llama", "task.n_train=29", "task.n_test=5", "batch_size=2", "eval_batch_size=2", "r=2", "lr=1e-2"),
    *("epochs=2", "max_grad_norm=0.1", "protocol.num_validation=3", "protocol.selection=best"),
]
needs_two_cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two processes need two cores")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run directory of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert main(["run", *WORDS, "accumulate=4", f"run_dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def two(request, tmp_path_factory):
    """The words of a run of two processes, its run directory and what it printed."""
    folder = tmp_path_factory.mktemp("two") / "run"
    words = [*WORDS, "accumulate=2", f"trainer={request.param}", *TWO]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["run", *words, f"run_dir={folder}"]) == 0
    return words, folder, out.getvalue()


def launch(*command, folder):
    """Returns the finished process of a Python command whose last word is the run directory."""
    return subprocess.run(
        [sys.executable, *command, f"run_dir={folder}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )


DISTURBED = str(HERE / "disturbed.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", DISTURBED]


@needs_two_cores
def test_two_processes_give_what_one_gives_at_the_same_global_batch(one, two):
    _, two, out = two
    assert out.strip().splitlines()[-1] == str(two)
    assert out.count("done") == 1  # one process speaks
    assert not torch.distributed.is_initialized()
    expected, found = (load_file(folder / "adapter" / "adapter.safetensors") for folder in (one, two))
    for name in expected:  # the same gradients, summed in another order
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (one, two))
    for key in ("steps", "tokens", "params"):
        assert second[key] == first[key]
    assert second["metrics"] == near(first["metrics"])
    for before, after in zip(first["selected"], second["selected"], strict=True):
        assert after["step"] == before["step"]
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-6)
    for file in (one / "predictions").iterdir():
        assert saved(two / "predictions" / file.name) == near(saved(file))
        assert all(row["nats"] > 0 for row in saved(file))
    assert {file.name.partition(".")[0] for file in two.iterdir()} == {f.name.partition(".")[0] for f in one.iterdir()}


@needs_two_cores
def test_a_stopped_run_of_two_processes_goes_on_as_if_it_had_not_been(two, tmp_path, capsys):
    words, whole, _ = two
    folder = tmp_path / "run"
    done = launch(DISTURBED, "0", "stop", *words, folder=folder)
    assert done.returncode == 143, done.stderr
    assert (results(folder)["status"], results(folder)["steps"]) == ("interrupted", 4)
    assert main(["run", *words, "trainer.devices=1", f"run_dir={folder}"]) == 2
    assert "got run_dir=" in (err := capsys.readouterr().err)
    assert "trainer.devices=2 instead of 1" in err
    assert main(["run", *words, f"run_dir={folder}"]) == 0
    assert results(folder)["resumed"] == ["going on from last.ckpt, step 4"]
    check_same(folder, whole)


@needs_two_cores
def test_under_torchrun_with_dropout_a_signal_and_too_little_memory_in_one_process(tmp_path):
    words = [*WORDS, "accumulate=2", "trainer=ddp", *TWO, "method=lora", "dropout=0.1"]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    done = launch(*TORCHRUN, "1", "evaluate", *words, folder=whole)
    assert done.returncode == 0, done.stderr
    assert launch(DISTURBED, "0", "stop", *words, folder=folder).returncode == 143
    assert main(["run", *words, f"run_dir={folder}"]) == 0
    check_same(folder, whole)


@needs_two_cores
def test_memory_that_runs_out_in_another_process_is_written_down(tmp_path):
    """The first process may wait for it, and is then ended."""
    folder = tmp_path / "run"
    words = [*WORDS, "accumulate=2", "trainer=ddp", *TWO, "eval_before=false", "auto_microbatch=true"]
    done = launch(*TORCHRUN, "1", "train", *words, folder=folder)
    assert done.returncode != 0
    assert (
        "run: a step must fit into memory, got OutOfMemoryError: CUDA out of memory. with batch_size=2" in done.stderr
    )
    assert "give the same command again: a batch is then computed in 2 parts" in done.stderr
    assert "run: another of its processes ran out of memory, got OutOfMemoryError" in done.stderr
    assert (results(folder)["status"], results(folder)["parts"]) == ("oom", 2)


@needs_two_cores
def test_every_method_has_the_gradients_of_one_process():
    """Under DDP, which fails on a parameter without a gradient, and under FSDP2, where a block's parameters are whole
    only while it computes."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    command = [sys.executable, str(HERE / "two_processes.py")]
    other = subprocess.Popen([*command, "1", port], cwd=ROOT)
    try:
        done = subprocess.run([*command, "0", port], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    finally:
        other.kill()
        other.wait()
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]  # torch 2.8's gloo prints there too
    found = {(row["method"], row["kind"]): row for row in map(json.loads, lines)}
    assert set(found) == {(method, kind) for method in available("methods") for kind in ("ddp", "fsdp")}
    for case, row in found.items():
        assert row["difference"] <= 1e-6 * max(1, row["size"]), case


@needs_two_cores
def test_a_signal_to_one_process_stops_all_of_them(tmp_path):
    folder = tmp_path / "run"
    words = ["model=tiny_llama", "task.n_train=64", "task.n_test=2", "batch_size=1", "epochs=1000", "eval_before=false"]
    process = subprocess.Popen(
        [sys.executable, "run.py", *words, "r=2", "trainer=ddp", *TWO, f"run_dir={folder}"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 240
        while not any(file.stat().st_size > 2000 for file in folder.glob("events.*")):  # it logs every step
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143
        with pytest.raises(ProcessLookupError):  # nobody is left in its process group
            os.killpg(process.pid, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert json.loads((folder / "results.json").read_text())["status"] == "interrupted"


def test_a_signal_that_comes_while_the_processes_ask_is_kept_for_the_next_time(monkeypatch):
    """They must all have the same answer: one that stopped alone would leave the others waiting."""
    stop, trainer = StopOnSignal(), SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))

    def asking(value, device):
        stop._note(signal.SIGTERM, None)
        return value

    monkeypatch.setattr(stopping, "highest", asking)
    assert not stop.agree(trainer)
    assert stop.received == signal.SIGTERM
    assert stop.agree(trainer)
    monkeypatch.setattr(stopping, "highest", lambda value, device: signal.SIGINT)  # another process had this one
    assert stop.agree(trainer)
    assert stop.received == signal.SIGTERM


def test_a_process_that_fails_is_not_waited_for(tmp_path):
    waits = f"""
import time
from pathlib import Path
from types import SimpleNamespace
from highrank.train.devices import Processes
Processes.GRACE_S = 0.1
environment = SimpleNamespace(creates_processes_externally=False)
with Processes(SimpleNamespace(strategy=SimpleNamespace(cluster_environment=environment), num_devices=2)) as others:
    others.start(Path({str(tmp_path / "config.yaml")!r}))  # there is none: the other process fails
    time.sleep(900)
"""
    command = [sys.executable, "-c", waits]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 1
    assert "another process of this run has failed" in done.stderr


@pytest.mark.parametrize("size", [1, 5, 13, 24])
@pytest.mark.parametrize(
    ("batch_size", "accumulate", "processes"), [(2, 4, 1), (1, 8, 1), (2, 2, 2), (4, 1, 2), (3, 1, 3)]
)
def test_a_step_is_the_same_examples_however_it_is_cut(size, batch_size, accumulate, processes):
    lengths, targets = list(range(1, size + 1)), [1 + i % 7 for i in range(size)]
    whole = LengthBuckets(lengths, batch_size * accumulate * processes, 0, targets=targets)
    shares = [
        LengthBuckets(lengths, batch_size, 0, Share(rank, processes), accumulate, targets) for rank in range(processes)
    ]
    taken = [list(share) for share in shares]
    assert {len(batches) for batches in taken} == {len(share) for share in shares} == {len(whole) * accumulate}
    for number, step in enumerate(whole):
        rounds = range(number * accumulate, (number + 1) * accumulate)
        pieces = [(batches[i], share.weight(i)) for i in rounds for share, batches in zip(shares, taken, strict=True)]
        assert [i for rows, weight in pieces if weight for i in rows] == step
        assert all(rows and set(rows) <= set(step) for rows, _ in pieces)
        n = sum(targets[i] for i in step)
        for rows, weight in pieces:
            own = sum(targets[i] for i in rows)
            assert weight in (0, pytest.approx(own * accumulate * processes / n))
        assert sum(weight for _, weight in pieces) == pytest.approx(accumulate * processes)


def test_lengths_are_sorted_inside_a_window_alone():
    lengths = [37 * i % 101 for i in range(24)]
    shuffled, halves, one = ([sorted(step) for step in LengthBuckets(lengths, 2, 5, window=n)] for n in (1, 6, 12))
    order = list(range(24))
    random.Random("5/0").shuffle(order)

    def steps(window):
        pieces = [sorted(order[at : at + 2 * window], key=lengths.__getitem__) for at in range(0, 24, 2 * window)]
        return sorted(sorted(piece[at : at + 2]) for piece in pieces for at in range(0, 2 * window, 2))

    assert [sorted(found) for found in (shuffled, halves, one)] == [steps(1), steps(6), steps(12)]
    assert steps(1) != steps(6) != steps(12)
    assert list(LengthBuckets(lengths, 1, 5)) == list(LengthBuckets(lengths, 1, 5, window=20))


@pytest.mark.parametrize(("size", "batch_size"), [(7, 2), (8, 2), (1, 5), (0, 2)])
def test_every_example_is_evaluated_once(size, batch_size):
    shares = [Share(rank, 3).of_examples(range(size), batch_size) for rank in range(3)]
    own = [share for rank, share in enumerate(shares) if rank * batch_size < size]  # the others repeat the first batch
    assert sorted(itertools.chain(*own)) == list(range(size))
    whole = [list(range(size))[i : i + batch_size] for i in range(0, size, batch_size)]
    for rank, share in enumerate(own):
        cut = [share[i : i + batch_size] for i in range(0, len(share), batch_size)]
        assert cut == [whole[Share(rank, 3).number(i)] for i in range(len(cut))]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trainer=cpu", "trainer.devices=4096"], "got trainer.devices=4096 on"),
        (["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=4096"], "use at most trainer.devices="),
        (
            ["trainer=ddp", "trainer.accelerator=cpu", "+trainer.num_nodes=2"],
            "started by torchrun or srun, got trainer.",
        ),
        (["+trainer.strategy=ddp_spawn"], "strategy is one of auto, ddp, fsdp, got trainer.strategy=ddp_spawn"),
        (["trainer=gpu"], "trainer: "),
        (["trainer=gpu_bf16"], "trainer: "),
    ],
)
def test_devices_that_are_not_there(run_cli, tmp_path, words, message):
    if torch.cuda.is_available() and words[0].startswith("trainer=gpu"):
        pytest.skip("there is a GPU")
    status, _, err = run_cli("model=tiny_llama", "r=2", *words)
    assert status == 2
    assert err.startswith("error: trainer: ")
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "outputs").exists()  # nothing was loaded, nothing written


@pytest.mark.parametrize("preset", ["auto", "cpu", "gpu", "gpu_bf16", "ddp", "fsdp"])
def test_every_preset_composes(preset):
    from highrank.config.words import compose_run

    trainer = compose_run(["model=tiny_llama", f"trainer={preset}"]).trainer
    assert {"accelerator", "devices", "precision"} <= set(trainer)


def test_a_sharded_model_is_not_evaluated_in_inference_mode():
    """What gathers shards over NCCL writes into tensors that inference mode forbids to write into; gloo is spared."""
    assert lightning_arguments({"strategy": "fsdp", "devices": 1})["inference_mode"] is False
    assert "inference_mode" not in lightning_arguments({"strategy": "ddp", "devices": 1})


def test_steps_count_every_process(run_cli):
    status, out, err = run_cli(*WORDS, "accumulate=2", "trainer=ddp", *TWO, "dry_run=true")
    assert status == 0, err
    plan = json.loads((Path(out.strip().splitlines()[-1]) / "plan.json").read_text())
    assert plan["steps"] == 8  # 13 batches are 7 rounds of two, 4 steps of two rounds, in each of two epochs


def test_a_process_without_a_batch_repeats_the_first():
    shares = [Share(rank, 3) for rank in range(3)]
    assert [share.of_examples("abcde", 2) for share in shares] == [["a", "b"], ["c", "d"], ["e"]]
    assert [share.of_examples("ab", 2) for share in shares] == [["a", "b"]] * 3
