"""`highrank show RUN`: what a run was and what came out; with `--against RUN` what differs between two."""

import shlex
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.text import Text

from highrank.base.console import console, duration, megabytes, say
from highrank.base.files import shown
from highrank.base.hub import fetched
from highrank.base.options import Words
from highrank.config.run_config import CORE_KEYS, GROUPS, UNHASHED
from highrank.find.reading import QUIET_S, Found, number, one_run, since, weigh
from highrank.find.table import show, show_facts

COUNTED = ("n", "leaked", "cut", "not_finite", "loss_left_out", "loss_cut")
"""What a set's metrics hold beside measures: no difference is drawn of them."""
LONGEST = 100
"""Characters of a value that a line has room for."""


def command(words: list[str]) -> int:
    parser = Words("show", "RUN [--against RUN]")
    parser.add_argument("--against", type=Path)
    parser.add_argument("run", type=Path)
    options = parser.parse_args(words)
    run = one_run("show", fetched("show", options.run))
    if options.against is None:
        show_run(run)
    else:
        show_difference(run, one_run("show", fetched("show", options.against)))
    return 0


def show_run(run: Found) -> None:
    """Prints what a run was, its state, its scores and what can be done with it next."""
    config, results = run.config, run.results
    size, written = weigh(run.path)
    say(f"{config.get('method', 'a run')} on {config.get('model', 'its model')}: {state(run, written)}")
    show_facts((name, value) for name, value in _facts(run, size, written) if value)
    rows = [
        (name, measure, number(measure, before), number(measure, after), _change(measure, before, after))
        for name, measure, before, after in _scores(results)
    ]
    if rows:
        show(["set", "measure", "before", "after", "change"], rows)
    for line in _next(run):
        say(line)


def state(run: Found, written: float) -> str:
    """Returns a run's status, and what ended it or how far it is."""
    results, said = run.results, run.status
    if "error" in results:
        said += f": {results['error']}"
    if run.status == "running":
        said += f", last written {since(written)} ago"
        if time.time() - written > QUIET_S:
            said += "; is it still going? Its command, given again, goes on"
    elif run.status != "done" and "steps" in results:
        said += f" at step {results['steps']} of {results.get('steps_planned', '?')}"
    return said


def _facts(run: Found, size: int, written: float) -> Iterator[tuple[str, str]]:
    config, results = run.config, run.results
    yield "folder", f"{shown(run.path)} ({megabytes(size)}, {since(written)} old)"
    if config:
        own = [key for key in config if "." not in key and key not in (*CORE_KEYS, *GROUPS, "step_version")]
        yield "method", _named(config, "method", {key: config[key] for key in own})
        for group in ("task", "model", "protocol"):
            start = f"{group}."
            inner = {key.removeprefix(start): value for key, value in config.items() if key.startswith(start)}
            brief = {
                "task": inner,
                "model": {"dtype": inner.get("dtype")},
                "protocol": {"version": inner.get("version")},
            }
            yield group, _named(config, group, brief[group])
        source = results.get("model", {})
        yield "weights", f"{source.get('kind', '')} {source.get('location', '')}".strip()
        yield "placement", " ".join(f"{key}={_short(config[key])}" for key in ("placement", "layers") if key in config)
        keys = ("lr", "schedule", "optimizer", "batch_size", "accumulate", "max_steps", "epochs", "seed")
        yield "training", " ".join(f"{key}={_short(config[key])}" for key in keys if config.get(key) is not None)
    params = results.get("params")
    if params:
        yield "trainable / total", f"{params['trainable']:,} / {params['total']:,} ({params['percent']:.4f} %)"
    times = {name.removesuffix("_s").replace("_", " "): value for name, value in results.get("time", {}).items()}
    yield "time", ", ".join(f"{name} {duration(value)}" for name, value in times.items())
    memory = results.get("memory", {})
    yield "memory", ", ".join(f"{k.removesuffix('_bytes').replace('_', ' ')} {megabytes(v)}" for k, v in memory.items())
    git, versions = results.get("git") or {}, results.get("versions", {})
    yield "commit", git.get("commit", "")[:12] + (" with changes" if git.get("dirty") else "")
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items() if name != "platform")


def _named(config: Mapping[str, Any], group: str, values: Mapping[str, Any]) -> str:
    given = ", ".join(f"{key}={_short(value)}" for key, value in values.items() if value not in (None, [], {}))
    return f"{config.get(group, '')}{f' ({given})' if given else ''}"


def _short(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    text = text.replace("\n", "\\n")
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _scores(results: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, Any]]:
    """Yields set, measure, and its values before and after training; the mean over the sets first, where there are several."""
    before, after = (results.get("metrics", {}).get(when, {}) for when in ("before", "final"))
    sets = list(dict.fromkeys([*before.get("sets", {}), *after.get("sets", {})]))
    tables = [("mean", before, after)] if len(sets) > 1 else []
    tables += [(name, before.get("sets", {}).get(name, {}), after.get("sets", {}).get(name, {})) for name in sets]
    for name, first, last in tables:
        for measure in dict.fromkeys([*first, *last]):
            if measure != "sets":
                yield name, measure, first.get(measure), last.get(measure)
    if "validation" in results:
        yield "held-out training examples", "loss", None, results["validation"]["loss"]


def _change(measure: str, before: Any, after: Any) -> str:
    numbers = all(isinstance(value, int | float) for value in (before, after))
    if not numbers or measure in COUNTED or before == after:
        return ""
    return f"{after - before:+.4f}" if "loss" in measure or "perplexity" in measure else f"{after - before:+.1f}"


def _next(run: Found) -> Iterator[str]:
    place = shlex.quote(shown(run.path))
    if run.status == "done":
        if lacking := [name for name in ("config.yaml", "adapter/adapter.json") if not (run.path / name).is_file()]:
            yield f"missing: {', '.join(lacking)}, without which it is neither evaluated nor merged; bring it back"
        yield "next:"
        if not lacking:
            yield f"  highrank eval {place}"
        yield f"  tensorboard --logdir {place}"
    elif run.status == "running":
        yield f"next: highrank watch {place}"
    else:
        yield f"next: highrank run with the same keys goes on in {place}"


def show_difference(run: Found, other: Found) -> None:
    """Prints in which keys two runs differ, and their results beside each other."""
    names = [shown(run.path), shown(other.path)]
    if not console.is_terminal:
        say(f"{names[0]} against {names[1]}")
    else:
        say(f"this:  {names[0]}\nother: {names[1]}")
    keys = dict.fromkeys([*run.config, *other.config])
    missing = object()
    rows = [
        (key, *(_short(each.config[key]) if key in each.config else "–" for each in (run, other)))
        for key in keys
        if key not in UNHASHED and run.config.get(key, missing) != other.config.get(key, missing)
    ]
    if rows:
        show(["key", "this", "other"], rows)
    else:
        say("Their configs are the same.")
    show(["result", "this", "other", "difference"], list(_results(run, other)))


def _results(run: Found, other: Found) -> Iterator[tuple[Any, ...]]:
    yield "status", Text(run.status), Text(other.status), ""
    scores = [{(name, measure): after for name, measure, _, after in _scores(each.results)} for each in (run, other)]
    for name, measure in dict.fromkeys([*scores[0], *scores[1]]):
        values = [found.get((name, measure)) for found in scores]
        if values != [None, None]:
            yield (
                f"{name} {measure}",
                *(number(measure, value) for value in values),
                _change(measure, *reversed(values)),
            )
    for label, values in _figures(run, other):
        yield label, *(_figure(label, value) for value in values), _gap(label, values)
    for part in ("versions", "git", "data"):
        held = [_leaves(each.results.get(part), part) for each in (run, other)]
        for key in dict.fromkeys([*held[0], *held[1]]):
            if held[0].get(key) != held[1].get(key):
                yield key, *(_short(each.get(key, "–"))[:40] for each in held), ""


def _figures(*runs: Found) -> Iterator[tuple[str, list[Any]]]:
    yield "trainable", [run.results.get("params", {}).get("trainable") for run in runs]
    yield "steps", [run.results.get("steps") for run in runs]
    yield "training tokens", [run.results.get("tokens", {}).get("train") for run in runs]
    for key in dict.fromkeys(key for run in runs for key in run.results.get("time", {})):
        yield key.removesuffix("_s").replace("_", " ") + " time", [run.results.get("time", {}).get(key) for run in runs]
    for key in dict.fromkeys(key for run in runs for key in run.results.get("memory", {})):
        label = key.removesuffix("_bytes").replace("_", " ") + " memory"
        yield label, [run.results.get("memory", {}).get(key) for run in runs]


def _figure(label: str, value: Any) -> str:
    if value is None:
        return "–"
    return (
        f"{value:.1f} s" if label.endswith("time") else megabytes(value) if label.endswith("memory") else f"{value:,}"
    )


def _gap(label: str, values: list[Any]) -> str:
    this, other = values
    if None in values or this == other or not other:
        return ""
    return f"× {this / other:.3g}"


def _leaves(value: Any, start: str) -> dict[str, Any]:
    """Returns nested values by dotted keys; rows of data by their names."""
    if isinstance(value, list):
        return {f"{start} {row.get('name')}": f"{row.get('rows')} rows, {str(row.get('sha256'))[:12]}" for row in value}
    if isinstance(value, Mapping):
        return {f"{start}.{key}": inner for key, inner in value.items()}
    return {}
