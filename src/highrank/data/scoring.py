"""From a model's outputs to prediction rows and metrics, in percent."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torchmetrics.functional import matthews_corrcoef, pearson_corrcoef, spearman_corrcoef
from torchmetrics.functional.classification import binary_f1_score

from highrank.data import leak
from highrank.data.answers import RULES, judge_all, reported
from highrank.data.batches import EvalData, ranks
from highrank.data.chat import prompt_of
from highrank.data.encoding import prompt_text
from highrank.data.protocol import Protocol
from highrank.data.task import Example, LabelledImage, Task

MOST_NATS = 700
"""The largest loss whose exponential is a number."""


def prediction_rows(data: EvalData, records: Sequence[Any], outputs: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns one row per record: what was asked, what came, what it was read as, and whether that is right.

    `correct_<rule>` and `parsed_<rule>` are the other answer rules'; `leaked` marks questions seen in training; `cut`
    marks an encoder's texts that the cut-off shortened. `text` is the output up to the protocol's stop texts, where it
    differs. An image's output comes as its class with the loss on the right one.
    """
    rows: list[dict[str, Any]] = []
    for record, output, leaked in zip(records, outputs, data.leaked(records), strict=True):
        if isinstance(record, Example):
            asked = prompt_of(record, data.tokenizer) if record.messages else None
            row = {"id": record.id, "prompt": asked or prompt_text(record, data.protocol, evaluation=True)}
            row |= _read(record, output, data.protocol, ranked=ranks(records, data.protocol))
        elif isinstance(record, LabelledImage):
            answer, nats = output
            row = {"id": record.id, "output": answer, "gold": record.label, "correct": answer == record.label}
            row |= gold_loss(nats, 1, cut=False)
        else:
            row = {"id": record.id, "output": output, "gold": record.label, "cut": bool(data.question(record).cut)}
            if isinstance(output, int):  # a class
                row["correct"] = output == record.label
        rows.append({**row, "leaked": leaked})
    return rows


def _read(record: Example, output: Any, protocol: Protocol, ranked: bool) -> dict[str, Any]:
    if ranked:
        answer = None if not_finite(output) else record.choices[max(sorted(output), key=output.__getitem__)]
        return {"output": output, "parsed": answer, "gold": record.answer, "correct": answer == record.answer}
    text = output
    for stop in protocol.stop:
        text = text.partition(stop)[0]
    row: dict[str, Any] = {"output": output, "gold": list(record.references) or record.answer}
    if text != output:
        row["text"] = text
    if record.answers:
        row["parsed"], row["correct"] = judge_all(text, record.answers)
        return row
    for rule in reported(protocol.answer_rule, bool(record.choices)):
        end = "" if rule == protocol.answer_rule else f"_{rule}"
        row[f"parsed{end}"], row[f"correct{end}"] = RULES[rule].judge(text, record.answer, record.choices)
    return row


def gold_loss(nats: float | None, targets: int, cut: bool) -> dict[str, Any]:
    """Returns what a prediction row says of its gold answer's loss: `nats`, the sum over its `target_tokens`, null if it is
    no number or nothing of the answer is within the cut-off; `target_cut` where the cut-off took a part."""
    return {
        "nats": nats if nats is not None and math.isfinite(nats) else None,
        "target_tokens": targets,
        **({"target_cut": True} if cut else {}),
    }


def metrics(task: Task, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns n, the task's metrics and, for generated text, the percentage without a readable answer, per rule.

    `leaked` counts the questions seen in training, None where the training data is gone; if there are some,
    `<metric>_clean` is that of the others. `cut` counts an encoder's shortened texts, and `not_finite` the predictions that
    are no number, which count as wrong, if there are some. For texts, `loss` is the mean over the gold answers' tokens in
    nats, and `perplexity` its exponential; `loss_left_out`, `loss_cut` and `loss_not_finite` count the answers of which the
    cut-off left nothing, or a part, and those whose loss is no number: with one of these, there is no loss.
    """
    scores = _metrics(task, rows)
    if lost := sum(not_finite(row["output"]) for row in rows):
        scores["not_finite"] = lost
    if any(row.get("cut") for row in rows):
        scores["cut"] = sum(row["cut"] for row in rows)
    counts = {
        "loss_left_out": sum(row.get("target_tokens") == 0 for row in rows),
        "loss_cut": sum(row.get("target_cut", False) for row in rows),
        "loss_not_finite": sum(row["nats"] is None for row in rows if row.get("target_tokens")),
    }
    scores |= {name: count for name, count in counts.items() if count}
    seen = [row["leaked"] for row in rows]
    scores["leaked"] = None if None in seen else sum(seen)
    if any(seen) and not all(seen):
        clean = _metrics(task, [row for row in rows if not row["leaked"]])
        scores |= {f"{name}_clean": value for name, value in clean.items()}
    return scores


def _metrics(task: Task, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    scores: dict[str, Any] = {"n": len(rows)}
    for name in task.metrics:
        scores |= {name: MEASURES[name](task, rows)} if name in MEASURES else task.measure(name, rows)
    for key in rows[0]:
        kind, _, rule = key.partition("_")
        if kind == "correct" and rule and "accuracy" in task.metrics:
            scores[f"accuracy_{rule}"] = _share(rows, key)
        if kind == "parsed" and "accuracy" in task.metrics:
            scores["unparsed" + (f"_{rule}" if rule else "")] = 100 * sum(row[key] is None for row in rows) / len(rows)
    return scores | _loss(rows)


def _loss(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the gold answers' loss and perplexity, if there is a loss of each answer."""
    taken = [row for row in rows if row.get("target_tokens")]
    if not taken or any(row["nats"] is None for row in taken):
        return {}
    loss = sum(row["nats"] for row in taken) / sum(row["target_tokens"] for row in taken)
    return {"loss": loss, **({"perplexity": math.exp(loss)} if loss < MOST_NATS else {})}


def _share(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return 100 * sum(row[key] for row in rows) / len(rows)


def not_finite(output: Any) -> bool:
    """Whether a prediction is no number: a class of -1, a value or an option's log-probability that is not finite."""
    if isinstance(output, int):
        return output == -1
    values = output.values() if isinstance(output, Mapping) else [output]
    return any(isinstance(value, float) and not math.isfinite(value) for value in values)


def _columns(rows: Sequence[Mapping[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    preds, gold = (torch.tensor([float(row[key]) for row in rows], dtype=torch.float64) for key in ("output", "gold"))
    return preds, gold


def _classes(task: Task, rows: Sequence[Mapping[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns predicted and gold classes; for a prediction that is no class, one that is wrong."""
    preds, gold = (column.long() for column in _columns(rows))
    return torch.where(preds < 0, (gold + 1) % max(2, task.num_labels), preds), gold


def _values(rows: Sequence[Mapping[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns predicted and gold values; for a prediction that is no number, the most wrong of the others: the lowest for
    a gold value above the mean, else the highest."""
    preds, gold = _columns(rows)
    there = preds.isfinite()
    if not there.any():
        return torch.zeros_like(preds), gold
    most_wrong = torch.where(gold > gold.mean(), preds[there].min(), preds[there].max())
    return torch.where(there, preds, most_wrong), gold


def _matthews(task: Task, rows: Sequence[Mapping[str, Any]]) -> float:
    """Matthews correlation; 0 where predictions or gold labels are all one class (torchmetrics gives 2.6 % there)."""
    preds, gold = _classes(task, rows)
    if min(preds.unique().numel(), gold.unique().numel()) < 2:
        return 0.0
    return 100 * float(matthews_corrcoef(preds, gold, "multiclass", num_classes=task.num_labels))


def _f1(task: Task, rows: Sequence[Mapping[str, Any]]) -> float:
    """F1 of class 1."""
    preds, gold = _classes(task, rows)
    return 100 * float(binary_f1_score(preds, gold))


def _correlation(measure: Any) -> Any:
    def correlation(task: Task, rows: Sequence[Mapping[str, Any]]) -> float:
        """Correlation; 0 where predictions or gold values are all equal, and none is defined."""
        preds, gold = _values(rows)
        return 100 * float(measure(preds, gold)) if preds.unique().numel() > 1 < gold.unique().numel() else 0.0

    return correlation


MEASURES: dict[str, Callable[[Task, Sequence[Mapping[str, Any]]], float]] = {
    "accuracy": lambda task, rows: _share(rows, "correct"),
    "matthews": _matthews,
    "f1": _f1,
    "pearson": _correlation(pearson_corrcoef),
    "spearman": _correlation(spearman_corrcoef),
}


def evaluate_rows(
    data: EvalData,
    name: str,
    records: Sequence[Any],
    outputs: Sequence[Any],
    losses: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[Any, Any]:
    """Returns the prediction rows and the metrics of one set; `losses` are a `gold_loss` per record, of texts."""
    rows = prediction_rows(data, records, outputs)
    if losses is not None:
        rows = [{**row, **loss} for row, loss in zip(rows, losses, strict=True)]
    leak.warn_if_trained_on(name, [row["leaked"] for row in rows])
    return rows, metrics(data.task, rows)


def macro_averages(task: Task, by_set: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Returns the unweighted mean over the sets of the headline metric and, where every set has one, of the loss; then the
    same of each group of sets that the task names, as <metric>_<group>."""
    averages = _averages(task, list(by_set.values()))
    groups: dict[str, list[Mapping[str, float]]] = {}
    for name, scores in by_set.items():
        if group := task.group(name):
            groups.setdefault(group, []).append(scores)
    for group, members in groups.items():
        averages |= {f"{name}_{group}": value for name, value in _averages(task, members).items()}
    return averages


def _averages(task: Task, sets: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = [task.metric, *(["loss"] if all("loss" in scores for scores in sets) else [])]
    return {name: sum(scores[name] for scores in sets) / len(sets) for name in names}
