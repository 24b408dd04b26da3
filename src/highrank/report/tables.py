"""Tables of a report, and how they are written: CSV (every number), LaTeX with booktabs, Markdown."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from highrank.data.answers import COUNTS
from highrank.report.published import Published, elsewhere
from highrank.report.runs import Record, flat
from highrank.report.scores import AVERAGE, Arm, Item, Pivot, Results, Score, shown
from highrank.report.statistics import LOSS, deviation

DASH = "–"


@dataclass(frozen=True)
class TableCell:
    """One entry of a table."""

    value: Any = None
    """What CSV holds and sorting goes by."""
    text: str = DASH
    spread: str = ""
    """± the deviation over seeds."""
    interval: str = ""
    mark: str = ""
    bold: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)
    """Further CSV columns."""


@dataclass(frozen=True)
class Table:
    """Rows of one length under one heading."""

    name: str
    """Its files' name."""
    title: str
    caption: str
    columns: list[str]
    rows: list[list[TableCell]]
    reference: list[list[TableCell]] = field(default_factory=list)
    """Rows to compare with, which are not runs of the sweep."""
    num_keys: int = 1
    """Leading columns that name the row."""


def word(value: Any) -> TableCell:
    return TableCell() if value is None else TableCell(value, shown(value))


def number(value: float | None, form: str = ".1f") -> TableCell:
    return TableCell() if value is None else TableCell(value, format(value, form))


def _score(score: Score | None, form: str = ".1f") -> TableCell:
    if score is None:
        return TableCell()
    return TableCell(
        score.mean,
        format(score.mean, form),
        "" if score.sd is None else f"± {score.sd:{form}}",
        "" if score.low is None else f"[{score.low:{form}}, {score.high:{form}}]",
        "≈" if score.as_good else "",
        score.bold,
        {
            "sd": score.sd,
            "low": score.low,
            "high": score.high,
            "p": score.p,
            "seeds": len(score.seeds),
            "n": score.n,
        },
    )


# --- the scores -------------------------------------------------------------------


def score_tables(results: Results, entries: Sequence[Item], shape: Pivot, baseline: str | None) -> list[Table]:
    """Returns the pivot tables of scores, one for each combination of the keys that are neither rows nor columns."""
    facets = [key for key in results.keys if key not in (*shape.rows, *shape.columns)]
    groups: dict[tuple[str, ...], list[Item]] = {}
    for item in entries:
        groups.setdefault(tuple(shown(item.at[key]) for key in facets), []).append(item)
    tables = []
    for at, group in groups.items():
        where = ", ".join(f"{key} {value}" for key, value in zip(facets, at, strict=True))
        name = "-".join([LOSS if results.lower else "scores", *at]).replace("/", "-").replace(" ", "")
        by = f"{', '.join(shape.rows)} by {', '.join(shape.columns)}"
        title = "Every arm on every test set" if shape.columns == ["set"] and not facets else by
        title = f"Test loss: {title[0].lower()}{title[1:]}" if results.lower else title
        title += f" at {where}" if where else ""
        tables.append(_pivot_table(name, title, _score_caption(results, group, shape, baseline), results, group, shape))
    return tables


def _pivot_table(name: str, title: str, caption: str, results: Results, entries: Sequence[Item], shape: Pivot) -> Table:
    def place(item: Item, keys: Sequence[str]) -> tuple[str, ...]:
        return tuple(shown(item.at[key]) if item.at[key] is not None else "" for key in keys)

    rows = list(dict.fromkeys(place(item, shape.rows) for item in entries))
    columns = list(dict.fromkeys(place(item, shape.columns) for item in entries))
    if shape.columns == ["set"]:
        columns = [(name,) for name in results.columns if (name,) in columns]
    at = {(place(item, shape.rows), place(item, shape.columns)): item.score for item in entries}
    body = [
        [
            *(TableCell(key, key) if key else TableCell() for key in row),
            *(_score(at.get((row, column)), _form(results)) for column in columns),
        ]
        for row in rows
    ]
    heads = [_column(column, shape.columns, results) for column in columns]
    reference = _reference(results, columns, len(shape.rows)) if shape.columns == ["set"] else []
    return Table(name, title, caption, [*shape.rows, *heads], body, reference, len(shape.rows))


def _form(results: Results) -> str:
    """Returns how a score is written: percent, or nats, in which seeds differ by thousandths."""
    return ".4f" if results.lower else ".1f"


def _column(values: tuple[str, ...], keys: Sequence[str], results: Results) -> str:
    if keys == ["set"]:
        metric = results.metrics.get(values[0], "")
        return values[0] if len(set(results.metrics.values())) == 1 or not metric else f"{values[0]} ({metric})"
    return ", ".join(v if k == "set" else f"{k}={v}" for k, v in zip(keys, values, strict=True))


def _reference(results: Results, columns: Sequence[tuple[str, ...]], width: int) -> list[list[TableCell]]:
    """Returns the rows of the base models, of the majority class, and of printed tables."""

    def row(name: str, scores: Mapping[str, float], sd: Mapping[str, float] | None = None) -> list[TableCell]:
        cells = []
        for (column,) in columns:
            cell = number(scores.get(column), _form(results))
            spread = (sd or {}).get(column)
            cells.append(cell if spread is None else TableCell(cell.value, cell.text, f"± {spread:.1f}"))
        return [TableCell(name, name), *[TableCell(None, "")] * (width - 1), *cells]

    def averaged(scores: Mapping[str, float]) -> dict[str, float]:
        complete = all(name in scores for name in results.sets)
        return {**scores, **({AVERAGE: sum(scores[n] for n in results.sets) / len(results.sets)} if complete else {})}

    rows = [row(f"untuned {model}", averaged(scores)) for model, scores in results.untuned]
    if results.majority:
        rows.append(row("majority class", averaged(results.majority)))
    for label, scores, sd in () if results.lower else _printed(results):
        rows.append(row(label, scores, sd))
    return rows


def _printed(results: Results) -> list[tuple[str, dict[str, float], dict[str, float]]]:
    """Returns printed rows, those that a paper splits over tasks put together."""
    joined_rows: dict[tuple[str, str, str], tuple[dict[str, float], dict[str, float]]] = {}
    for row in dict.fromkeys(id(row) for arm in results.arms for row in arm.published):
        printed = next(candidate for arm in results.arms for candidate in arm.published if id(candidate) == row)
        if not printed.scores and printed.average is None:
            continue
        scores, sd = joined_rows.setdefault((printed.source, printed.label, printed.model), ({}, {}))
        scores.update(printed.scores)
        sd.update(printed.sd)
        if printed.average is not None and set(results.sets) >= set(printed.scores):
            scores[AVERAGE] = printed.average
    return [(f"{source}: {name}, {model}", *values) for (source, name, model), values in joined_rows.items()]


def _score_caption(results: Results, entries: Sequence[Item], shape: Pivot, baseline: str | None) -> str:
    sets = [item for item in entries if item.at["set"] != AVERAGE]
    ns = sorted({item.score.n for item in sets or entries})
    seeds = sorted({len(item.score.seeds) for item in entries})
    metric = " and ".join(dict.fromkeys(results.metrics.values()))
    n = f"n = {ns[0]:,}" if len(ns) == 1 else f"n = {ns[0]:,} to {ns[-1]:,}"
    of = " of the gold answers" if results.per != "example" else ""
    unit = f"{results.unit}{of}, less is better" if results.lower else "percent"
    text = f"{metric.capitalize()} in {unit}; mean over {_range(seeds)} seed{'s' if seeds != [1] else ''}, {n} test examples{' per set' if sets else ''}."
    if "set" not in (*shape.rows, *shape.columns):
        text += (
            f" Every entry is the {'unweighted mean over test sets' if len(results.sets) > 1 else results.headline}."
        )
    if seeds[-1] > 1:
        text += " ± standard deviation over seeds; [95 % bootstrap interval over seeds and examples]."
        if baseline:
            text += f" Bold: better than {baseline} (paired test over seeds and examples, p < 0.05 after Holm's correction)."
        else:
            text += (
                " Bold: better than every other arm (paired tests over seeds and examples, p < 0.05 after Holm's "
                "correction). ≈: the best, and what cannot be distinguished from it."
            )
    return text


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


# --- what stands beside the scores ------------------------------------------------


def cost_table(results: Results) -> Table:
    """Returns what each arm costs and how its learning rate was found."""
    head = any(r.results["params"].get("head") for arm in results.arms for r in arm.records)
    extra = any(r.results["params"].get("frozen_extra") for arm in results.arms for r in arm.records)
    columns = [*results.keys, "seeds", "trainable", "% trainable"]
    columns += (["head"] if head else []) + (["frozen extra"] if extra else [])
    columns += ["lr", "rate search", "steps", "train s", "total s", "peak GiB", "unparsed %"]
    rows = []
    for arm in results.arms:
        cells = _keys(arm, results)
        seeds = sorted({record.seed for record in arm.records}, key=str)
        cells.append(TableCell(len(seeds), str(len(seeds)), more={"list": " ".join(map(str, seeds))}))
        cells += [number(arm.mean(_param("trainable")), ",.0f"), number(arm.mean(_param("percent")), ".4f")]
        cells += [number(arm.mean(_param("head")), ",.0f")] if head else []
        cells += [number(arm.mean(_param("frozen_extra")), ",.0f")] if extra else []
        rates = sorted({float(r.config["lr"]) for r in arm.records if r.config.get("lr") is not None})
        cells.append(TableCell(rates[0], ", ".join(f"{rate:g}" for rate in rates)) if rates else TableCell())
        cells.append(_search(arm))
        cells.append(number(arm.mean(lambda r: r.results.get("steps")), ",.0f"))
        for key in ("train_s", "total_s"):
            cells.append(_time(arm, key))
        cells.append(number(arm.mean(peak_gib), ".2f"))
        cells.append(number(arm.mean(unparsed), ".1f"))
        rows.append(cells)
    reference = []
    for row in {id(row): row for arm in results.arms for row in arm.published}.values():
        if row.percent is not None or row.memory_gb is not None:
            line = {c: TableCell(None, "") for c in columns}
            line[columns[0]] = TableCell(row.label, f"{row.source}: {row.label}, {row.model}")
            line["% trainable"] = number(row.percent, ".4f")
            line["total s"] = number(row.time_s, ",.0f")
            line["peak GiB"] = number(row.memory_gb and row.memory_gb * 1e9 / 2**30, ".2f")
            reference.append(list(line.values()))
    devices = {str(r.results.get("versions", {}).get("device")) for arm in results.arms for r in arm.records}
    caption = "Means over an arm's runs. Trainable parameters without a classification head; percent of base and adapter together. "
    caption += "Peak memory is allocated GPU memory where there is a GPU, else the process's resident memory. "
    caption += f"Device: {', '.join(sorted(devices))}." + (
        " Times on different devices do not compare." if len(devices) > 1 else ""
    )
    return Table("cost", "Parameters, learning rate, cost", caption, columns, rows, reference, len(results.keys))


def _keys(arm: Arm, results: Results) -> list[TableCell]:
    return [word(arm.axes.get(key)) for key in results.keys]


def _param(name: str) -> Any:
    return lambda record: record.results["params"].get(name)


def peak_gib(record: Record) -> float | None:
    """Returns a run's peak memory in GiB: allocated on the GPU where there is one, else resident."""
    memory = record.results.get("memory", {})
    peak = memory.get("peak_cuda_bytes", memory.get("peak_resident_bytes"))
    return None if peak is None else peak / 2**30


def train_seconds(record: Record) -> float | None:
    return record.results.get("time", {}).get("train_s")


def unparsed(record: Record) -> float | None:
    """Returns the mean share of unreadable answers over test sets, in percent."""
    shares = [metrics["unparsed"] for metrics in record.final.values() if "unparsed" in metrics]
    return sum(shares) / len(shares) if shares else None


def _time(arm: Arm, key: str) -> TableCell:
    seconds = [r.results["time"][key] for r in arm.records if key in r.results.get("time", {})]
    if not seconds:
        return TableCell()
    one_task = len({flat(record.config).get("task") for record in arm.records}) == 1
    mean, sd = sum(seconds) / len(seconds), deviation(seconds) if one_task else None
    return TableCell(mean, f"{mean:,.0f}", "" if sd is None else f"± {sd:,.0f}", more={"sd": sd})


def searches(arm: Arm) -> list[Mapping[str, Any] | None]:
    """Returns the different searches of an arm's runs: one, but for runs of several sweeps; None is no search."""
    by_json = {json.dumps(record.search, sort_keys=True): record.search for record in arm.records}
    return list(by_json.values())


def _search(arm: Arm) -> TableCell:
    arm_searches = searches(arm)
    made = [search for search in arm_searches if search]
    if not made:
        return TableCell("none", "none")
    tried = sorted({len(search.get("trials", [])) if search else 0 for search in arm_searches})
    text = f"{' to '.join(map(str, dict.fromkeys((tried[0], tried[-1]))))} tried, seed {made[0].get('seed')}"
    text += ", best at the edge" if any(search.get("at_edge") for search in made) else ""
    return TableCell(text, text)


def search_table(results: Results) -> Table | None:
    """Returns the losses of the learning-rate search, arms x rates; None without one, or with several for an arm."""
    if any(len(searches(arm)) > 1 for arm in results.arms):
        return None
    arms = [
        (arm, next(r.search for r in arm.records if r.search))
        for arm in results.arms
        if any(r.search for r in arm.records)
    ]
    rates = sorted({float(trial["lr"]) for _, search in arms for trial in search["trials"]})
    if not rates:
        return None
    rows = []
    for arm, search in arms:
        loss = {float(trial["lr"]): trial for trial in search["trials"]}
        cells = _keys(arm, results)
        for rate in rates:
            trial = loss.get(rate)
            if trial is None:
                cells.append(TableCell())
            elif trial.get("loss") is None:
                cells.append(word(trial.get("status", "no loss")))
            else:
                cells.append(TableCell(trial["loss"], f"{trial['loss']:.4f}", bold=rate == float(search["lr"])))
        rows.append(cells)
    caption = (
        "Validation loss of each rate tried; bold: the rate that the arm's runs took. Every arm had the same budget."
    )
    if len({len(search["trials"]) for _, search in arms}) > 1:
        caption = caption.replace("Every arm had the same budget", "The arms' budgets differ")
    return Table(
        "lr_search",
        "Learning-rate search",
        caption,
        [*results.keys, *(f"{r:g}" for r in rates)],
        rows,
        [],
        len(results.keys),
    )


def measures_table(results: Results) -> Table | None:
    """Returns every other measure per set, leak-free scores first; None if there are none."""
    measures: dict[tuple[str, str], None] = {}
    for arm in results.arms:
        for record in arm.records:
            for name, metrics in record.final.items():
                for key, value in metrics.items():
                    if (
                        key not in ("n", "n_clean", record.metric, LOSS)
                        and isinstance(value, int | float)
                        and (key != "leaked" or value)
                    ):
                        measures[name, key] = None
    columns = sorted(measures, key=lambda at: (not at[1].endswith("_clean"), results.sets.index(at[0])))
    if not columns:
        return None
    leaks = len(results.sets) > 1 and any(key.endswith("_clean") for _, key in columns)
    rows = []
    for arm in results.arms:
        cells = _keys(arm, results)
        cells += [number(_clean_average(arm, results.sets))] if leaks else []
        for name, key in columns:
            mean = arm.mean(partial(_measure, name=name, key=key))
            nats = key.startswith((LOSS, "perplexity"))
            cells.append(number(mean, ".0f" if key in COUNTS else ".4f" if nats else ".1f"))
        rows.append(cells)
    heads = [
        *results.keys,
        *(["average, leak-free"] if leaks else []),
        *(f"{n}: {k.replace('_', ' ')}" for n, k in columns),
    ]
    caption = "Means over seeds, in percent. clean: without the questions that occur in the training data; leaked: their number. "
    if any(key.startswith((LOSS, "perplexity")) for _, key in columns):
        caption += f"Losses are in {results.unit}, perplexity their exponential; loss left out, cut: of how many answers the cut-off left nothing, or a part. "
    caption += "Measures named after a rule read the same outputs by that second answer rule."
    return Table("measures", "Other measures", caption, heads, rows, [], len(results.keys))


def _measure(record: Record, name: str, key: str) -> Any:
    return record.final.get(name, {}).get(key)


def _clean_average(arm: Arm, sets: Sequence[str]) -> float | None:
    """Returns the average over sets without questions seen in training; None where a set is missing."""
    scores = [arm.mean(partial(_clean, name=name)) for name in sets]
    return None if None in scores else sum(value for value in scores if value is not None) / len(scores)


def _clean(record: Record, name: str) -> float | None:
    metrics = record.final.get(name, {})
    return metrics.get(f"{record.metric}_clean", None if metrics.get("leaked") else metrics.get(record.metric))


def comparison_table(
    entries: Sequence[Item], shape: Pivot, baseline: str | None, loss: str | None = None
) -> Table | None:
    """Returns every paired test, or of losses in the unit `loss`; None if there was none."""
    others = [key for key in entries[0].at if key not in shape.compared]
    rows = []
    for item in entries:
        score = item.score
        if score.difference is None:
            continue
        real = "" if score.p is None else "real" if score.p < 0.05 else "not distinguishable"
        rows.append(
            [
                TableCell(item.arm.label, item.arm.label),
                *(word(item.at[key]) for key in others),
                word(real or "not tested"),
                number(score.difference, "+.4f" if loss else "+.2f"),
                TableCell()
                if score.p is None
                else TableCell(score.p, f"{score.p:.3f}" if score.p >= 0.001 else "< 0.001"),
            ]
        )
    if not rows:
        return None
    unit = f"{loss}, below 0 where the arm is better," if loss else "points"
    caption = f"Difference in {unit} to {baseline or 'the best arm'}; p two-sided, paired over seeds and examples (min F'), corrected by Holm within a column of the table."
    name, title = ("loss_tests", "Paired tests of the test loss") if loss else ("tests", "Paired tests")
    return Table(name, title, caption, ["arm", *others, "verdict", "difference", "p"], rows, [], 2 + len(others))


def pattern_table(results: Results) -> Table | None:
    """Returns what papers print for these arms on other models and tasks; None if they print nothing."""
    rows = []
    for arm in results.arms:
        printed: list[Published] = elsewhere(arm.records[0].config, results.keys)
        for row in printed:
            ours = arm.scores.get(results.headline)
            rows.append(
                [
                    *map(word, (arm.label, row.label, row.model, row.task, row.source)),
                    _score(ours),
                    number(row.average, ".2f"),
                ]
            )
    if not rows:
        return None
    models = ", ".join(dict.fromkeys(str(flat(r.config).get("model")) for arm in results.arms for r in arm.records))
    caption = f"The same methods and settings as printed for other models and tasks: only the order of arms can be compared. r is the same where it is swept. Ours: {models}."
    return Table(
        "published",
        "Published, on other models and tasks",
        caption,
        ["arm", "printed as", "model", "task", "source", "ours", "printed"],
        rows,
        [],
        5,
    )


# --- how tables are written -------------------------------------------------------


def to_csv(table: Table) -> str:
    """Returns every number of a table, unrounded: one column per cell and one per what stands behind it."""
    cells = [*table.rows, *table.reference]
    more = [list(dict.fromkeys(key for row in cells for key in row[i].more)) for i in range(len(table.columns))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["row", *(h for c, keys in zip(table.columns, more, strict=True) for h in (c, *(f"{c} {k}" for k in keys)))]
    )
    for kind, rows in (("arm", table.rows), ("reference", table.reference)):
        for row in rows:
            line: list[Any] = [kind]
            for cell, keys in zip(row, more, strict=True):
                line += [cell.value, *(cell.more.get(key) for key in keys)]
            writer.writerow(["" if value is None else value for value in line])
    return out.getvalue()


def to_markdown(table: Table) -> str:
    """Returns a table as GitHub's Markdown, with title and caption."""

    def line(words: Sequence[str]) -> str:
        return "| " + " | ".join(w.replace("|", "\\|") for w in words) + " |"

    def text(cell: TableCell) -> str:
        main = " ".join(filter(None, (cell.text, cell.spread)))
        return " ".join(filter(None, (f"**{main}**" if cell.bold else main, cell.interval, cell.mark)))

    rule = ["---" if i < table.num_keys else "---:" for i in range(len(table.columns))]
    body = [line([text(cell) for cell in row]) for row in (*table.rows, *table.reference)]
    return "\n".join([f"**{table.title}**", "", line(table.columns), line(rule), *body, "", table.caption, ""])


LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    c: f"\\{c}" for c in "&%$#_{}"
}
LATEX |= {"≈": r"$\approx$", "±": r"$\pm$", "–": "--", "−": "$-$", "<": "$<$", ">": "$>$"}


def to_latex(table: Table) -> str:
    """Returns a table as LaTeX; it needs the package booktabs."""

    def escape(text: str) -> str:
        return "".join(LATEX.get(char, char) for char in text)

    def cell_text(cell: TableCell) -> str:
        main = escape(" ".join(filter(None, (cell.text, cell.spread))))
        main = f"\\textbf{{{main}}}" if cell.bold else main
        small = f"{{\\scriptsize {escape(cell.interval)}}}" if cell.interval else ""
        return " ".join(filter(None, (main, small, escape(cell.mark))))

    def line(cells: Sequence[str]) -> str:
        return " & ".join(cells) + r" \\"

    body = [line([cell_text(cell) for cell in row]) for row in table.rows]
    if table.reference:
        body += [r"\midrule", *(line([cell_text(cell) for cell in row]) for row in table.reference)]
    spec = "l" * table.num_keys + "r" * (len(table.columns) - table.num_keys)
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            f"\\caption{{{escape(table.title)}. {escape(table.caption)}}}",
            f"\\begin{{tabular}}{{{spec}}}",
            r"\toprule",
            line([escape(column) for column in table.columns]),
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


FORMATS = {"csv": to_csv, "md": to_markdown, "tex": to_latex}
"""File suffix -> writer."""
