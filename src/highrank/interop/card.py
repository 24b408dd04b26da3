"""The README.md of a merged or exported run: method, base, data, protocol, scores, the command that makes it again."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from highrank.base.files import shown
from highrank.base.saved import read_results
from highrank.config.run_config import Run
from highrank.train.saved import words_of

WHAT = {
    "peft": "An adapter for the base model below, in the format of Hugging Face PEFT.",
    "highrank": "An adapter for the base model below, as HighRank saves it.",
    "transformers": "The base model below with the adapter merged into its weights.",
}


def model_card(run: Run, folder: Path, library: str, extra: Mapping[str, Any] | None = None) -> str:
    """Returns a model card; `library` is one of `WHAT`, `extra` adds rows to the table of facts.

    Its front names the base only where that has a name on the Hub, which refuses a card with another.
    """
    results = read_results(folder)
    model, source = run.model, results["model"]
    base = model.get("hub") or source["name"]
    front = {
        "library_name": library,
        **({"base_model": model["hub"]} if model.get("hub") else {}),
        "tags": ["highrank", run.method.name],
    }
    params, per = results.get("params", {}), "image" if run.make_task().kind == "classify_images" else "token"
    facts = {
        "method": f"{run.method.name}: {formula(run.method)}",
        "fields": _listed(run.resolved["method"], "name"),
        "placement": f"{run.core.placement}, layers {run.core.layers}" if run.method.family.changes_weights else "",
        "trainable": f"{params['trainable']:,} of {params['total']:,} ({params['percent']:.4f} %)" if params else "",
        "base model": f"{base}, from {source['kind']}, sha {source['sha']}",
        "base dtype": model["dtype"],
        "trained on": f"the base quantised to {kind}, not its own weights" if (kind := model.get("quantize")) else "",
        "started from": _started(results.get("start")),
        "task": run.task.name,
        "data": "; ".join(
            f"{shown(d['name'])}, {d['rows']} rows, sha256 {d['sha256']}" for d in results.get("data", [])
        ),
        "protocol": f"{run.protocol.name} version {run.protocol.version}, hash {run.protocol.hash}",
        "training": f"{results['steps']} steps, lr {run.core.lr}, seed {run.core.seed}" if "steps" in results else "",
        "imported": _listed(results.get("imported", {})),
        **(extra or {}),
    }
    rows = "".join(f"| {key} | {_cell(value)} |\n" for key, value in facts.items() if value)
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {run.name}\n\n{WHAT[library]}\n\n"
        f"| | |\n| --- | --- |\n{rows}{_scores(results.get('metrics', {}), per)}{_command(run, results)}"
    )


def _command(run: Run, results: Mapping[str, Any]) -> str:
    command = f"\n## Made by\n\n```bash\npython run.py {shlex.join(words_of(run, typed=True))}\n```\n"
    return "" if "imported" in results else command


def _started(start: Mapping[str, Any] | None) -> str:
    if start is None:
        return ""
    what = "the adapter" if start["as"] == "adapter" else "the merged weights"
    return f"{what} of a run of {start['method']} on {start['task']}, its config {start['config_hash']}"


def formula(method: Any) -> str:
    """Returns the first formula of a method's file, as printed there."""
    doc = (sys.modules[method.__module__].__doc__ or "").splitlines()
    return next((line.strip() for line in doc if line.startswith("    ") and "=" in line), doc[0] if doc else "")


def _scores(metrics: Mapping[str, Any], per: str) -> str:
    rows = [
        f"| {name} | {when} | {_listed(set_metrics)} |\n"
        for when, label in (("before training", "before"), ("after training", "final"))
        for name, set_metrics in metrics.get(label, {}).get("sets", {}).items()
    ]
    return (
        f"\n## Scores\n\nIn percent, but for counts, loss (nats per {per}) and perplexity.\n\n| set | | |\n| --- | --- | --- |\n"
        + "".join(rows)
        if rows
        else ""
    )


def _listed(values: Mapping[str, Any], *without: str) -> str:
    texts = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items() if k not in without}
    return ", ".join(f"{key} {value}" for key, value in texts.items())


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|")
