"""Run by test_devices.py: a run of which one process is disturbed, `disturbed.py PROCESS HOW key=value ...`.

stop      gets SIGTERM in its fourth step
evaluate  has memory for one example at a time in evaluation
train     has none in its third step
"""

import os
import signal
import sys

import torch

from highrank.cli import main
from highrank.train.module import FineTuner

PROCESS, HOW, WORDS = sys.argv[1], sys.argv[2], sys.argv[3:]
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory.")
outputs, training_step = FineTuner.outputs, FineTuner.training_step


def outputs_of_one(self, batch, index=0):
    if len(batch["index"]) > 1:
        raise NO_MEMORY
    return outputs(self, batch, index)


def disturbed_step(self, batch, index):
    if HOW == "stop" and self.trainer.global_step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    if HOW == "train" and self.trainer.global_step == 2:
        raise NO_MEMORY
    return training_step(self, batch, index)


if os.environ.get("RANK", "0") == PROCESS:
    if HOW == "evaluate":
        FineTuner.outputs = outputs_of_one
    else:
        FineTuner.training_step = disturbed_step
sys.exit(main(["run", *WORDS]))
