"""What the untouched base makes of a test set: computed once, kept, and used by every later run of the same kind."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning
from torch import Tensor

from highrank.base.cache import cached, keep
from highrank.base.console import say
from highrank.base.files import cache_dir, digest, shown
from highrank.config.run_config import Run
from highrank.data.batches import EvalData
from highrank.train.evaluation import Outputs, check_adapters, outputs_of, scored
from highrank.train.module import FineTuner
from highrank.train.results import model_files, versions

CODE = ("data", "model", "train")
"""The packages that a base's outputs go through; what adapts it, or reads its answers, is in others."""


@dataclass(frozen=True)
class Untouched:
    """The base of one run, without its adapters."""

    run: Run
    model: Mapping[str, Any]
    """Where it came from, as in results.json."""
    known: dict[str, str] = field(default_factory=dict)
    """Of each task whose outputs were there already, the hash under which they are kept."""

    def evaluate(
        self,
        trainer: lightning.Trainer,
        module: FineTuner,
        data: EvalData,
        batch_size: int,
        save: Callable[..., None],
    ) -> tuple[dict[str, Any], int]:
        """As `evaluate`, of the base. Its outputs are kept in the user's cache under a hash of all that they depend on, and
        read from there; scores are taken anew all the same. Several processes share nothing.

        Raises:
            UserError: if decoding with the cache is not what the method computes without it.
        """
        module.eval()
        check_adapters(module, data)
        if trainer.world_size > 1:
            with module.adapters.disabled():
                return scored(data, outputs_of(trainer, module, data, batch_size), save)
        key = outputs_hash(self.run, module, data, self.model, batch_size)
        file = cache_dir() / "untouched" / f"{key}.outputs"
        content = cached(file, "the base is evaluated again")
        if content is not None:
            self.known[data.task.name] = key
            say(f"the untouched base was evaluated before: its outputs are those of {shown(file)}")
            return scored(data, _unpacked(content), save)
        found: dict[str, Outputs] = {}
        with module.adapters.disabled():
            scores = scored(data, _noted(outputs_of(trainer, module, data, batch_size), found), save)
        keep(file, json.dumps({name: asdict(outputs) for name, outputs in found.items()}).encode())
        return scores


def outputs_hash(run: Run, module: FineTuner, data: EvalData, model: Mapping[str, Any], batch_size: int) -> str:
    """Returns the sha256 over all that the outputs of an untouched base depend on, to the last bit.

    That is the model's files and how it is kept, a new head, the records, the protocol, the batches, the Trainer, the
    versions of all packages and the code that computes.
    """
    adapters, protocol = module.adapters, data.protocol
    heads = dict(adapters.model.named_parameters())
    return digest(
        {
            "model": [model_files(model)[0], run.model, run.core.start_hash],
            "head": {name: _tensor_hash(heads[name]) for name in sorted(adapters.heads)},
            "records": {name: [digest(asdict(row)) for row in rows] for name, rows in data.task.test().items()},
            "asked": [data.task.kind, data.task.max_new_tokens, protocol.hash, data.positions, adapters.num_positions],
            "seed": run.core.seed if protocol.do_sample else None,
            "batches": [batch_size, run.trainer],
            "versions": versions(),
            "code": _code_hash(),
        }
    )


def _tensor_hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


@functools.cache
def _code_hash() -> str:
    files = [file for part in CODE for file in sorted((Path(__file__).parents[1] / part).glob("*.py"))]
    return digest([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])


def _noted(outputs: Iterator[tuple[str, Outputs]], found: dict[str, Outputs]) -> Iterator[tuple[str, Outputs]]:
    for name, each in outputs:
        found[name] = each
        yield name, each


def _unpacked(content: bytes) -> Iterator[tuple[str, Outputs]]:
    for name, outputs in json.loads(content).items():
        answers = [_answer(answer) for answer in outputs["answers"]]
        yield name, Outputs(answers, outputs["losses"], outputs["batch_size"])


def _answer(stored: Any) -> Any:
    """Returns an answer as the model's: options are numbered, and JSON's keys are texts."""
    return {int(option): score for option, score in stored.items()} if isinstance(stored, dict) else stored
