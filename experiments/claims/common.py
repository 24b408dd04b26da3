"""What the scripts share: a model with adapters and batches as a run has them, a plain training loop, tables and JSON."""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from highrank.base.errors import UserError
from highrank.config.words import compose_run
from highrank.data.batches import TrainingData
from highrank.model.adapters import Adapters
from highrank.model.backbones import Backbone
from highrank.train.build import build_model, load_plain
from highrank.train.objectives import OBJECTIVES


@dataclass(frozen=True)
class Subject:
    """A model with adapters on it, and what it is trained and tried on."""

    adapters: Adapters
    batches: list[dict[str, Tensor]]
    held_out: list[dict[str, Tensor]]
    loss: Callable[[dict[str, Tensor]], Tensor]

    def held_out_loss(self) -> float:
        """Returns the mean of the held-out batches' losses."""
        with torch.no_grad():
            return float(torch.stack([self.loss(batch) for batch in self.held_out]).mean())

    def train(
        self, steps: int, lr: float, head_lr: float, before_step: Callable[[], None] = lambda: None
    ) -> Iterator[float]:
        """Takes steps of AdamW without decay and yields each one's loss; `before_step` sees the gradients."""
        optimizer = torch.optim.AdamW(self.adapters.parameter_groups(lr, head_lr=head_lr))
        for batch in islice(self.batches, steps):
            loss = self.loss(batch)
            loss.backward()
            before_step()
            optimizer.step()
            optimizer.zero_grad()
            yield float(loss.detach())


@contextmanager
def subject(words: Sequence[str], steps: int, base: Backbone | None = None) -> Iterator[Subject]:
    """Gives the model, adapters and first batches of the run that these words make; `base` is the same model, read before."""
    run = compose_run(words)
    task = run.make_task()
    backbone, adapters = build_model(run, task, base or load_plain(run, task))
    core = run.core
    data = TrainingData(task, run.protocol, backbone.tokenizer, core.batch_size, core.eval_batch_size, core.seed)
    batches = list(islice(data.train_dataloader(), steps))
    if len(batches) < steps:
        raise UserError(
            f"claims: an epoch must hold every step, got {len(batches)} of {steps}; lower --steps or batch_size"
        )
    held_out = list(data.val_dataloader()) if data.held_out else []
    loss = OBJECTIVES[task.kind].loss
    yield Subject(adapters, batches, held_out, lambda batch: loss(adapters.model, batch)[0])
    adapters.unload()


def arguments(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Returns a parser for words of run.py, `--json`, and integers or numbers by their defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="words of run.py: model=, task=, batch_size=, ...")
    parser.add_argument("--json", type=Path, help="file for settings and all numbers")
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default {value}")
    return parser


def words_of(given: Sequence[str], **wanted: Any) -> list[str]:
    """Returns the words given, and those wanted that they leave open; `__` in a name stands for `.`."""
    keys = {word.partition("=")[0] for word in given}
    wanted = {name.replace("__", "."): value for name, value in wanted.items()}
    return [*(f"{name}={value}" for name, value in wanted.items() if name not in keys), *given]


def report(args: argparse.Namespace, columns: Sequence[str], rows: Iterable[Sequence[Any]], results: Any) -> None:
    """Prints a Markdown table, and writes settings and results where `--json` says."""
    print("| " + " | ".join(columns) + " |")
    print("|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"settings": settings, "results": results}, indent=1, default=str) + "\n")
