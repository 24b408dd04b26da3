"""`highrank report`: a folder with one page that stands alone, every table as CSV, Markdown and LaTeX, and every figure as SVG.

highrank report SWEEP_OR_RUN... [--out DIR] [--mix protocols|data] [--rows KEY,... --columns KEY,...] [--baseline KEY=VALUE,...]
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from highrank.base.errors import UserError
from highrank.base.files import shown, write_atomic
from highrank.base.options import Words
from highrank.report import figures, retention, tables
from highrank.report.runs import Record, flat, read_runs, read_sweep
from highrank.report.scores import (
    MIXES,
    Item,
    Results,
    best_of,
    collect,
    compare,
    is_arm,
    items,
    label,
    losses,
    pivot,
    settings,
)
from highrank.report.statistics import ALPHA

WIDE = ("pareto", "transfer", "rank-maps", "spectra")
"""Figures of several panels, which take the page's width."""


@dataclass(frozen=True)
class RunSet:
    """What a report is about."""

    title: str
    out: Path
    records: list[Record]
    absent: list[tuple[str, str, str]]
    """Runs that are not in the tables: name, status, reason."""
    command: str | None = None


def report(
    source: RunSet,
    mix: Sequence[str] = (),
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    baseline: Mapping[str, str] | None = None,
) -> Path:
    """Writes a report's folder, and returns its index.html.

    Raises:
        UserError: for no finished run, for runs whose protocol or data differ and may not be mixed, and for rows,
            columns or a baseline that the runs do not have.
    """
    results = collect(source.records, mix)
    shape = pivot(results, rows, columns)
    entries = items(results, shape)
    compare(entries, shape, baseline)
    against = ", ".join(f"{key}={value}" for key, value in baseline.items()) if baseline else None
    scores = tables.score_tables(results, entries, shape, against)
    sentence = finding(entries, shape.compared, against)
    comparisons = [tables.comparison_table(entries, shape, against)]
    loss = losses(results)
    if loss and (loss_entries := items(loss, shape, needed=False)):
        if not baseline or any(is_arm(item, baseline) for item in loss_entries):
            compare(loss_entries, shape, baseline, lower=True)
        scores += tables.score_tables(loss, loss_entries, shape, against)
        comparisons.append(tables.comparison_table(loss_entries, shape, against, loss.unit))
        sentence += " " + finding(loss_entries, shape.compared, against, loss.unit)
    costs = [t for t in (tables.cost_table(results), tables.search_table(results)) if t]
    details = [
        *comparisons,
        retention.table(results),
        tables.measures_table(results),
        tables.pattern_table(results),
    ]
    kept = [t for t in details if t]
    drawings = figures.draw(results)
    page = _template().render(
        title=source.title,
        lead=_lead(source, results),
        finding=sentence,
        notes=[*dict.fromkeys([*results.notes, *(loss.notes if loss else ())])],
        scores=scores,
        costs=costs,
        details=kept,
        drawings=drawings,
        wide=WIDE,
        formats=tables.FORMATS,
        absent=source.absent,
        provenance=_provenance(source, results),
    )
    source.out.mkdir(parents=True, exist_ok=True)
    for table in (*scores, *costs, *kept):
        for suffix, write in tables.FORMATS.items():
            write_atomic(source.out / f"{table.name}.{suffix}", write(table).encode())
    for drawing in drawings:
        write_atomic(source.out / f"{drawing.name}.svg", drawing.image().encode())
    write_atomic(source.out / "index.html", page.encode())
    return source.out / "index.html"


def read(folders: Sequence[Path], out: Path | None = None) -> RunSet:
    """Returns the runs of one sweep, or of several folders, and what is missing of them.

    Raises:
        UserError: if a folder is not there.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"report: give sweeps or run directories, got {folder}, which is no folder")
    if len(folders) == 1 and (folders[0] / "sweep.json").is_file():
        sweep = read_sweep(folders[0])
        absent = _absent(sweep.records, sweep.skipped)
        absent += [(path.name, "missing", "it has not started; run the sweep again") for path in sweep.missing]
        for arm in (sweep.search or {}).get("arms", []):
            if arm.get("lr") is None:
                name = ", ".join(f"{k}={v}" for k, v in arm["axes"].items()) or "all runs"
                absent.append((name, "no rate", "no trial of its learning-rate search ended with a finite loss"))
        return RunSet(sweep.name, out or folders[0] / "report", sweep.records, absent, sweep.command)
    records, skipped = read_runs(folders)
    title = folders[0].name if len(folders) == 1 else f"{len(records)} runs"
    return RunSet(title, out or folders[0] / "report", records, _absent(records, skipped))


def _absent(records: Sequence[Record], skipped: Sequence[tuple[Path, str]]) -> list[tuple[str, str, str]]:
    unfinished = [(r.name, r.status, str(r.results.get("error") or "")) for r in records if r.status != "done"]
    return unfinished + [(path.name, "damaged", reason) for path, reason in skipped]


def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string((files("highrank.report") / "page.html").read_text(encoding="utf-8"))


def finding(entries: Sequence[Item], compared: Sequence[str], baseline: str | None, loss: str | None = None) -> str:
    """Returns the report's answer in a sentence: what is best, of losses in the unit `loss` what is lowest, and whether
    that is more than chance."""
    last = entries[-1].at
    group = [item for item in entries if all(item.at[key] == last[key] for key in last if key not in compared)]
    best = best_of(group, lower=loss is not None)
    score, name = best.score, str(last["set"])
    where = {"average": "on average"}.get(name, f"on {name}")
    form, unit = (".4f", loss) if loss else (".1f", "%")
    text = f"{'Lowest test loss' if loss else 'Best'} {where}: {best.arm.label}, {score.mean:{form}} {unit}"
    if score.low is not None:
        text += f" [{score.low:{form}}, {score.high:{form}}]"
    others = [item for item in group if item is not best]
    if not others:
        return text + ". It is the only arm."
    if len(score.seeds) < 2:
        return text + ". One seed: whether it is really better cannot be said."
    if baseline:
        better = [item.arm.label for item in group if item.score.bold]
        return text + f". Really better than {baseline}: {'; '.join(better) if better else 'none'}."
    if score.bold:
        p = f"p = {score.p:.3f}" if score.p and score.p >= 0.001 else "p < 0.001"
        return f"{text}, better than every other arm ({p})."
    close = [item.arm.label for item in others if item.score.p is not None and item.score.p >= ALPHA]
    if not close:
        return text + ". Not every arm could be tested against it."
    listed = "; ".join(close[:4]) + (f" and {len(close) - 4} more" if len(close) > 4 else "")
    return text + f". Not distinguishable from it: {listed}."


def _lead(source: RunSet, results: Results) -> str:
    done = sum(len(arm.records) for arm in results.arms)
    of = f" of {done + len(source.absent)}" if source.absent else ""
    seeds = sorted({r.seed for arm in results.arms for r in arm.records}, key=str)
    rows = [settings(record) for arm in results.arms for record in arm.records]
    fixed = {k: v for k, v in rows[0].items() if k not in ("model", "task") and all(row.get(k) == v for row in rows)}
    fixed = {k: v for k, v in fixed.items() if k not in results.keys}
    where = [", ".join(_values(results, "model")), "on", ", ".join(_values(results, "task"))]
    same = f" All with {label(fixed)}." if fixed else ""
    return (
        f"{done}{of} runs, {len(results.arms)} arm{'s' if len(results.arms) > 1 else ''}, "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}. {' '.join(where)}.{same}"
    )


def _values(results: Results, key: str) -> list[str]:
    return list(dict.fromkeys(str(flat(r.config).get(key)) for arm in results.arms for r in arm.records))


def _provenance(source: RunSet, results: Results) -> list[tuple[str, str]]:
    records = [record for arm in results.arms for record in arm.records]

    def distinct(of: Any) -> str:
        return "; ".join(dict.fromkeys(str(value) for value in map(of, records) if value))

    def protocol(record: Record) -> str:
        fields = record.results["protocol"]
        return f"{fields.get('name')}, version {fields.get('version')}, hash {fields['hash'][:12]}"

    def model(record: Record) -> str:
        fields = record.results.get("model", {})
        return ", ".join(str(fields[key])[:60] for key in ("name", "kind", "sha") if fields.get(key))

    def git(record: Record) -> str:
        fields = record.results.get("git") or {}
        return fields.get("commit", "")[:12] + (" with changes" if fields.get("dirty") else "")

    data = dict.fromkeys(
        f"{shown(file['name'])} ({file.get('rows')} rows, sha256 {str(file.get('sha256'))[:12]})"
        for record in records
        for file in record.results["data"]
    )
    packages = ("highrank", "torch", "transformers", "python", "device")

    def versions(record: Record) -> str:
        fields = record.results.get("versions", {})
        return ", ".join(f"{name} {fields[name]}" for name in packages if fields.get(name))

    pairs = [
        ("Command", source.command or ""),
        ("Protocol", distinct(protocol)),
        ("Model", distinct(model)),
        ("Data", "; ".join(data)),
        ("Code", distinct(git)),
        ("Versions", distinct(versions)),
    ]
    return [(name, value) for name, value in pairs if value]


def command(words: list[str]) -> int:
    """`highrank report`: prints what is not in the tables, the finding, and last the page."""
    parser = Words(
        "report",
        "SWEEP_OR_RUN... [--out DIR] [--mix protocols|data] [--rows KEY,...] [--columns KEY,...] [--baseline KEY=VALUE,...]",
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--mix", type=_listed, default=[])
    parser.add_argument("--rows", type=_listed, default=[])
    parser.add_argument("--columns", type=_listed, default=[])
    parser.add_argument("--baseline", type=_pairs)
    given = parser.options(words, "folders")
    for part in given.mix:
        if part not in MIXES:
            raise UserError(f"report: --mix takes {' or '.join(MIXES)}, got --mix {part}")
    source = read(given.folders, given.out)
    for name, status, reason in source.absent:
        print(f"not in the tables: {name}: {status}{f' ({reason})' if reason else ''}")
    print(report(source, given.mix, given.rows, given.columns, given.baseline))
    return 0


def _listed(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _pairs(text: str) -> dict[str, str]:
    pairs = dict(word.partition("=")[::2] for word in _listed(text))
    if not pairs or not all(pairs.values()):
        raise argparse.ArgumentTypeError(f"a baseline is key=value, got {text}")
    return pairs
