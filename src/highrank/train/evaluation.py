"""Evaluation: a model's outputs for every record, its loss on the gold answers, and their scores."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning
from lightning.pytorch.utilities.memory import garbage_collection_cuda
from torch.utils.data import DataLoader

from highrank.base.processes import gather
from highrank.data.batches import EvalData, TrainingData, ranks
from highrank.data.encoding import num_targets
from highrank.data.scoring import evaluate_rows, gold_loss, macro_averages
from highrank.train.effect import check_decoding
from highrank.train.memory import DoesNotFit
from highrank.train.module import LACKING, FineTuner

Answers = dict[str, tuple[list[Any], list[dict[str, Any]] | None]]
"""Per test set, the model's output for each record, and the loss on its gold answer where that is a text."""


def predict(
    trainer: lightning.Trainer, module: FineTuner, data: EvalData, name: str, records: Sequence[Any], batch_size: int
) -> tuple[list[Any], int]:
    """Returns the model's output per record of a test set, in the records' order, and the batch size that fitted.

    What memory does not suffice for, in any process, comes again in batches of half the size.

    Raises:
        DoesNotFit: if one record is too much.
    """
    outputs, batch_size = _by_place(
        trainer, module, partial(data.dataloader, name, records), range(len(records)), batch_size
    )
    return [outputs[place] for place in range(len(records))], batch_size


def gold_losses(
    trainer: lightning.Trainer,
    module: FineTuner,
    data: EvalData,
    name: str,
    records: Sequence[Any],
    outputs: Sequence[Any],
    batch_size: int,
) -> list[dict[str, Any]]:
    """Returns a `gold_loss` per record of a test set: one forward pass each, in batches as `predict` has them.

    Of a gold answer that likelihood ranking has as an option, `outputs` hold the loss already.

    Raises:
        DoesNotFit: if one record is too much.
    """
    rows = {place: row for place, record in enumerate(records) if (row := data.gold(record)) is not None}
    nats: dict[int, float] = {}
    if ranks(records, data.protocol):
        options = {place: data.gold_option(records[place], row) for place, row in rows.items()}
        nats = {place: -outputs[place][option] for place, option in options.items() if option is not None}
    left = [place for place in rows if place not in nats]
    nats |= _by_place(trainer, module, partial(data.gold_dataloader, name, rows), left, batch_size)[0]
    return [
        gold_loss(nats[place], num_targets(rows[place]), bool(rows[place].cut))
        if place in rows
        else gold_loss(None, 0, cut=False)
        for place in range(len(records))
    ]


def _by_place(
    trainer: lightning.Trainer,
    module: FineTuner,
    dataloader: Callable[[int, Sequence[int]], DataLoader],
    places: Sequence[int],
    batch_size: int,
) -> tuple[dict[int, Any], int]:
    """Returns what the model computes of each place, and the batch size that fitted; `dataloader(size, places)` batches."""
    outputs: dict[int, Any] = {}
    while left := [place for place in places if place not in outputs]:
        batches: Any = trainer.predict(module, dataloader(batch_size, left)) or []
        lacking = []
        for place, output in gather([pair for batch in batches for pair in batch]):
            if place == LACKING:
                lacking.append(output)
            else:
                outputs.setdefault(place, output)  # a process without a batch of its own repeated the first
        if lacking:
            if batch_size == 1:
                raise DoesNotFit(lacking[0], 1)
            batch_size //= 2
            garbage_collection_cuda()
    return outputs, batch_size


def answer(
    trainer: lightning.Trainer,
    module: FineTuner,
    data: EvalData,
    test_sets: Mapping[str, Sequence[Any]],
    batch_size: int,
) -> tuple[Answers, int]:
    """Returns what the model answers to every test set, and the batch size that fitted into memory."""
    answers = {}
    for name, records in test_sets.items():
        outputs, batch_size = predict(trainer, module, data, name, records, batch_size)
        losses = None
        if data.task.kind == "generate":
            losses = gold_losses(trainer, module, data, name, records, outputs, batch_size)
        answers[name] = outputs, losses
    return answers, batch_size


def evaluate(
    trainer: lightning.Trainer,
    module: FineTuner,
    data: EvalData,
    batch_size: int,
    save: Callable[..., None],
    by: Callable[..., tuple[Answers, int]] = answer,
) -> tuple[dict[str, Any], int]:
    """Evaluates every test set and saves the predictions; `by` gives the model's answers, as `answer` does.

    Returns metrics per set and their macro averages, and the batch size that fitted into memory.

    Raises:
        UserError: if decoding with the cache is not what the method computes without it.
    """
    module.eval()
    test_sets = data.task.test()
    first = next(iter(test_sets.values()))[0]
    check_decoding(module.adapters, data.question(first).input_ids)
    answers, batch_size = by(trainer, module, data, test_sets, batch_size)
    by_set = {}
    for name, records in test_sets.items():
        rows, by_set[name] = evaluate_rows(data, name, records, *answers[name])
        save(name, rows)
    return {"sets": by_set, **macro_averages(data.task, by_set)}, batch_size


def validate(trainer: lightning.Trainer, module: FineTuner, data: TrainingData) -> dict[str, float]:
    """Returns the mean loss over the held-out training examples, in nats for texts and classes, and how many were used."""
    (metrics,) = trainer.validate(module, data.val_dataloader(), verbose=False)
    return {"loss": metrics["validation/loss"], "n": len(data.held_out)}
