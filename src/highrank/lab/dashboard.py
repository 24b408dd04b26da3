"""TensorBoard for runs and sweeps: the HPARAMS table, the custom-scalar layout, final metrics, figures of an analysis.

TensorBoard makes the HPARAMS table of three records: EXPERIMENT, in the root of the log folder, names the columns;
SESSION_START and SESSION_END, in a run's folder, hold its values and its status. Metrics are scalars of the run.
A run writes its session itself; a sweep adds an EXPERIMENT over the columns of all its methods, and the layout.
"""

import io
import re
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata, plugin_data_pb2
from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS, STATUS_UNKNOWN
from tensorboard.plugins.hparams.summary_v2 import Discrete, HParam, Metric, RealInterval, hparams_config_pb, hparams_pb
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import custom_scalars, scalar

from highrank.adapters import write_atomic
from highrank.config import UNHASHED
from highrank.lab.runs import Record, flat, read_runs, read_sweep
from highrank.report import SECONDARY

STATUSES = {"done": STATUS_SUCCESS, "failed": STATUS_FAILURE, "oom": STATUS_FAILURE, "interrupted": STATUS_UNKNOWN}
COSTS = {
    "trainable": ("params", "trainable"),
    "percent": ("params", "percent"),
    "train_s": ("time", "train_s"),
    "total_s": ("time", "total_s"),
    "peak_resident_bytes": ("memory", "peak_resident_bytes"),
    "peak_cuda_bytes": ("memory", "peak_cuda_bytes"),
}
"""Scalars under cost/, and where results.json has them."""


def write_run(folder: Path) -> None:
    """Writes one run's session: hyperparameters, status, final metrics under final/*, costs under cost/*, figures.

    Writing again replaces what it wrote before; a folder without readable results is left alone.
    """
    for record in read_runs([folder])[0]:
        _write_session(record, hyperparameters(record.config))


def write(folder: Path) -> None:
    """Writes a sweep's EXPERIMENT record, its custom-scalar layout, and the sessions of its cells.

    The columns are the swept keys of all methods, the learning rate, the headline metrics and the costs. The runs of a
    learning-rate search are no sessions. Writing again replaces what it wrote before.

    Raises:
        UserError: if sweep.json is missing or damaged.
    """
    sweep = read_sweep(folder)
    domains = {key: _domain([_plain(value) for value in values]) for key, values in sweep.axes.items()}
    for record in sweep.records:
        own = {k: v for k, v in hyperparameters(record.config).items() if k not in domains}
        for key, value in record.axes.items():
            own[key] = str(_plain(value)) if key in domains and domains[key].dtype is str else _plain(value)
        if record.status != "running":
            _write_session(record, own)
    for file in (folder / "search").glob("*/events.out.tfevents.*.session"):
        file.unlink()

    columns = [HParam(key, domain) for key, domain in domains.items()]
    rates = [float(record.config["lr"]) for record in sweep.records if record.config]
    if "lr" not in domains and rates:
        columns.append(HParam("lr", RealInterval(min(rates), max(rates))))
    tags = list(dict.fromkeys(tag for record in sweep.records for tag in scalars(record.results) if _headline(tag)))
    tags.sort(key=lambda tag: (tag.startswith("cost/"), tag.count("/")))
    metrics = [Metric(tag, display_name=tag.partition("/")[2].replace("/", " ")) for tag in tags]
    planned = (folder / "sweep.json").stat().st_mtime
    _write(folder, "experiment", [hparams_config_pb(columns, metrics, planned), layout(tags), *_figures(folder)], planned)


def hyperparameters(config: Mapping[str, Any]) -> dict[str, str | bool | int | float]:
    """Returns a resolved config's groups by name, the method's fields and the core keys that can change the result."""
    named = {key: value for key, value in flat(config).items() if "." not in key and key not in UNHASHED}
    return {key: _plain(value) for key, value in named.items() if value is not None}


def scalars(results: Mapping[str, Any]) -> dict[str, float]:
    """Returns tag -> value: final/<set>/<metric>, the macro average final/<metric>, and cost/<name>."""
    final = results.get("metrics", {}).get("final", {})
    found = {f"final/{name}": value for name, value in final.items() if name != "sets"}
    for name, values in final.get("sets", {}).items():
        found |= {f"final/{name}/{metric}": value for metric, value in values.items()}
    found |= {f"cost/{name}": results.get(part, {}).get(key) for name, (part, key) in COSTS.items()}
    return {tag: value for tag, value in found.items() if value is not None}


def layout(tags: Iterable[str]) -> Summary:
    """Returns the custom-scalar layout: training curves, final metrics with one chart per test set, costs."""
    charts: dict[str, dict[str, Any]] = {"training": {}, "final": {}, "cost": {}}
    for name in ("train/loss", "validation/loss"):
        charts["training"][name] = ["Multiline", [f"^{name}$"]]
    for tag in tags:
        kind, _, name = tag.partition("/")
        title = name if kind == "cost" else name.rpartition("/")[0] or "macro average"
        charts[kind].setdefault(title, ["Multiline", []])[1].append(f"^{re.escape(tag)}$")
    return custom_scalars(charts)


def _plain(value: Any) -> str | bool | int | float:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return value if isinstance(value, str | bool | int | float) else "null" if value is None else str(value)


def _domain(values: Sequence[str | bool | int | float]) -> Discrete:
    """Returns the values as one of TensorBoard's types: truth values, numbers, or else text."""
    if all(isinstance(value, bool) for value in values):
        return Discrete(values, bool)
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return Discrete(map(float, values), float)
    return Discrete(map(str, values), str)


def _headline(tag: str) -> bool:
    """Whether a metric is worth a column: not another answer rule's, the clean subset's, or a count of examples."""
    return tag.startswith("cost/") or not (tag.endswith(SECONDARY) or tag.rpartition("/")[2] in ("n", "leaked"))


def _write_session(record: Record, values: Mapping[str, Any]) -> None:
    ended = (record.path / "results.json").stat().st_mtime
    started = ended - record.results.get("time", {}).get("total_s", 0)
    summaries = [hparams_pb(values, trial_id="", start_time_secs=started)]
    if record.status in STATUSES:
        end = plugin_data_pb2.SessionEndInfo(status=STATUSES[record.status], end_time_secs=ended)
        about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=end))
        value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=about, tensor=metadata.NULL_TENSOR)
        summaries.append(Summary(value=[value]))
    summaries += [scalar(tag, value) for tag, value in scalars(record.results).items()]
    _write(record.path, "session", [*summaries, *_figures(record.path)], ended, record.results.get("steps", 0))


def _figures(folder: Path) -> list[Summary]:
    """Returns the figures in a folder's analysis/ as images."""
    found = []
    for file in sorted((folder / "analysis").glob("*.png")):
        data = file.read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=data)
        found.append(Summary(value=[Summary.Value(tag=f"analysis/{file.stem}", image=image)]))
    return found


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
