"""`highrank analyze` and `analyze=true` on runs of a tiny model: what is computed, kept, compared, drawn and refused."""

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from safetensors.numpy import load_file

from highrank.analysis import figures, spectra
from highrank.analysis.analyze import analyze_run, at_end_of, labels
from highrank.analysis.summary import expressive
from highrank.base.errors import UserError
from highrank.base.saved import read_results
from highrank.cli import main
from highrank.model.adapter_folder import read_card
from highrank.train.saved import load_run

WORDS = ["model=tiny_llama", "max_steps=2", "batch_size=2", "task.n_train=4", "task.n_test=1", "eval_before=false"]
RUNS = {
    "hira2": ["method=hira", "r=2"],
    "hira4": ["method=hira", "r=4", "analyze=true"],
    "lora": ["method=lora", "r=3", "lr=0.05"],
    "full": ["method=full", "lr=0.01"],
    "phi": ["method=lora", "r=2", "model=tiny_phi3", "fused=split"],
    "prompt": ["method=prompt_tuning", "num_virtual_tokens=2"],
}
FIGURES = {"heat_map", "spectra", "count_above", "energy", "effective_rank", "rank_per_layer"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The runs by name, trained once."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIGHRANK_CACHE", str(root / "cache"))
        for name, words in RUNS.items():
            assert main(["run", *WORDS, *words, f"run_dir={root / name}"]) == 0
    return root


@pytest.fixture
def runs(trained, tmp_path, monkeypatch):
    """A copy of them that a test may change; figures are named but not rendered, which takes seconds."""
    monkeypatch.setenv("HIGHRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(figures, "write", name_only)
    shutil.copytree(trained, tmp_path / "runs")
    return tmp_path / "runs"


def name_only(folder, drawn):
    folder.mkdir(parents=True, exist_ok=True)
    image = io.BytesIO()
    Figure(figsize=(1, 1)).savefig(image, format="png", dpi=10)
    for name in drawn:
        (folder / f"{name}.png").write_bytes(image.getvalue())
        (folder / f"{name}.svg").touch()


def analyze(capsys, *words):
    status = main(["analyze", *map(str, words)])
    out = capsys.readouterr()
    return status, out.out, out.err


def written(folder):
    return json.loads((folder / "analysis" / "statistics.json").read_text())


def images(folder):
    return {p.stem for p in folder.glob("*.png")}


def test_at_the_end_of_a_run_and_by_command_it_is_the_same(runs, capsys):
    at_end = load_file(runs / "hira4" / "analysis" / spectra.FILE)
    results = json.loads((runs / "hira4" / "results.json").read_text())
    assert results["status"] == "done"
    assert results["analysis"] == written(runs / "hira4")["mean"]
    assert results["time"]["analyze_s"] > 0
    shutil.rmtree(runs / "hira4" / "analysis")
    status, out, err = analyze(capsys, runs / "hira4")
    assert status == 0, err
    assert out.splitlines()[-1] == str(runs / "hira4" / "analysis")
    by_command = load_file(runs / "hira4" / "analysis" / spectra.FILE)
    assert at_end.keys() == by_command.keys()
    assert all((by_command[name] == values).all() for name, values in at_end.items())
    assert images(runs / "hira4" / "analysis") == FIGURES
    assert {p.stem for p in (runs / "hira4" / "analysis").glob("*.svg")} == FIGURES


def test_a_finished_run_is_analysed_when_asked_later(runs, capsys):
    words = ["run", *WORDS, *RUNS["hira2"], f"run_dir={runs / 'hira2'}"]
    assert main(words) == 0
    assert not (runs / "hira2" / "analysis").exists()
    assert main([*words, "analyze=true"]) == 0
    assert "nothing was run again" in " ".join(capsys.readouterr().out.split())
    results = json.loads((runs / "hira2" / "results.json").read_text())
    assert results["analysis"] == written(runs / "hira2")["mean"]


def test_statistics_are_those_of_the_saved_adapter(runs):
    analysis = analyze_run(runs / "lora")
    _, _, adapters = load_run(runs / "lora")
    found = written(runs / "lora")
    assert [view["name"] for view in found["views"]] == [view.name for view in adapters.views]
    for view, row in zip(adapters.views, found["views"], strict=True):
        delta = adapters.delta_weight(view).double().numpy()
        values = np.linalg.svd(delta, compute_uv=False)
        assert (row["part"], row["layer"], row["out_features"]) == (view.part, view.layer, view.out_features)
        assert row["rank"] == np.linalg.matrix_rank(delta.astype(np.float32)) <= 3
        assert row["energy"] == pytest.approx(np.sum(delta**2))
        assert row["largest"] == pytest.approx(values[0])
        assert row["count_above"] == np.sum(values > 0.005) > 0
        base_rank = np.linalg.matrix_rank(adapters.base_weight(view).numpy())
        assert row["base_rank"] == base_rank
        assert row["normalized_rank"] == np.sum(values >= 0.01) / base_rank
        assert row["normalized_rank_relative"] == np.sum(values >= 0.01 * values[0]) / base_rank
    rows = found["views"]
    assert found["mean"]["weights"] == len(rows) == 10
    assert found["mean"]["energy"] == pytest.approx(np.mean([row["energy"] for row in rows]))
    assert found["parts"]["v"]["rank"] == np.mean([row["rank"] for row in rows if row["part"] == "v"])
    assert found["layers"]["1"]["weights"] == 5
    given = {"name": "lora", "r": 3, "alpha": None, "dropout": 0.0}
    assert found["method"] == given | {"scaling": "alpha_over_r", "init": "kaiming", "lr_ratio": 1.0}
    assert analysis.rows == rows


def test_arrays_are_computed_again_only_if_the_adapter_or_the_settings_differ(runs, monkeypatch):
    computed = []
    real = spectra.measure
    monkeypatch.setattr(spectra, "measure", lambda *words: computed.append(words) or real(*words))
    first = analyze_run(runs / "lora")
    analyze_run(runs / "lora")
    assert len(computed) == 1
    analyze_run(runs / "lora", spectra.Settings(sketch=2))
    assert len(computed) == 2
    analyze_run(runs / "lora")
    assert len(computed) == 3  # one set of arrays is kept
    _, _, adapters = load_run(runs / "lora")
    for name, parameter in adapters.named_parameters():
        if name.endswith(".B"):
            parameter.data *= 2
    adapters.save(runs / "lora" / "adapter")
    changed = analyze_run(runs / "lora")
    assert len(computed) == 4
    for row in first.rows:
        np.testing.assert_allclose(changed.values("delta", row), 2 * first.values("delta", row), rtol=1e-9, atol=1e-15)
    (runs / "lora" / "analysis" / spectra.FILE).write_bytes(b"damaged")
    assert analyze_run(runs / "lora").rows == changed.rows
    assert len(computed) == 5


def test_a_randomised_analysis_says_so(runs, capsys):
    status, out, _ = analyze(capsys, runs / "hira4", "--sketch", "2")
    assert status == 0
    assert "ranks and counts are lower bounds" in " ".join(out.split())
    rows = written(runs / "hira4")["views"]
    assert all(row["rank"] <= 2 and row["error"] > 0 for row in rows)
    assert "lower bounds" not in analyze(capsys, runs / "hira4")[1]


def test_full_fine_tuning_has_the_two_errors_of_theorem_1(runs):
    full = analyze_run(runs / "full")
    found = written(runs / "full")
    assert len(found["views"]) == 14
    assert [row["r"] for row in found["expressive"]] == [1, 2, 4]  # the smallest weight is 8 x 16
    _, _, adapters = load_run(runs / "full")
    bounds, errors = [], []
    for view in adapters.views:
        W = adapters.base_weight(view).double().numpy()
        E = adapters.delta_weight(view).double().numpy()
        quotient = np.where(np.abs(W) < 1e-8, 0, E / W)
        bounds.append(np.linalg.svd(quotient, compute_uv=False)[2] * np.linalg.norm(W, 2))
        errors.append(np.linalg.svd(E, compute_uv=False)[2])
    at_2 = found["expressive"][1]
    assert at_2["hira_bound"] == pytest.approx(np.mean(bounds), rel=1e-5)
    assert at_2["lora_error"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert at_2["share_below"] == np.mean(np.array(bounds) < np.array(errors))
    assert images(runs / "full" / "analysis") == FIGURES | {"normalized", "expressive"}
    assert "expressive" not in written_after(runs / "lora")
    assert expressive(full) == found["expressive"]


def written_after(folder):
    analyze_run(folder)
    return written(folder)


def test_runs_are_compared_over_the_weights_they_share(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, err = analyze(capsys, *(runs / name for name in ("hira2", "hira4", "lora")), "--full", runs / "full")
    assert status == 0, err
    assert Path(out.splitlines()[-1]) == runs / "analysis"  # beside them
    found = json.loads((runs / "analysis" / "comparison.json").read_text())
    assert [run["label"] for run in found["runs"]] == ["hira r=2", "hira r=4", "lora", "full"]
    assert [run["run"] for run in found["runs"]] == ["../hira2", "../hira4", "../lora", "../full"]
    assert len(found["weights"]) == 10
    shared = [row for row in written(runs / "full")["views"] if row["name"] in found["weights"]]
    assert found["runs"][-1]["mean"]["energy"] == pytest.approx(np.mean([row["energy"] for row in shared]))
    assert images(runs / "analysis") == FIGURES | {"rank_by_r", "normalized", "expressive"}
    assert analyze(capsys, runs / "hira2", "--full", runs / "full", "--out", runs / "chosen")[0] == 0
    assert "heat_map" in images(runs / "chosen")


def test_a_sweep_stands_for_its_finished_runs_with_an_update(runs, capsys):
    def plan(*names):
        hashes = {name: read_results(runs / name)["config_hash"] for name in ("hira2", "lora", "prompt", "failed")}
        cells = [{"run": name, "axes": {}, "config_hash": hashes.get(name, "")} for name in names]
        (runs / "sweep.json").write_text(json.dumps({"name": "s", "axes": {}, "cells": cells}))

    shutil.copytree(runs / "lora", runs / "failed")
    (runs / "failed" / "results.json").write_text(json.dumps({**read_results(runs / "lora"), "status": "failed"}))
    plan("hira2", "lora", "prompt", "failed", "missing")
    status, _, err = analyze(capsys, runs)
    assert status == 0, err
    found = json.loads((runs / "analysis" / "comparison.json").read_text())
    assert [Path(run["run"]).name for run in found["runs"]] == ["hira2", "lora"]
    (runs / "lora" / "adapter" / "adapter.json").write_text("[]")
    plan("hira2", "lora")
    status, _, err = analyze(capsys, runs)
    assert status == 0
    assert err.startswith("not analysed: lora: adapter: ")
    assert "adapter.json is damaged, got [], which must be a mapping" in err
    assert analyze(capsys, runs / "lora")[0] == 2
    plan("prompt", "failed", "missing")
    status, _, err = analyze(capsys, runs)
    assert status == 2
    assert "analyze: a sweep holds finished runs with a ΔW, got 1 finished and none with a ΔW" in err


@pytest.fixture(scope="module")
def analysed(trained, tmp_path_factory):
    """The analyses of the runs by name."""
    root = tmp_path_factory.mktemp("analysed")
    shutil.copytree(trained, root, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIGHRANK_CACHE", str(root / "cache"))
        patch.setattr(figures, "write", name_only)
        return {name: analyze_run(root / name) for name in ("hira2", "hira4", "lora", "full")}


def drawn(analysed, *names):
    analyses = [analysed[name] for name in names]
    return analyses, figures.draw(analyses, labels(analyses))


class TestFigures:
    def test_the_heat_map_shows_the_normalised_rank(self, analysed):
        (a, b), found = drawn(analysed, "full", "lora")
        first, second = (axis.images[0].get_array() for axis in found["heat_map"].axes[:2])
        parts = ["q", "k", "v", "o", "gate", "up", "down"]
        assert [label.get_text() for label in found["heat_map"].axes[0].get_yticklabels()] == parts
        assert first.shape == (7, 2)
        for row in a.rows:
            assert first[parts.index(row["part"]), row["layer"]] == row["normalized_rank"]
        for row in b.rows:
            assert second[parts.index(row["part"]), row["layer"]] == row["normalized_rank"]
        assert np.ma.is_masked(second[3, 0])  # o was not adapted

    def test_spectra_are_the_first_values_and_r_is_marked_where_it_is_the_rank(self, analysed):
        (lora, _), found = drawn(analysed, "lora", "hira4")
        panel = found["spectra"].axes[0]
        assert panel.get_title(loc="left") == "q"
        curve, r, other, threshold = panel.lines
        np.testing.assert_array_equal(curve.get_ydata()[:3], lora.values("delta", lora.rows[0])[:3])
        assert np.isnan(curve.get_ydata()[3:]).all()  # behind the rank is rounding
        assert set(r.get_xdata()) == {3}
        assert len(other.get_ydata()) == 16
        assert set(threshold.get_ydata()) == {0.01}

    def test_no_more_than_fifty_values(self, analysed):
        a = analysed["lora"]
        long = {name: np.linspace(1, 0.1, 80) for name in a.spectra.values}
        found = figures.draw([replace(a, spectra=replace(a.spectra, values=long))], ["lora"])
        assert all(len(axis.lines[0].get_ydata()) == 50 for axis in found["spectra"].axes if axis.lines)

    def test_the_mean_rank_by_r(self, analysed):
        analyses, found = drawn(analysed, "hira4", "hira2", "lora")
        hira, lora, base = found["rank_by_r"].axes[0].lines
        assert hira.get_xdata().tolist() == [2, 4]
        assert hira.get_ydata()[1] == np.mean([row["rank"] for row in analyses[0].rows])
        assert (lora.get_xdata().tolist(), lora.get_ydata().tolist()) == ([3], [3.0])
        assert base.get_ydata()[0] == 12.8  # of q, up and down 16, of k and v 8

    @pytest.mark.parametrize("key", ["count_above", "energy", "effective_rank"])
    def test_a_statistic_by_layer(self, analysed, key):
        (a,), found = drawn(analysed, "lora")
        for axis, part in zip(found[key].axes, ["q", "k", "v", "up", "down"], strict=False):
            expected = [row[key] for row in a.rows if row["part"] == part]
            assert axis.get_title(loc="left") == part
            np.testing.assert_array_equal(axis.lines[0].get_ydata(), expected)

    def test_normalised_spectra_have_unit_norm(self, analysed):
        _, found = drawn(analysed, "full")
        for line in found["normalized"].axes[0].lines:
            assert np.linalg.norm(np.nan_to_num(line.get_ydata())) == pytest.approx(1)

    def test_files_are_images_and_the_same_again(self, analysed, tmp_path):
        for name in "ab":
            _, found = drawn(analysed, "lora")
            figures.write(tmp_path / name, {"spectra": found["spectra"]})
        for suffix, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
            first, second = ((tmp_path / name / f"spectra.{suffix}").read_bytes() for name in "ab")
            assert first.startswith(start)
            assert first == second


class TestRefused:
    def test_a_method_that_changes_no_weight(self, runs, capsys):
        status, _, err = analyze(capsys, runs / "prompt")
        assert status == 2
        assert f"analyze: prompt_tuning changes no weight, so there is no ΔW, got {runs / 'prompt'}" in err
        status = main(["run", *WORDS, *RUNS["prompt"], "analyze=true", f"run_dir={runs / 'new'}"])
        assert status == 2
        assert "got analyze=true with method=prompt_tuning" in capsys.readouterr().err
        assert not (runs / "new").exists()

    def test_a_run_without_its_adapter(self, runs, capsys):
        shutil.rmtree(runs / "lora" / "adapter")
        status, _, err = analyze(capsys, runs / "lora")
        assert status == 2
        assert "holds adapter/adapter.json" in err
        assert "has the run finished training?" in err

    def test_a_run_whose_weights_are_gone(self, runs, capsys):
        os.remove(runs / "lora" / "adapter" / "adapter.safetensors")
        status, _, err = analyze(capsys, runs / "lora")
        assert status == 2
        assert "got none in" in err

    def test_runs_on_different_bases(self, runs, capsys):
        status, _, err = analyze(capsys, runs / "lora", runs / "phi")
        assert status == 2
        assert f"compared runs share one base, got tiny_llama in {runs / 'lora'}, tiny_phi3 in {runs / 'phi'}" in err

    def test_runs_that_adapt_different_weights(self, runs, capsys):
        for name, placement in (("q", "[q]"), ("v", "[v]")):
            assert main(["run", *WORDS, "r=2", f"placement={placement}", f"run_dir={runs / name}"]) == 0
        status, _, err = analyze(capsys, runs / "q", runs / "v")
        assert status == 2
        assert "compared runs share adapted weights, got" in err

    def test_a_reference_that_is_no_full_fine_tuning(self, runs, capsys):
        status, _, err = analyze(capsys, runs / "hira2", "--full", runs / "lora")
        assert status == 2
        assert "--full is a run of full fine-tuning, got method=lora" in err

    def test_weights_that_are_not_finite(self, runs):
        _, _, adapters = load_run(runs / "lora")
        next(p for _, p in adapters.named_parameters()).data.fill_(float("nan"))
        with pytest.raises(UserError, match="trained values must be finite to be saved"):
            adapters.save(runs / "lora" / "adapter")
        found = at_end_of(runs / "lora", adapters)
        assert found.keys() == {"error"}
        assert "ΔW must be finite, got NaN or inf in model.layers.0.self_attn.q_proj" in found["error"]
        assert read_card(runs / "lora" / "adapter")["method"] == "lora"

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "analyze: the following arguments are required: runs; use: highrank analyze RUN"),
            (["x", "--rank", "3"], "analyze: unrecognized arguments: --rank 3"),
            (["x", "--sketch", "many"], "analyze: argument --sketch: invalid int value"),
            (["x", "--sketch", "0"], "analyze: sketch must be >= 1, got sketch=0"),
            (["x", "--tiny", "-1"], "analyze: tiny must be a number >= 0, got tiny=-1.0"),
            (["nowhere"], "a run directory holds config.yaml, got nowhere"),
        ],
    )
    def test_words(self, capsys, words, message):
        status, _, err = analyze(capsys, *words)
        assert status == 2
        assert message in err
