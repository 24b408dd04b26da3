"""Checkpoints: what a run that was killed needs to go on as if it had not been, in files that are whole or not there.

    checkpoints/last.ckpt         the newest: what trains, its optimizer and schedule, the place in the data, the random
                                  generators and counters; nothing frozen
    checkpoints/previous.ckpt     the one before, used if the newest is damaged
    checkpoints/best-<step>.ckpt  the weights of the best validation so far, where the protocol selects by it

A file is what `torch.save` writes, followed by the sha256 of that; it is loaded with `weights_only=True`.
"""

import contextlib
import errno
import hashlib
import io
import os
import pickle
import random
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import numpy
import torch
from lightning.fabric.plugins.io import CheckpointIO
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from highrank.base.errors import UserError
from highrank.base.processes import gather, highest
from highrank.data.batches import LengthBuckets
from highrank.train.lightning_internals import before_this_batch, count_logged_steps

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
DIGEST_BYTES = hashlib.sha256().digest_size
MINUTES_BETWEEN = 10
"""A checkpoint is also written when the last is this old."""


class Damaged(Exception):
    """A file that is not, bit for bit, a checkpoint of ours."""


def write(path: Path, content: Mapping[str, Any], previous: Path | None = None) -> None:
    """Writes tensors, numbers, texts and their collections, and reads the file back before it gets its name.

    Whatever goes wrong, `path` is whole: as it was, or new. What had the name before moves to `previous`.

    Raises:
        OSError: if the disk does not take it, or gives back something else.
    """
    buffer = io.BytesIO()
    torch.save(one_storage_per_type(content), buffer)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.partial")
    try:
        with open(fresh, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if _digest(fresh) != buffer.getbuffer()[-DIGEST_BYTES:]:
            raise OSError(errno.EIO, "not written as it was given", str(fresh))
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(fresh, path)
    finally:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
    _flush_names(path.parent)


def read(path: Path) -> dict[str, Any]:
    """Returns what `write` was given, tensors on the CPU.

    Raises:
        Damaged: if the file was cut or changed, or holds anything but tensors and plain values.
    """
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - DIGEST_BYTES))
        expected = file.read()
    if _digest(path) != expected:
        raise Damaged(f"{path.name} is damaged: its sha256 does not match")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise Damaged(f"{path.name} is refused: {str(error).splitlines()[0]}") from error
    return apply_to_collection(content, Tensor, torch.clone)


def _digest(path: Path) -> bytes:
    """Returns the sha256 of a file without its last DIGEST_BYTES."""
    hasher, left = hashlib.sha256(), path.stat().st_size - DIGEST_BYTES
    with open(path, "rb") as file:
        while left > 0 and (chunk := file.read(min(left, 2**20))):
            hasher.update(chunk)
            left -= len(chunk)
    return hasher.digest()


def _flush_names(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def one_storage_per_type(content: Any) -> Any:
    """Returns `content` with its tensors as CPU views of one storage per dtype: a file has 250 bytes more per storage."""
    tensors: list[Tensor] = []
    apply_to_collection(content, Tensor, tensors.append)
    flat = {
        dtype: torch.cat([t.detach().cpu().flatten() for t in tensors if t.dtype == dtype])
        for dtype in {t.dtype for t in tensors}
    }
    taken: Counter[torch.dtype] = Counter()

    def view(tensor: Tensor) -> Tensor:
        start = taken[tensor.dtype]
        taken[tensor.dtype] += tensor.numel()
        return flat[tensor.dtype][start : start + tensor.numel()].view(tensor.shape)

    return apply_to_collection(content, Tensor, view)


class ResumePoint(NamedTuple):
    """A checkpoint to go on from."""

    path: Path
    step: int
    damage: str
    """What is wrong with the newest, if this is not it."""

    @property
    def told(self) -> str:
        return f"going on from {self.path.name}, step {self.step}" + (f", because {self.damage}" if self.damage else "")


def newest(folder: Path) -> ResumePoint | None:
    """Returns the newest checkpoint that is whole, or None if none was written; one that is not is put aside.

    Raises:
        UserError: if every checkpoint is damaged.
    """
    damage: list[str] = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.is_file():
            continue
        try:
            content = read(path)
            if lacking := {"needs", "global_step", "place", "processes"} - content.keys():
                raise Damaged(f"{path.name} is no checkpoint of this version: it lacks {', '.join(sorted(lacking))}")
            for name in content["needs"]:
                read(folder / name)
        except (Damaged, OSError) as error:
            damage.append(str(error))
            continue
        if damage:
            os.replace(folder / LAST, folder / f"{LAST}.damaged")
        return ResumePoint(path, content["global_step"], "; ".join(damage))
    if damage:
        raise UserError(
            f"checkpoint: a run goes on from a whole checkpoint, got {'; '.join(damage)} in {folder}; "
            "start afresh with resume=never"
        )
    return None


class CheckpointFiles(CheckpointIO):
    """Takes Lightning's checkpoints to disk and back."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write(Path(path), checkpoint, previous=Path(path).with_name(PREVIOUS))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class Checkpoints(Callback):
    """Saves every `every` optimizer steps, every MINUTES_BETWEEN, at a signal and at the end, and restores.

    A checkpoint is taken just before the first micro-batch of a step. Nothing of the step before is pending then: its
    gradient is used up, a validation after it is done.
    """

    def __init__(self, folder: Path, every: int, sampler: LengthBuckets, stop: Any, first: bool = False):
        self.path, self.every, self.sampler, self.stop = folder / LAST, every, sampler, stop
        self.first = first
        """Whether one is saved before the first step too."""
        self.find()
        self.seconds = 0.0
        """Time of training, without what was lost in a kill."""
        self._generators: dict[str, Any] | None = None
        self._began = self._saved_step = 0
        self._saved_at = self._counted_to = 0.0

    def find(self) -> None:
        """Looks for what training goes on from: `resume_from`."""
        self.resume_from = newest(self.path.parent)

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self._began = self._saved_step = trainer.global_step
        self._saved_at = self._counted_to = time.perf_counter()

    def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, batch: Any, index: int) -> None:
        if self._generators is not None:
            set_generators(self._generators, trainer.strategy.root_device)
            self._generators = None
            count_logged_steps(trainer)
        if index % trainer.accumulate_grad_batches:
            return
        stopping = self.stop.agree(trainer) and trainer.global_step > self._began  # every try gets on by a step
        age = highest(int(time.perf_counter() - self._saved_at), trainer.strategy.root_device)
        due = trainer.global_step - self._saved_step >= self.every or age >= 60 * MINUTES_BETWEEN
        due |= self.first and self.resume_from is None and trainer.global_step == 0
        if due or stopping:
            self.save(trainer)
        if stopping:
            self.stop.check()

    def on_train_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self.save(trainer)

    def save(self, trainer: lightning.Trainer) -> None:
        now = time.perf_counter()
        self.seconds += now - self._counted_to
        self._counted_to = now
        trainer.save_checkpoint(self.path)
        self._saved_step, self._saved_at = trainer.global_step, time.perf_counter()

    def on_save_checkpoint(self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        batch = before_this_batch(checkpoint)
        states = generators(trainer.strategy.root_device)
        checkpoint["processes"] = gather([{"generators": states, "num_tokens": module.num_tokens}])
        checkpoint["place"] = {"epoch": trainer.current_epoch, "batch": batch}
        checkpoint["seconds"] = self.seconds
        checkpoint.setdefault("needs", [])

    def on_load_checkpoint(self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        processes = checkpoint["processes"]
        if len(processes) != trainer.world_size:
            raise UserError(
                f"checkpoint: a run goes on with as many processes as it had, got {trainer.world_size} instead of "
                f"{len(processes)}; set trainer.devices, or start afresh with resume=never"
            )
        mine = processes[trainer.global_rank]
        self._generators, module.num_tokens = mine["generators"], mine["num_tokens"]
        check_generators(self._generators, trainer.strategy.root_device)
        self.seconds = checkpoint["seconds"]
        self.sampler.start_at(**checkpoint["place"])


def generators(device: torch.device) -> dict[str, Any]:
    """Returns the state of every random generator of a process that computes on `device`, as a checkpoint can hold it.

    Of several GPUs this is the process's own: how many others a machine has does not matter.
    """
    state: Any = numpy.random.get_state()
    name, keys, *rest = state
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "device": device.type,
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
    }


def check_generators(states: Mapping[str, Any], device: torch.device) -> None:
    """Raises UserError unless the states are those of a process on this kind of device.

    Earlier checkpoints have the states of every GPU in sight and do not name the device.
    """
    had, num_gpus = states.get("device", device.type), len(states["cuda"])
    if had != device.type or (device.type == "cuda" and num_gpus != 1):
        raise UserError(
            f"checkpoint: a run goes on on the kind of device that it had, got {device.type} instead of {had} (random "
            f"states of {num_gpus} GPUs); set trainer.accelerator, or start afresh with resume=never"
        )


def set_generators(states: Mapping[str, Any], device: torch.device) -> None:
    random.setstate(states["python"])
    numpy.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"][0], device)
