"""What the untouched model answers: computed once, and kept in the cache for every later run that would ask it the same."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import lightning
import torch

from highrank.base.console import say
from highrank.base.files import cache_dir, digest
from highrank.base.kept import keep, read_kept
from highrank.config.run_config import Run
from highrank.data.batches import EvalData
from highrank.model.adapters import Adapters
from highrank.train.evaluation import Answers, answer
from highrank.train.module import FineTuner
from highrank.train.results import versions

LAYOUT = 1
"""Raised when a kept file is laid out otherwise."""


class Untouched:
    """The model before training, with its adapters off, unless it starts with those of another run.

    Answers are kept under a hash of everything that they depend on: the model's files and number type, the questions, the
    protocol, batch size, device, threads and versions, and this package's own code. So a reused answer is the one that
    would come again. Not kept are those of random models and about images, and of several processes.
    """

    def __init__(self, run: Run, source: Mapping[str, Any], adapters: Adapters):
        self.run, self.source, self.adapters = run, source, adapters
        self.reused: list[str] = []
        """The tasks whose answers an earlier run had kept."""

    def answer(
        self,
        trainer: lightning.Trainer,
        module: FineTuner,
        data: EvalData,
        test_sets: Mapping[str, Sequence[Any]],
        batch_size: int,
    ) -> tuple[Answers, int]:
        """Returns what the untouched model answers to every test set, and the batch size that fitted into memory."""
        if self.run.core.start_as == "adapter":
            return answer(trainer, module, data, test_sets, batch_size)
        if not self._can_be_kept(trainer, data):
            with self.adapters.untouched():
                return answer(trainer, module, data, test_sets, batch_size)
        file = cache_dir() / "untouched" / f"{self._key(data, test_sets, batch_size)}.json"
        if (kept := read_kept(file)) is not None:
            say(f"{data.task.name}: the untouched model's answers are kept from an earlier run")
            self.reused.append(data.task.name)
            return _unpack(json.loads(kept)), batch_size
        with self.adapters.untouched():
            answers, fitting = answer(trainer, module, data, test_sets, batch_size)
        if fitting == batch_size:
            keep(file, json.dumps(answers).encode())
        return answers, fitting

    def _can_be_kept(self, trainer: lightning.Trainer, data: EvalData) -> bool:
        return trainer.world_size == 1 and self.source["kind"] != "random" and data.task.kind != "classify_images"

    def _key(self, data: EvalData, test_sets: Mapping[str, Sequence[Any]], batch_size: int) -> str:
        core, draws = self.run.core, data.protocol.do_sample or bool(self.adapters.heads)
        return digest(
            {
                "layout": LAYOUT,
                "code": _code(),
                "versions": versions(),
                "threads": torch.get_num_threads(),
                "trainer": self.run.trainer,
                "model": [self.run.model, self.source["sha"], dict(self.source["files"])],
                "start": core.start_hash,
                "seed": core.seed if draws else None,
                "positions": self.adapters.num_positions,
                "chat_template": str(data.tokenizer.chat_template),
                "protocol": asdict(data.protocol),
                "task": [data.task.kind, data.task.num_labels, data.task.max_new_tokens],
                "batch_size": batch_size,
                "questions": {name: [asdict(each) for each in records] for name, records in test_sets.items()},
            }
        )


def _unpack(answers: Mapping[str, Any]) -> Answers:
    """Undoes JSON, in which options have texts for numbers."""
    return {name: ([_output(output) for output in outputs], losses) for name, (outputs, losses) in answers.items()}


def _output(output: Any) -> Any:
    return {int(option): nats for option, nats in output.items()} if isinstance(output, dict) else output


@cache
def _code() -> str:
    """Returns the sha256 of this package's source files."""
    content = hashlib.sha256()
    root = Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        content.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return content.hexdigest()
