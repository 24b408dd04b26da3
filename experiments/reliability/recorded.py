"""Tries of one run, each in a process of its own that can be killed or kept short, with every micro-batch written down."""

import contextlib
import hashlib
import multiprocessing
import os
import resource
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from highrank.cli import main
from highrank.train.module import FineTuner

WORDS = [
    *("model=tiny_llama", "method=lora", "r=2", "dropout=0.1", "placement=all", "schedule=cosine"),
    *("task.n_train=21", "task.n_test=2", "batch_size=2", "accumulate=2", "epochs=8"),
    *("protocol.num_validation=3", "protocol.selection=best", "protocol.validate_every=3"),
]
"""A run with everything that must be restored: dropout, accumulation, a last batch and a last step of an epoch that are
not full, a schedule, a validation that chooses the weights. 40 optimizer steps in 8 epochs of 9 batches."""


def start(folder: Path, words: Sequence[str], largest_file: int | None = None) -> BaseProcess:
    """Starts a try in `folder`; no file may get larger than `largest_file` bytes. Its stderr goes to <folder>.err."""
    os.environ["OMP_NUM_THREADS"] = "1"
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["highrank.run", __name__])
    process = processes.Process(target=attempt, args=(folder, list(words), largest_file))
    process.start()
    return process


def attempt(folder: Path, words: list[str], largest_file: int | None) -> None:
    record(Path(f"{folder}.batches"))
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    with contextlib.ExitStack() as outputs:
        outputs.enter_context(contextlib.redirect_stdout(outputs.enter_context(open(os.devnull, "w"))))
        outputs.enter_context(contextlib.redirect_stderr(outputs.enter_context(open(f"{folder}.err", "w"))))
        sys.exit(main(["run", *words, f"run_dir={folder}"]))


def finish(folder: Path, words: Sequence[str], largest_file: int | None = None) -> int:
    """Lets a try come to its end; returns its exit status."""
    process = start(folder, words, largest_file)
    process.join()
    return process.exitcode or 0


def record(file: Path) -> None:
    """Lets every training step of this process write a line: epoch, place in it, sha256 of its tokens."""
    step = FineTuner.training_step

    def training_step(self, batch, index):
        digest = hashlib.sha256(batch["input_ids"].numpy().tobytes()).hexdigest()
        with open(file, "a") as lines:
            lines.write(f"{self.trainer.current_epoch} {index} {digest}\n")
        return step(self, batch, index)

    FineTuner.training_step = training_step
