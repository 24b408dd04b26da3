"""The scores of a report: per arm and test set, with intervals, paired tests, and the rows they are compared with."""

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from highrank.base.errors import UserError
from highrank.report.published import Published, beside
from highrank.report.runs import Record, flat, follows, hashable, without_followed_rate
from highrank.report.statistics import (
    ALPHA,
    LOSS,
    Test,
    deviation,
    example_values,
    holm,
    interval,
    paired_test,
    seed_means,
    seed_variance,
)

AVERAGE = "average"
"""The column of the unweighted mean over test sets."""
MIXES = ("protocols", "data")
CLASSES = 10
"""Most different gold answers for which a majority class is worth a row."""


@dataclass
class Score:
    """One arm on one test set, or on the average of all."""

    mean: float
    sd: float | None
    """Over seeds; None for one seed."""
    seeds: list[Any]
    n: int
    """Test examples, of all sets for the average."""
    low: float | None = None
    high: float | None = None
    examples: list[NDArray[np.float64]] | None = None
    """Per set (seeds, examples), in percent or nats; None where predictions are missing or the metric is no mean over them."""
    ids: list[list[str]] | None = None
    """Per set, the examples' ids, of a loss with their numbers of tokens."""
    difference: float | None = None
    """This score less the reference's, in points or nats."""
    p: float | None = None
    """Of no difference to the reference, after Holm; for the reference itself the largest of the others'."""
    reference: bool = False
    bold: bool = False
    """Really better: than the named baseline, or than every other arm."""
    as_good: bool = False
    """The best arm or not distinguishable from it, where there are several such."""


@dataclass(frozen=True)
class Arm:
    """The runs that differ in seed, and in task where tasks are columns."""

    axes: dict[str, Any]
    records: list[Record]
    scores: dict[str, Score]

    @property
    def key(self) -> tuple[Hashable, ...]:
        return tuple(hashable(value) for value in self.axes.values())

    @property
    def label(self) -> str:
        return label(self.axes)

    def mean(self, of: Callable[[Record], Any]) -> float | None:
        """Returns the mean over the arm's runs of a number that a record may lack."""
        values = [value for value in map(of, self.records) if value is not None]
        return sum(values) / len(values) if values else None

    @property
    def published(self) -> list[Published]:
        return list({id(row): row for record in self.records for row in beside(record.config)}.values())


@dataclass
class Results:
    """Everything that tables and figures are made of."""

    arms: list[Arm]
    keys: list[str]
    """What distinguishes arms, in order."""
    sets: list[str]
    """Test sets, in order; more than one have an average."""
    metrics: dict[str, str]
    """Headline metric per set."""
    untuned: list[tuple[str, dict[str, float]]] = field(default_factory=list)
    """Per model: its name, and its score before training per set."""
    majority: dict[str, float] = field(default_factory=dict)
    """The score of always giving the most common gold answer, per set."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know about these numbers."""
    lower: bool = False
    """Whether less is better: losses in nats, where scores are in percent."""
    per: str = "token"
    """Of what a loss is the mean: of the gold answers' tokens, or of examples whose answer is one class, as images."""

    @property
    def unit(self) -> str:
        """In what losses are."""
        return f"nats per {self.per}"

    @property
    def columns(self) -> list[str]:
        return [*self.sets, *([AVERAGE] if len(self.sets) > 1 else [])]

    @property
    def headline(self) -> str:
        return self.columns[-1]


def shown(value: Any) -> str:
    """Returns a config value as a person writes it."""
    if isinstance(value, list):
        return "+".join(map(shown, value))
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def label(axes: Mapping[str, Any]) -> str:
    """Returns an arm's name: hira, r=16."""
    plain = ("method", "model", "task", "protocol", "placement")
    return ", ".join(shown(v) if k in plain else f"{k}={shown(v)}" for k, v in axes.items()) or "all runs"


def collect(records: Sequence[Record], mix: Iterable[str] = ()) -> Results:
    """Returns the scores of finished runs.

    Raises:
        UserError: if there are none, or if runs of one test set differ in protocol or data and `mix` does not allow it.
    """
    done = list({r.results["config_hash"]: r for r in reversed(records) if r.status == "done"}.values())[::-1]
    if not done:
        raise UserError(
            f"report: a finished run is needed, got none among {len(records)}; finish the sweep, or name its folder"
        )
    notes = _check_mix(done, set(mix))
    rows = [settings(record) for record in done]
    swept = dict.fromkeys(key for row in rows for key in row)
    keys = [key for key in swept if len({hashable(row.get(key)) for row in rows}) > 1] or ["method"]
    keys = without_followed_rate(rows, keys)
    by_task: dict[Any, set[str]] = {}
    for record in done:
        by_task.setdefault(flat(record.config).get("task"), set()).update(record.final)
    disjoint = len(by_task) > 1 and all(not a & b for a, b in itertools.combinations(by_task.values(), 2))
    if disjoint:  # columns then; so is what goes with a task, as its number of steps
        groups = {"method", "model", "protocol"}
        keys = [key for key in keys if key in groups or not follows(rows, key, ["task"])]
    grouped: dict[tuple[Hashable, ...], list[Record]] = {}
    for record in done:
        grouped.setdefault(tuple(hashable(_axes(record, keys).get(key)) for key in keys), []).append(record)
    sets = list(dict.fromkeys(name for record in done for name in record.final))
    metrics = {name: record.metric for record in done for name in record.final}
    unusable: dict[str, list[str]] = {}
    arms = [
        Arm(_axes(arm_records[0], keys), arm_records, _scores(arm_records, sets, unusable))
        for arm_records in grouped.values()
    ]
    if any(len(score.seeds) == 1 for arm in arms for score in arm.scores.values()):
        notes.append("Arms with one seed: no deviation, interval or test over seeds is claimed.")
    notes += _said(unusable)
    return Results(arms, keys, sets, metrics, _untuned(done, sets), _majority(done), notes, per=_per(done, sets))


def _per(records: Sequence[Record], sets: Sequence[str]) -> str:
    """Returns of what the losses are means, as far as predictions tell: of examples where each answer is one target."""
    found = set()
    for name in sets:
        read = (record.predictions(name) for record in records if name in record.final)
        rows: list[dict[str, Any]] = next(filter(None, read), [])
        found.add("example" if {row.get("target_tokens") for row in rows} == {1} else "token")
    return " or ".join(sorted(found, reverse=True))


def losses(results: Results) -> Results | None:
    """Returns the test loss of the same arms; None if no run has one. Runs without are left out, and a note says so."""
    records = [record for arm in results.arms for record in arm.records]
    with_loss = {id(r) for r in records if all(LOSS in metrics for metrics in r.final.values())}
    sets = [name for name in results.sets if any(LOSS in record.final.get(name, {}) for record in records)]
    if not sets:
        return None
    unusable: dict[str, list[str]] = {}
    scored = [Arm(arm.axes, arm.records, _scores(arm.records, sets, unusable, LOSS)) for arm in results.arms]
    arms = [arm for arm in scored if arm.scores]
    notes = _said(unusable)
    if len(with_loss) < len(records):
        notes.append(
            f"{len(records) - len(with_loss)} of {len(records)} runs lack the test loss of a set, as runs from before it, "
            "classifiers and losses that are no number do: its tables are about the others."
        )
    known = [[arm.scores[name].ids for arm in arms if name in arm.scores] for name in sets]
    if any(ids != of[0] for of in known for ids in of if None not in (ids, of[0])):
        notes.append(
            "Gold answers of other tokens: the losses per token of these arms do not compare, nor are they tested."
        )
    metrics, untuned = dict.fromkeys(sets, LOSS), _untuned(records, sets, LOSS)
    return Results(arms, results.keys, sets, metrics, untuned, {}, notes, True, _per(records, sets))


def _said(unusable: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns notes on what cannot be tested, and why."""
    notes = []
    for reason, names in unusable.items():
        of = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        notes.append(f"{reason}: no interval or test for the arms of {of}.")
    return notes


def settings(record: Record) -> dict[str, Any]:
    """Returns what was swept as the config has it: 1e-3 given as a text is a number, task.member is part of task."""
    config = flat(record.config)
    keys = {key: "task" if key == "task.member" else key.removeprefix("method.") for key in record.arm}
    return {config_key: config.get(config_key, record.arm[key]) for key, config_key in keys.items()}


def _axes(record: Record, keys: Sequence[str]) -> dict[str, Any]:
    """Returns what names a record's arm; the method, where only seeds differ."""
    values = {"method": flat(record.config).get("method"), **settings(record)}
    return {key: values[key] for key in keys if key in values}


def _check_mix(records: Sequence[Record], mix: set[str]) -> list[str]:
    """Refuses runs that cannot be compared on a test set; returns notes for those that are compared all the same."""
    notes = []
    for name in dict.fromkeys(name for record in records for name in record.final):
        scored = [record for record in records if name in record.final]
        protocols = _by(scored, lambda r: f"{r.results['protocol'].get('name')} {r.results['protocol']['hash'][:8]}")
        files: dict[str, dict[Hashable, Record]] = {}
        for record in scored:
            for file in record.results["data"]:
                value = f"{file['name']} {str(file.get('sha256'))[:8]}, {file.get('rows')} rows"
                files.setdefault(file["name"], {}).setdefault(value, record)
        data = next((by_value for by_value in files.values() if len(by_value) > 1), None)
        data = data or _by(scored, partial(_examples, name=name))
        for part, versions in (("protocols", protocols), ("data", data)):
            if len(versions) < 2:
                continue
            listed = "; ".join(f"{value} ({record.name})" for value, record in versions.items())
            if part not in mix:
                raise UserError(
                    f"report: one table has one {part.removesuffix('s')}, got {listed}; compare them anyway with --mix {part}"
                )
            notes.append(f"Mixed {part} in one table, as asked: {listed}. Differences may come from them.")
    return notes


def _by(records: Sequence[Record], of: Callable[[Record], Hashable]) -> dict[Hashable, Record]:
    by_value: dict[Hashable, Record] = {}
    for record in records:
        by_value.setdefault(of(record), record)
    return by_value


def _examples(record: Record, name: str) -> Hashable:
    task = record.config.get("task", {})
    return f"{name}: n={record.final[name]['n']}, data_seed={task.get('data_seed')}"


def _scores(
    records: Sequence[Record], sets: Sequence[str], unusable: dict[str, list[str]], metric: str | None = None
) -> dict[str, Score]:
    """Returns an arm's score per set, and of the average where it has all sets; by a metric that each run may lack, or by
    its headline."""
    scores: dict[str, Score] = {}
    values: dict[str, dict[Any, float]] = {}
    rows: dict[str, dict[Any, dict[str, float]]] = {}
    for name in sets:
        runs = {r.seed: r for r in records if name in r.final and (metric or r.metric) in r.final[name]}
        if not runs:
            continue
        values[name] = {seed: float(record.final[name][metric or record.metric]) for seed, record in runs.items()}
        rows[name] = {seed: _read(r, name, metric or r.metric, unusable) for seed, r in runs.items()}
        measured = next(iter(runs.values())).final[name]
        n = measured["n"] - (measured.get("loss_left_out", 0) if metric == LOSS else 0)
        scores[name] = _score([name], list(runs), values, rows, n)
    common = [s for s in values.get(sets[0], {}) if all(s in values.get(name, {}) for name in sets)]
    if len(sets) > 1 and common:
        scores[AVERAGE] = _score(list(sets), common, values, rows, sum(scores[name].n for name in sets))
    return scores


def _score(
    names: Sequence[str],
    seeds: Sequence[Any],
    values: Mapping[str, Mapping[Any, float]],
    rows: Mapping[str, Mapping[Any, Mapping[str, float]]],
    n: int,
) -> Score:
    seeds = sorted(seeds, key=str)
    by_seed = [sum(values[name][seed] for name in names) / len(names) for seed in seeds]
    examples, all_ids = [], []
    for name in names:
        ids = sorted(set.intersection(*(set(rows[name][seed]) for seed in seeds)))
        if any(
            len(rows[name][seed]) != len(ids) or not ids for seed in seeds
        ):  # missing, or not the same under all seeds
            return Score(float(np.mean(by_seed)), deviation(by_seed), list(seeds), n)
        examples.append(np.array([[rows[name][seed][i] for i in ids] for seed in seeds]))
        all_ids.append(ids)
    low, high = interval(examples) or (None, None)
    return Score(float(np.mean(by_seed)), deviation(by_seed), list(seeds), n, low, high, examples, all_ids)


def _read(record: Record, name: str, metric: str, unusable: dict[str, list[str]]) -> dict[str, float]:
    """Returns what each example adds to the metric, by id; notes why and returns nothing where that is not known."""
    rows = record.predictions(name)
    if rows is not None and metric == LOSS:
        rows = [row for row in rows if row.get("target_tokens")]  # of the others nothing is within the cut-off
    try:
        values = example_values(metric, rows) if rows else None
    except (KeyError, TypeError, ValueError):
        values = None
    if rows is None:
        reason = f"predictions/{name}.jsonl is missing or damaged"
    elif values is None:
        reason = f"{metric} of {name} is no mean over examples"
    elif abs(values.mean() - record.final[name][metric]) > (1e-5 if metric == LOSS else 0.01):
        reason = f"predictions/{name}.jsonl is not what results.json counts"
    else:
        # A loss per token compares on the same tokens: these are part of what an example is known by.
        ids = [f"{row['id']} of {row['target_tokens']} tokens" if metric == LOSS else str(row["id"]) for row in rows]
        return dict(zip(ids, values.tolist(), strict=True))
    unusable.setdefault(reason, []).append(record.name)
    return {}


def _untuned(
    records: Sequence[Record], sets: Sequence[str], metric: str | None = None
) -> list[tuple[str, dict[str, float]]]:
    """Returns the base models' scores: the median over runs before training, since adapters that start off it differ."""
    before: dict[str, dict[str, list[float]]] = {}
    for record in records:
        model = str(flat(record.config).get("model"))
        for name, metrics in record.results["metrics"].get("before", {}).get("sets", {}).items():
            if (measured := metric or record.metric) in metrics:
                before.setdefault(model, {}).setdefault(name, []).append(metrics[measured])
    return [(m, {name: median(by_set[name]) for name in sets if name in by_set}) for m, by_set in before.items()]


def _majority(records: Sequence[Record]) -> dict[str, float]:
    scores: dict[str, float] = {}
    for record in records:
        for name in record.final:
            if record.metric == "matthews":
                scores[name] = 0.0
            if record.metric != "accuracy" or name in scores:
                continue
            golds = Counter(hashable(row.get("gold")) for row in record.predictions(name) or ())
            if 1 < len(golds) <= CLASSES and golds.total() >= 4 * len(golds):
                scores[name] = 100 * max(golds.values()) / golds.total()
    return scores


@dataclass(frozen=True)
class Pivot:
    """Which keys name the rows and columns of a table; every other key has one table per value."""

    rows: list[str]
    columns: list[str]

    @property
    def compared(self) -> list[str]:
        """The keys whose values compete: the rows', unless test sets are the rows."""
        rows = [key for key in self.rows if key != "set"]
        return rows or [key for key in self.columns if key != "set"]


@dataclass
class Item:
    """An arm's score with its coordinates."""

    at: dict[str, Any]
    arm: Arm
    score: Score


def pivot(results: Results, rows: Sequence[str] = (), columns: Sequence[str] = ()) -> Pivot:
    """Returns the table's shape, by default arms x test sets.

    Raises:
        UserError: for a key that is not swept, or given twice.
    """
    known = [*results.keys, "set"]
    for key in (*rows, *columns):
        if key not in known:
            raise UserError(
                f"report: rows and columns are swept keys or set, got {key}; the keys are {', '.join(known)}"
            )
    if len({*rows, *columns}) < len([*rows, *columns]):
        raise UserError(
            f"report: a key is a row or a column, got --rows {','.join(rows)} --columns {','.join(columns)}"
        )
    if not rows:
        rows = [key for key in results.keys if key not in columns] or ["set"]
    if not columns:
        columns = ["set"] if "set" not in rows else [key for key in results.keys if key not in rows]
    return Pivot(list(rows), list(columns))


def items(results: Results, shape: Pivot, needed: bool = True) -> list[Item]:
    """Returns every score of a table: per test set, or the average alone where sets are neither rows nor columns.

    Raises:
        UserError: if that is asked for and no arm has all test sets, unless it is not `needed`.
    """
    names = results.columns if "set" in (*shape.rows, *shape.columns) else [results.headline]
    entries = [
        Item({**{key: arm.axes.get(key) for key in results.keys}, "set": name}, arm, arm.scores[name])
        for arm in results.arms
        for name in names
        if name in arm.scores
    ]
    if not entries and needed:
        raise UserError(
            f"report: an average needs all test sets in one arm, got none with {', '.join(results.sets)}; add set to --columns"
        )
    return entries


def compare(
    entries: Sequence[Item], shape: Pivot, baseline: Mapping[str, str] | None = None, lower: bool = False
) -> None:
    """Marks what is really better, within every group of scores that compete; see `Score`.

    Without a baseline the best score is compared with each other one, and is bold if it beats all of them. With one,
    each other score is compared with the baseline's, and is bold if it beats it. p < 0.05 after Holm over the group. Better
    is more or, with `lower`, less.

    Raises:
        UserError: if no arm, or in one group several arms, are the baseline.
    """
    groups: dict[tuple[Hashable, ...], list[Item]] = {}
    for item in entries:
        groups.setdefault(tuple(hashable(v) for k, v in item.at.items() if k not in shape.compared), []).append(item)
    if baseline:
        _check_baseline(entries, baseline)
    for group in groups.values():
        best = best_of(group, lower)
        base = _baseline(group, baseline) if baseline else [best]
        if baseline and not base:
            continue
        known = [item.score for item in group if item.score.examples]
        pooled = seed_variance([dict(zip(s.seeds, seed_means(s.examples or []), strict=True)) for s in known])
        tested: list[tuple[Item, Test]] = []
        for item in group:
            partner = base[0] if len(base) == 1 else _nearest(item, base)
            if item is partner or item in base:
                item.score.reference = True
                continue
            test = _test(item.score, partner.score, pooled)
            item.score.difference = test.difference if test else item.score.mean - partner.score.mean
            if test:
                tested.append((item, test))
        for (item, _), p in zip(tested, holm([test.p for _, test in tested]), strict=True):
            item.score.p = p
            if baseline:
                item.score.bold = p < ALPHA and (item.score.difference or 0) * (-1 if lower else 1) > 0
            else:
                item.score.as_good = p >= ALPHA
        if not baseline and tested and len(tested) == len(group) - 1:
            best.score.p = max(item.score.p or 0.0 for item, _ in tested)
            best.score.bold = best.score.p < ALPHA
        best.score.as_good = any(item.score.as_good for item in group)


def best_of(group: Sequence[Item], lower: bool) -> Item:
    """Returns the item with the best mean."""
    return (min if lower else max)(group, key=lambda item: item.score.mean)


def _test(ours: Score, theirs: Score, pooled: tuple[float, int]) -> Test | None:
    """Returns the paired test over the seeds that both have; None where that cannot be."""
    common = [seed for seed in ours.seeds if seed in theirs.seeds]
    if ours.examples is None or theirs.examples is None or len(common) < 2 or ours.ids != theirs.ids:
        return None
    pick = [[score.seeds.index(seed) for seed in common] for score in (ours, theirs)]
    return paired_test([x[pick[0]] for x in ours.examples], [x[pick[1]] for x in theirs.examples], pooled)


def is_arm(item: Item, baseline: Mapping[str, str]) -> bool:
    """Whether an item is of the arm that `baseline` names."""
    return all(key in item.at and shown(item.at[key]) == value for key, value in baseline.items())


def _check_baseline(entries: Sequence[Item], baseline: Mapping[str, str]) -> None:
    if not any(is_arm(item, baseline) for item in entries):
        words = ",".join(f"{key}={value}" for key, value in baseline.items())
        arms = "; ".join(dict.fromkeys(item.arm.label for item in entries))
        raise UserError(f"report: the baseline is an arm of the sweep, got --baseline {words}; the arms are {arms}")


def _baseline(group: Sequence[Item], baseline: Mapping[str, str]) -> list[Item]:
    return [item for item in group if is_arm(item, baseline)]


def _nearest(item: Item, base: Sequence[Item]) -> Item:
    """Returns the baseline's score with which one competes: that of the arm which agrees in most of the other keys."""
    agree = [sum(other.at[key] == item.at[key] for key in item.at) for other in base]
    if agree.count(max(agree)) > 1:
        near = " and ".join(other.arm.label for other, n in zip(base, agree, strict=True) if n == max(agree))
        raise UserError(f"report: {item.arm.label} needs one baseline, got {near}; add a key to --baseline")
    return base[agree.index(max(agree))]
