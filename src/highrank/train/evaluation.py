"""Evaluation: a model's outputs for every record, and their scores."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning
from lightning.pytorch.utilities.memory import garbage_collection_cuda

from highrank.base.processes import gather
from highrank.data.batches import EvalData, TrainingData
from highrank.data.scoring import evaluate_rows, macro_average
from highrank.train.effect import check_decoding
from highrank.train.memory import DoesNotFit
from highrank.train.module import LACKING, FineTuner


def predict(
    trainer: lightning.Trainer, module: FineTuner, data: EvalData, name: str, records: Sequence[Any], batch_size: int
) -> tuple[list[Any], int]:
    """Returns the model's output per record of a test set, in the records' order, and the batch size that fitted.

    What memory does not suffice for, in any process, comes again in batches of half the size.

    Raises:
        DoesNotFit: if one record is too much.
    """
    outputs: list[Any] = [None] * len(records)
    while left := [place for place, output in enumerate(outputs) if output is None]:
        batches: Any = trainer.predict(module, data.dataloader(name, records, batch_size, left)) or []
        lacking = []
        for place, output in gather([pair for batch in batches for pair in batch]):
            if place == LACKING:
                lacking.append(output)
            elif outputs[place] is None:  # a process without a batch of its own repeated the first
                outputs[place] = output
        if lacking:
            if batch_size == 1:
                raise DoesNotFit(lacking[0], 1)
            batch_size //= 2
            garbage_collection_cuda()
    return outputs, batch_size


def evaluate(
    trainer: lightning.Trainer, module: FineTuner, data: EvalData, batch_size: int, save: Callable[..., None]
) -> tuple[dict[str, Any], int]:
    """Evaluates every test set and saves the predictions.

    Returns metrics per set and their macro average, and the batch size that fitted into memory.

    Raises:
        UserError: if decoding with the cache is not what the method computes without it.
    """
    module.eval()
    by_set, test_sets = {}, data.task.test()
    first = next(iter(test_sets.values()))[0]
    check_decoding(module.adapters, data.question(first).input_ids)
    for name, records in test_sets.items():
        outputs, batch_size = predict(trainer, module, data, name, records, batch_size)
        rows, by_set[name] = evaluate_rows(data, name, records, outputs)
        save(name, rows)
    return {"sets": by_set, data.task.metric: macro_average(data.task, by_set)}, batch_size


def validate(trainer: lightning.Trainer, module: FineTuner, data: TrainingData) -> dict[str, float]:
    """Returns the mean loss over the held-out training examples, in nats for texts and classes, and how many were used."""
    (metrics,) = trainer.validate(module, data.val_dataloader(), verbose=False)
    return {"loss": metrics["validation/loss"], "n": len(data.held_out)}
