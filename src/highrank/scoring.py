"""From a model's outputs to prediction rows and metrics, in percent."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torchmetrics.functional import matthews_corrcoef, pearson_corrcoef

from highrank.task import Task


def prediction_rows(task: Task, records: Sequence[Any], outputs: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns one row per record: what was asked, what came, what it was read as, and whether that is right."""
    rows: list[dict[str, Any]] = []
    for record, output in zip(records, outputs, strict=True):
        if task.kind == "generate":
            answer = task.extract(output)
            rows.append(
                {
                    "id": record.id,
                    "prompt": record.instruction,
                    "output": output,
                    "parsed": answer,
                    "gold": record.answer,
                    "correct": task.is_correct(answer, record),
                }
            )
        else:
            row = {"id": record.id, "output": output, "gold": record.label}
            rows.append(row | ({"correct": output == record.label} if task.kind == "classify" else {}))
    return rows


def metrics(task: Task, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns n, the headline metric in percent and, for generated text, the percentage without a readable answer."""
    n = len(rows)
    found: dict[str, float] = {"n": n}
    if task.kind != "regress":
        found["accuracy"] = 100 * sum(row["correct"] for row in rows) / n
    if task.kind == "generate":
        found["unparsed"] = 100 * sum(row["parsed"] is None for row in rows) / n
    preds, golds = (
        (torch.tensor([float(row[key]) for row in rows]) for key in ("output", "gold"))
        if (task.metric in ("matthews", "pearson"))
        else (None, None)
    )
    if task.metric == "matthews":
        found["matthews"] = 100 * float(matthews_corrcoef(preds.long(), golds.long(), "multiclass", task.num_labels))
    if task.metric == "pearson":
        found["pearson"] = 100 * float(pearson_corrcoef(preds, golds))
    return found


def macro_average(task: Task, by_set: Mapping[str, Mapping[str, float]]) -> float:
    """Returns the unweighted mean of the headline metric over the sets."""
    return sum(found[task.metric] for found in by_set.values()) / len(by_set)
