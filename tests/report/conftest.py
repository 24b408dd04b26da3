"""Sweep folders with made-up results, as a sweep writes them: what the report and its figures are tested on."""

import json

import numpy as np
import pytest
from omegaconf import OmegaConf

METHODS = {"hira": {"r": 16, "R": "w0", "R_rank": None}, "lora": {"r": 16, "alpha": None}, "hyperadapt": {}}
PARAMS = {"hira": 20_000, "lora": 20_000, "hyperadapt": 1_000}


def config(method="hira", task="wordmath", member=None, model="tiny_llama", protocol="clean", **keys):
    """A resolved config; keys that the method has are its own."""
    fields = METHODS.get(method, {}) | {k: v for k, v in keys.items() if k in ("r", "r1", "r2", "R", "R_rank")}
    core = {k: v for k, v in keys.items() if k not in fields}
    return {
        "method": {"name": method, **fields},
        "task": {"name": task, "version": 1, "n_test": 50, "data_seed": 0, **({"member": member} if member else {})},
        "model": {"name": model, "dtype": "float32"},
        "protocol": {"name": protocol, "version": 1},
        "trainer": {"accelerator": "cpu"},
        **{"placement": "fc_qkv", "seed": 0, "lr": 1e-3, "output": "outputs", **core},
    }


def write_run(folder, settings, correct, metric="accuracy", status="done", before=0.25, leaked=0, **values):
    """Writes one run directory; `correct` maps test sets to one truth value per example."""
    folder.mkdir(parents=True)
    method = settings["method"]["name"]
    trainable = PARAMS.get(method, 10_000) * settings["method"].get("r", 16) // 16
    sets, base = {}, {}
    for name, right in correct.items():
        right = np.asarray(right, dtype=bool)
        sets[name] = {"n": len(right), metric: 100 * right.mean(), "unparsed": 2.0, "leaked": leaked}
        if leaked:
            sets[name][f"{metric}_clean"] = 100 * right[leaked:].mean()
        base[name] = {"n": len(right), metric: 100 * before, "unparsed": 10.0, "leaked": 0}
        rows = [{"id": f"{name}-{i}", "gold": i % 2, "output": "", "correct": bool(ok)} for i, ok in enumerate(right)]
        (folder / "predictions").mkdir(exist_ok=True)
        (folder / "predictions" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def macro(found):
        return {"sets": found, metric: sum(own[metric] for own in found.values()) / len(found)}

    results = {
        "status": status,
        "config_hash": folder.name.ljust(64, "0"),
        "git": {"commit": "c" * 40, "dirty": False},
        "versions": {"torch": "2.9", "device": "cpu"},
        "model": {"name": settings["model"]["name"], "kind": "random", "sha": "a" * 64},
        "data": [{"name": "made/test", "rows": 50, "sha256": "b" * 64}],
        "protocol": {"name": settings["protocol"]["name"], "hash": "d" * 64, "version": 1},
        "params": {"trainable": trainable, "total": 10**6, "percent": trainable / 1e4, "frozen_extra": 0, "head": 0},
        "metrics": {"before": macro(base), "final": macro(sets)},
        "time": {"train_s": 10.0 + trainable / 1e4, "total_s": 20.0},
        "memory": {"peak_resident_bytes": 2**30 + 1000 * trainable},
        "steps": 40,
        "seed": settings["seed"],
        **values,
    }
    if status != "done":
        results.pop("metrics")
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(settings)))
    return folder


class Fake:
    """A sweep folder that grows by `run`."""

    def __init__(self, folder):
        self.folder, self.cells, self.search = folder, [], None
        folder.mkdir()

    def run(self, axes, share, sets=("made",), n=50, seed_effect=0.0, **values):
        """Adds a cell; each example is right with the probability `share`, and examples are as hard for every arm."""
        method = axes.get("method", "hira")
        keys = {k: v for k, v in axes.items() if k != "task"}
        task, _, member = axes.get("task", "wordmath").partition("/")
        settings = config(**{"method": method, "task": task, "member": member or None, **keys})
        name = "_".join(f"{k}{v}".replace("/", "-") for k, v in axes.items())
        correct = values.pop("correct", None)
        if correct is None:
            rng = np.random.default_rng([ord(c) for c in name])
            hard = {s: np.random.default_rng(len(s)).random(n) for s in sets}
            shift = seed_effect * rng.standard_normal()
            correct = {s: 0.7 * hard[s] + 0.3 * rng.random(n) < share + shift for s in sets}
        path = write_run(self.folder / name, settings, correct, **values)
        self.cells.append({"run": name, "config_hash": name.ljust(64, "0"), "words": [], "axes": axes})
        return path

    def close(self, **values):
        """Writes sweep.json and returns the folder."""
        axes = {}
        for cell in self.cells:
            for key, value in cell["axes"].items():
                if value not in axes.setdefault(key, []):
                    axes[key].append(value)
        plan = {
            "name": "made-up",
            "words": ["method=hira,lora"],
            "axes": axes,
            "cells": self.cells,
            "lr_search": self.search,
        }
        (self.folder / "sweep.json").write_text(json.dumps({**plan, **values}))
        return self.folder


@pytest.fixture
def fake(tmp_path):
    return Fake(tmp_path / "sweep")
