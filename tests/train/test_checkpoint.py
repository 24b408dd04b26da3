"""Checkpoint files: whole or not there, nothing damaged or foreign is loaded, and no larger than what they hold."""

import hashlib
import io
import os
import pickle
import random
from types import SimpleNamespace

import numpy
import pytest
import torch

from highrank.base.errors import UserError
from highrank.base.registry import load
from highrank.config.run_config import RunConfig
from highrank.data.batches import LengthBuckets
from highrank.model.adapters import attach
from highrank.model.backbones import load_backbone
from highrank.model.placement import resolve
from highrank.train import checkpoint
from highrank.train.checkpoint import (
    LAST,
    PREVIOUS,
    Damaged,
    check_generators,
    generators,
    newest,
    read,
    set_generators,
    write,
)
from highrank.train.optimizer import make_optimizer
from highrank.train.selection import KeepBest

CPU = torch.device("cpu")
CONTENT = {
    "global_step": 3,
    "needs": [],
    "place": {"epoch": 0, "batch": 1},
    "processes": [],
    "weights": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(2, dtype=torch.int64)},
    "half": [torch.ones(3, dtype=torch.bfloat16), (1, "x", None, 2.5, True)],
    "empty": torch.empty(0, 4),
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_what_is_written_is_read(tmp_path):
    write(tmp_path / LAST, CONTENT)
    found = read(tmp_path / LAST)
    assert same(found, CONTENT)
    found["weights"]["a"].zero_()
    assert found["half"][0].tolist() == [1, 1, 1]  # tensors own their memory again
    assert found["weights"]["a"].untyped_storage().nbytes() == 24
    assert [p.name for p in tmp_path.iterdir()] == [LAST]
    assert same(torch.load(tmp_path / LAST, weights_only=True), CONTENT)  # any torch can read it


def test_every_truncation_and_every_flipped_bit_is_found(tmp_path):
    file = tmp_path / LAST
    write(file, CONTENT)
    raw, draw = file.read_bytes(), random.Random(0)
    for size in [0, 1, 31, 32, 33, len(raw) - 33, len(raw) - 32, len(raw) - 1]:
        file.write_bytes(raw[:size])
        with pytest.raises(Damaged):
            read(file)
    for bit in [0, 8 * len(raw) - 1, *draw.sample(range(8 * len(raw)), 100)]:
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        with pytest.raises(Damaged, match="sha256 does not match"):
            read(file)


class Malicious:
    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    """Its checksum is right: whoever writes the file can compute one."""
    Malicious.folder = str(tmp_path / "broken_in")
    buffer = io.BytesIO()
    torch.save({**CONTENT, "payload": Malicious()}, buffer)
    raw = buffer.getvalue()
    (tmp_path / LAST).write_bytes(raw + hashlib.sha256(raw).digest())
    with pytest.raises(Damaged, match=r"last.ckpt is refused: Weights only load failed"):
        read(tmp_path / LAST)
    with pytest.raises(UserError, match=r"last.ckpt is refused.*start afresh with resume=never"):
        newest(tmp_path)
    assert not (tmp_path / "broken_in").exists()
    pickle.loads(pickle.dumps(Malicious()))
    assert (tmp_path / "broken_in").exists()  # the payload does work


def test_the_previous_one_is_kept_and_used_if_the_newest_is_damaged(tmp_path):
    assert newest(tmp_path) is None
    for step in (1, 2, 3):
        write(tmp_path / LAST, {**CONTENT, "global_step": step}, previous=tmp_path / PREVIOUS)
    assert (newest(tmp_path).step, newest(tmp_path).damage) == (3, "")
    (tmp_path / LAST).write_bytes((tmp_path / LAST).read_bytes()[:-1])
    found = newest(tmp_path)
    assert (found.path, found.step) == (tmp_path / PREVIOUS, 2)
    assert found.damage == "last.ckpt is damaged: its sha256 does not match"
    assert "previous.ckpt, step 2, because last.ckpt is damaged" in found.told
    assert (tmp_path / "last.ckpt.damaged").is_file()
    write(tmp_path / LAST, {**CONTENT, "global_step": 4}, previous=tmp_path / PREVIOUS)
    assert read(tmp_path / PREVIOUS)["global_step"] == 2  # the damaged one does not push it out
    (tmp_path / LAST).unlink()  # killed between two renames
    assert newest(tmp_path).step == 2
    (tmp_path / PREVIOUS).write_bytes(b"")
    with pytest.raises(UserError, match=r"goes on from a whole checkpoint, got previous.ckpt is damaged"):
        newest(tmp_path)


def test_a_checkpoint_of_another_layout_is_put_aside(tmp_path):
    write(tmp_path / PREVIOUS, {**CONTENT, "global_step": 2})
    write(tmp_path / LAST, {"global_step": 3, "state_dict": {}})
    found = newest(tmp_path)
    assert found.step == 2
    assert "it lacks needs, place, processes" in found.damage


def test_a_checkpoint_whose_best_weights_are_damaged_is_not_whole(tmp_path):
    for step in (1, 2):
        content = {**CONTENT, "global_step": step, "needs": [f"best-{step}.ckpt"]}
        write(tmp_path / f"best-{step}.ckpt", {"a": torch.ones(2)})
        write(tmp_path / LAST, content, previous=tmp_path / PREVIOUS)
    (tmp_path / "best-2.ckpt").write_bytes(b"?")
    found = newest(tmp_path)
    assert (found.step, found.damage) == (1, "best-2.ckpt is damaged: its sha256 does not match")


@pytest.mark.parametrize("fails", ["write", "fsync", "read back", "first rename", "second rename"])
def test_a_write_that_fails_loses_nothing(tmp_path, monkeypatch, fails):
    write(tmp_path / LAST, {**CONTENT, "global_step": 1}, previous=tmp_path / PREVIOUS)
    write(tmp_path / LAST, {**CONTENT, "global_step": 2}, previous=tmp_path / PREVIOUS)

    class Full(io.FileIO):
        def write(self, data):
            super().write(bytes(data)[:100])
            raise OSError(28, "No space left on device")

    calls, replace = [], os.replace

    def fail(*_):
        raise OSError(28, "No space left on device")

    def rename(old, new):
        calls.append(new)
        if len(calls) == {"first rename": 1, "second rename": 2}[fails]:
            fail()
        replace(old, new)

    if fails == "write":
        monkeypatch.setattr(checkpoint, "open", Full, raising=False)
    elif fails == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    elif fails == "read back":
        monkeypatch.setattr(checkpoint, "_digest", lambda path: b"something else")
    else:
        monkeypatch.setattr(os, "replace", rename)
    with pytest.raises(OSError, match=r"No space left|not written as it was given"):
        write(tmp_path / LAST, {**CONTENT, "global_step": 3}, previous=tmp_path / PREVIOUS)
    monkeypatch.undo()
    assert newest(tmp_path).step == 2
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("method", "fields", "architecture"), [("hyperadapt", {}, "llama"), ("hira", {"r": 2}, "gpt2")]
)
def test_a_checkpoint_is_as_large_as_what_it_holds(tmp_path, method, fields, architecture):
    """Many small tensors are the hard case: 1.02 of weights and two moments, and 256 KiB."""
    model = load_backbone({"name": f"tiny_{architecture}", "dtype": "float32"}, None).model
    cls = load("methods", method)
    adapters = attach(model, resolve(model, "all"), cls, cls.config(**fields))
    optimizer = make_optimizer(adapters, RunConfig(lr=1e-3))
    for _, parameter in adapters.named_parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    copies = 15  # two layers each: 30, as SmolLM2 has, only narrower
    content = {
        "state_dict": {f"{i}.{name}": t for i in range(copies) for name, t in adapters.state_dict().items()},
        "optimizer_states": [optimizer.state_dict() for _ in range(copies)],
        "processes": [{"generators": generators(CPU)}],
    }
    write(tmp_path / LAST, content)
    trainable = 4 * copies * adapters.num_trainable()
    assert len(content["state_dict"]) >= 240
    assert (tmp_path / LAST).stat().st_size <= 1.02 * 3 * trainable + 256 * 1024


def test_every_generator_goes_on_where_it_was():
    def draw():
        return random.random(), numpy.random.standard_normal(3).tolist(), torch.rand(3).tolist()

    draw(), random.gauss(0, 1), numpy.random.standard_normal()  # some keep a second number for the next call
    states = generators(CPU)
    first = draw(), random.gauss(0, 1)
    set_generators(states, CPU)
    assert (draw(), random.gauss(0, 1)) == first


def test_the_generator_of_a_gpu_is_the_process_own_whatever_the_machine_has(monkeypatch):
    """Saved by a process on its fourth GPU, restored by one on its first, where there is no other."""
    states = {3: torch.arange(4, dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device.index])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update({device.index: state}))
    saved = generators(torch.device("cuda", 3))
    check_generators(saved, torch.device("cuda", 0))
    set_generators(saved, torch.device("cuda", 0))
    assert torch.equal(states[0], states[3])


@pytest.mark.parametrize(
    ("change", "device", "message"),
    [
        ({"device": "cuda", "cuda": [torch.zeros(4)]}, "cpu", r"got cpu instead of cuda \(random states of 1 GPUs\)"),
        ({"device": "cpu", "cuda": []}, "cuda", r"got cuda instead of cpu \(random states of 0 GPUs\)"),
        ({"cuda": [torch.zeros(4)] * 8}, "cuda", r"got cuda instead of cuda \(random states of 8 GPUs\)"),
    ],
)
def test_a_run_does_not_go_on_on_another_kind_of_device(change, device, message):
    states = {key: value for key, value in generators(CPU).items() if key not in ("device", "cuda")} | change
    with pytest.raises(UserError, match=message + r".*start afresh with resume=never"):
        check_generators(states, torch.device(device))


def test_a_checkpoint_that_does_not_name_its_device_is_restored():
    """As earlier versions wrote it on the CPU of a machine with GPUs."""
    states = generators(CPU)
    del states["device"]
    check_generators(states | {"cuda": [torch.zeros(4)] * 8}, CPU)
    check_generators(states | {"cuda": [torch.zeros(4)]}, torch.device("cuda", 0))


def test_a_sampler_goes_on_within_an_epoch():
    lengths = [random.Random(0).randint(1, 30) for _ in range(50)]
    whole = LengthBuckets(lengths, 4, seed=1)
    whole.set_epoch(2)
    order = list(whole)
    again = LengthBuckets(lengths, 4, seed=1)
    again.start_at(epoch=2, batch=5)
    assert len(again) == len(whole)  # Lightning counts the batches of the epoch, done or not
    assert list(again) == order[5:]
    again.set_epoch(3)
    whole.set_epoch(3)
    assert list(again) == list(whole)


def test_the_best_weights_are_written_once_each_and_restored(tmp_path):
    now = SimpleNamespace(loss=0.0, step=0, weight=0.0)
    module = SimpleNamespace(adapters=SimpleNamespace(state_dict=lambda: {"a": torch.tensor([now.weight])}))

    def validated(keep, step, loss):
        now.step, now.loss, now.weight = step, loss, float(step)
        trainer = SimpleNamespace(callback_metrics={"validation/loss": loss}, global_step=step, is_global_zero=True)
        keep.on_validation_end(trainer, module)
        content = {}
        keep.on_save_checkpoint(trainer, module, content)
        return content["needs"], keep.state_dict()

    keep, states = KeepBest(tmp_path), {}
    for step, loss in [(1, 3.0), (2, 2.0), (3, 2.5), (4, 1.0), (5, 0.5), (6, 0.9)]:
        states[step] = validated(keep, step, loss)
    assert [states[step][0] for step in states] == [[f"best-{step}.ckpt"] for step in (1, 2, 2, 4, 5, 5)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best-2.ckpt", "best-4.ckpt", "best-5.ckpt"]

    again, restored = KeepBest(tmp_path), {}
    again.load_state_dict(states[4][1])  # as of step 4: what came later comes again
    again.on_fit_end(None, SimpleNamespace(adapters=SimpleNamespace(load_state_dict=restored.update)))
    assert (again.step, again.loss, restored["a"].tolist()) == (4, 1.0, [4.0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best-2.ckpt", "best-4.ckpt"]
    assert validated(again, 5, 1.5) == (["best-4.ckpt"], {"loss": 1.0, "step": 4})
