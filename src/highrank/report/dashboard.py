"""TensorBoard for runs and sweeps: the HPARAMS table, the custom-scalar layout, final metrics, figures of an analysis.

TensorBoard makes the HPARAMS table of three records: EXPERIMENT, in the root of the log folder, names the columns;
SESSION_START and SESSION_END, in a run's folder, hold its values and its status. Metrics are scalars of the run.
A run writes its session itself; a sweep adds an EXPERIMENT over the columns of all its methods, and the layout.
"""

import io
import math
import re
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import (
    STATUS_FAILURE,
    STATUS_SUCCESS,
    STATUS_UNKNOWN,
    Experiment,
    HParamInfo,
    MetricInfo,
    MetricName,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
from tensorboard.plugins.hparams.summary_v2 import Discrete, Domain, RealInterval, hparams_pb
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import custom_scalars, scalar

from highrank.base.files import write_atomic
from highrank.config.run_config import UNHASHED
from highrank.data.answers import COUNTS, SECONDARY
from highrank.report.runs import Record, flat, read_runs, read_sweep

STATUSES = {
    "done": STATUS_SUCCESS,
    "failed": STATUS_FAILURE,
    "oom": STATUS_FAILURE,
    "diverged": STATUS_FAILURE,
    "interrupted": STATUS_UNKNOWN,
}
MAIN_COSTS = ("cost/trainable", "cost/total_s")
"""Costs among the first metrics: TensorBoard shows five until a person ticks more."""


def write_run(folder: Path) -> None:
    """Writes one run's session: hyperparameters, status, final metrics under final/*, costs under cost/*, figures.

    Writing again replaces what it wrote before; a folder without readable results is left alone.
    """
    for record in read_runs([folder])[0]:
        _write_session(record, hyperparameters(record.config))


def refresh(folder: Path) -> None:
    """Writes anew what TensorBoard shows of a sweep, of the sweep that a run belongs to, or of a run by itself."""
    for sweep in (folder, folder.resolve().parent):
        if (sweep / "sweep.json").is_file():
            return write(sweep)
    write_run(folder)


def write(folder: Path) -> None:
    """Writes a sweep's EXPERIMENT record, its custom-scalar layout, and the sessions of its cells.

    The columns are the swept keys of all methods, the learning rate, the headline metrics and the costs. The runs of a
    learning-rate search are no sessions. Writing again replaces what it wrote before.

    Raises:
        UserError: if sweep.json is missing or damaged.
    """
    sweep = read_sweep(folder)
    given = {key: [r.axes[key] for r in sweep.records if key in r.axes] for key in sweep.axes}
    domains = {
        key: _domain([*dict.fromkeys(map(_plain, [*values, *given[key]]))]) for key, values in sweep.axes.items()
    }
    for record in sweep.records:
        hparams = {k: v for k, v in hyperparameters(record.config).items() if k not in domains}
        for key, value in record.axes.items():
            hparams[key] = domains[key].dtype(_plain(value)) if key in domains else _plain(value)
        if record.status != "running":
            _write_session(record, hparams)
    for file in (folder / "search").glob("*/events.out.tfevents.*.session"):
        file.unlink()

    rates = [float(record.config["lr"]) for record in sweep.records if record.config.get("lr") is not None]
    if rates:
        domains.setdefault("lr", RealInterval(min(rates), max(rates)))
    columns = [HParamInfo(name=key, differs=key in sweep.axes) for key in domains]
    for column in columns:
        domains[column.name].update_hparam_info(column)
    tags = list(dict.fromkeys(tag for record in sweep.records for tag in scalars(record.results) if _headline(tag)))
    tags.sort(key=lambda tag: (tag.startswith("cost/") and tag not in MAIN_COSTS, tag.count("/")))
    metrics = [
        MetricInfo(name=MetricName(tag=tag), display_name=tag.partition("/")[2].replace("/", " ")) for tag in tags
    ]
    planned = (folder / "sweep.json").stat().st_mtime
    experiment = Experiment(name=sweep.name, hparam_infos=columns, metric_infos=metrics, time_created_secs=planned)
    summaries = [_record(metadata.EXPERIMENT_TAG, experiment=experiment), layout(tags), *_figures(folder)]
    _write(folder, "experiment", summaries, planned)


def hyperparameters(config: Mapping[str, Any]) -> dict[str, str | bool | int | float]:
    """Returns a resolved config's groups by name, the method's fields and the core keys that can change the result."""
    named = {key: value for key, value in flat(config).items() if "." not in key and key not in UNHASHED}
    return {key: _plain(value) for key, value in named.items() if value is not None}


def scalars(results: Mapping[str, Any]) -> dict[str, float]:
    """Returns tag -> value: final/<set>/<metric>, the macro average final/<metric>, and cost/<name>."""
    final = results.get("metrics", {}).get("final", {})
    by_tag = {f"final/{name}": value for name, value in final.items() if name != "sets"}
    for name, values in final.get("sets", {}).items():
        by_tag |= {f"final/{name}/{metric}": value for metric, value in values.items()}
    params, times, memory = (results.get(part, {}) for part in ("params", "time", "memory"))
    by_tag |= {f"cost/{name}": params[name] for name in ("trainable", "percent") if name in params}
    by_tag |= {f"cost/{name}": times[name] for name in ("train_s", "total_s") if name in times}
    by_tag |= {f"cost/{name.removesuffix('bytes')}gib": size / 2**30 for name, size in memory.items()}
    return {tag: value for tag, value in by_tag.items() if isinstance(value, int | float)}


def layout(tags: Iterable[str]) -> Summary:
    """Returns the custom-scalar layout: training curves, final metrics with one chart per test set and one of its loss,
    costs."""
    losses = ["^train/loss$", "^validation/loss$"]
    charts: dict[str, dict[str, Any]] = {"training": {"loss": ["Multiline", losses]}, "final": {}, "cost": {}}
    for tag in tags:
        kind, _, name = tag.partition("/")
        of, _, metric = name.rpartition("/")
        title = name if kind == "cost" else (of or "macro average") + (" loss" if metric == "loss" else "")
        charts[kind].setdefault(title, ["Multiline", []])[1].append(f"^{re.escape(tag)}$")
    return custom_scalars(charts)


def _plain(value: Any) -> str | bool | int | float:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return value if isinstance(value, str | bool | int | float) else "null" if value is None else str(value)


def _domain(values: Sequence[Any]) -> Domain:
    """Returns the values as one of TensorBoard's types: truth values, numbers (many: their interval), or else text."""
    if all(isinstance(value, bool) for value in values):
        return Discrete(values, bool)
    if all(_is_number(value) for value in values):
        numbers = [float(value) for value in values]
        return Discrete(numbers, float) if len(numbers) < 10 else RealInterval(min(numbers), max(numbers))
    return Discrete(map(str, values), str)


def _is_number(value: Any) -> bool:
    """Whether a value is a number, or text such as 1e-3, which is none in YAML."""
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except ValueError:
        return False


def _headline(tag: str) -> bool:
    """Whether a metric is worth a column: not another answer rule's, the clean subset's, a count, or the loss once more."""
    return tag.startswith("cost/") or not (tag.endswith(SECONDARY) or tag.rpartition("/")[2] in (*COUNTS, "perplexity"))


def _write_session(record: Record, values: Mapping[str, Any]) -> None:
    ended = (record.path / "results.json").stat().st_mtime
    started = ended - record.results.get("time", {}).get("total_s", 0)
    summaries = [hparams_pb(values, trial_id="", start_time_secs=started)]
    if record.status in STATUSES:
        end = SessionEndInfo(status=STATUSES[record.status], end_time_secs=ended)
        summaries.append(_record(metadata.SESSION_END_INFO_TAG, session_end_info=end))
    summaries += [scalar(tag, value) for tag, value in scalars(record.results).items()]
    _write(record.path, "session", [*summaries, *_figures(record.path)], ended, record.results.get("steps", 0))


def _record(tag: str, **content: Any) -> Summary:
    about = metadata.create_summary_metadata(HParamsPluginData(**content))
    return Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)])


def _figures(folder: Path) -> list[Summary]:
    """Returns the figures in a folder's analysis/ as images."""
    summaries = []
    for file in sorted((folder / "analysis").glob("*.png")):
        data = file.read_bytes()
        if len(data) < 24:  # cut off before its size
            continue
        width, height = struct.unpack(">II", data[16:24])
        image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=data)
        summaries.append(Summary(value=[Summary.Value(tag=f"analysis/{file.stem}", image=image)]))
    return summaries


def _write(folder: Path, kind: str, summaries: Iterable[Summary], at: float, step: int = 0) -> None:
    """Replaces the folder's event file of one kind, unless it says the same already.

    The name carries the time, so that a TensorBoard that is open reads the new file after those it knows.
    """
    buffer = io.BytesIO()
    records = RecordWriter(buffer)
    records.write(Event(wall_time=at, file_version="brain.Event:2").SerializeToString())
    for summary in summaries:
        records.write(Event(wall_time=at, step=step, summary=summary).SerializeToString(deterministic=True))
    before = list(folder.glob(f"events.out.tfevents.*.{kind}"))
    if [file.read_bytes() for file in before] == [buffer.getvalue()]:
        return
    file = folder / f"events.out.tfevents.{time.time():010.0f}.{kind}"
    write_atomic(file, buffer.getvalue())
    for old in before:
        if old != file:
            old.unlink(missing_ok=True)
