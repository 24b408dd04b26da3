"""Evaluation: a model's outputs for every record, and their scores."""

from collections.abc import Callable
from typing import Any

import lightning
from lightning.pytorch.utilities.memory import garbage_collection_cuda

from highrank.base.processes import gather
from highrank.data.batches import TaskData
from highrank.data.scoring import evaluate_rows, macro_average
from highrank.train.effect import check_decoding
from highrank.train.memory import DoesNotFit
from highrank.train.module import FineTuner


def predict(trainer: lightning.Trainer, module: FineTuner, data: TaskData, records: Any) -> list[Any]:
    """Returns the model's output per record, in the records' order.

    What memory does not suffice for, in any process, comes again in batches of half the size.

    Raises:
        DoesNotFit: if one record is too much.
    """
    outputs: list[Any] = [None] * len(records)
    while left := [place for place, output in enumerate(outputs) if output is None]:
        module.lacking = None
        batches: Any = trainer.predict(module, data.eval_dataloader(records, left)) or []
        for place, output in gather([pair for batch in batches for pair in batch]):
            if outputs[place] is None:  # a process without a batch of its own repeated the first
                outputs[place] = output
        if lacking := [said for said in gather([module.lacking]) if said]:
            if data.test_batch_size == 1:
                raise DoesNotFit(lacking[0], 1)
            data.test_batch_size //= 2
            garbage_collection_cuda()
    return outputs


def evaluate(
    trainer: lightning.Trainer, module: FineTuner, data: TaskData, save: Callable[..., None]
) -> dict[str, Any]:
    """Evaluates every test set; returns metrics per set and their macro average, and saves the predictions.

    Raises:
        UserError: if decoding with the cache is not what the method computes without it.
    """
    by_set, test_sets = {}, data.task.test()
    if data.task.kind == "generate":
        first = next(iter(test_sets.values()))[0]
        check_decoding(module.adapters, data.prompt(first).input_ids)
    for name, records in test_sets.items():
        module.test_set = name
        rows, by_set[name] = evaluate_rows(data, name, records, predict(trainer, module, data, records))
        save(name, rows)
    return {"sets": by_set, data.task.metric: macro_average(data.task, by_set)}


def validate(trainer: lightning.Trainer, module: FineTuner, data: TaskData) -> dict[str, float]:
    """Returns the mean loss over the held-out training examples, in nats for texts and classes, and their number."""
    (found,) = trainer.validate(module, data.val_dataloader(), verbose=False)
    return {"loss": found["validation/loss"], "n": len(data.validation)}
