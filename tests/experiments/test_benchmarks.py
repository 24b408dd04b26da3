"""Every benchmark's `main` on tiny shapes: each table has its rows, missing peers are named, the JSON has medians."""

import importlib
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from highrank.config.words import compose_run
from highrank.sweep.grid import expand

FOLDER = Path(__file__).parents[2] / "experiments" / "benchmarks"
SHAPE = ["--hidden=32", "--inter=64", "--heads=2", "--kv-heads=1", "--vocab=64", "--layers=1", "--batch=2"]
TINY = [*SHAPE, "--sequence=8", "--device=cpu", "--warmups=0"]
REAL = ["model=tiny_llama", "task.n_train=8", "task.n_test=4", "batch_size=2", "--device=cpu"]
METHODS = ["hyperadapt", "lora", "dora", "hira", "hilora", "vera", "boft1", "boft4"]
LATER = "mora,ia3,boha,abba,loha,lokr,gralora,shira,miss,bat,svft,randlora,oft,delora,lora_xs,pissa,layernorm,bottleneck,parallel,compacter,sum"
"""The others that fit the tiny shape."""

# Lightning, the Trainer and PEFT warn of workers, extensions and their own deprecations
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def bench(scripts):
    """Returns a function that runs a benchmark: (stdout, its results)."""
    run_script = scripts(FOLDER)

    def run(name, *words):
        out, found = run_script(name, *words)
        assert found["benchmark"] == name
        stated = {"device", "threads", "torch", "peft"} | (
            {"dtype"}
            if name not in ("startup", "sweep_overhead", "run_scaling", "allocator", "memory_estimate")
            else set()
        )
        assert stated <= found["environment"].keys()
        assert all(f"{key} " in out.splitlines()[0] for key in stated)
        return out, found["results"]

    return run


@pytest.fixture
def without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)


def positive(found):
    assert math.isfinite(found["median"])
    assert 0 < found["q1"] <= found["median"] <= found["q3"]


def test_step_cost(bench, capsys):
    pytest.importorskip("peft")
    out, results = bench("step_cost", *TINY, "--rounds=1", "--r=2", "--vera-r=4", f"--methods={','.join(METHODS)}")
    assert list(results) == METHODS
    rows = [line for line in out.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) == 1 + 3 * len(METHODS)
    for key, found in results.items():
        for side in ("ours", "PEFT", "listing"):
            if "gap" not in found[side]:
                positive(found[side]["time"])
                assert found[side]["saved"] > 1
                assert found[side]["peak"] > 0
                # all sides compute one function: fp32 sums of other order
                assert found[side]["loss"] == pytest.approx(found["ours"]["loss"], abs=1e-4), (key, side)
    assert "PEFT has no HyperAdapt" in out
    assert "PEFT has no HiLoRA" in out
    gaps = {(key, side) for key, found in results.items() for side, at in found.items() if "gap" in at}
    expected = {("hyperadapt", "PEFT"), ("hilora", "PEFT"), ("lora", "listing")}
    assert expected <= gaps <= expected | {("boft4", "PEFT")}
    if ("boft4", "PEFT") in gaps:  # where PEFT's extension does not build
        assert "PEFT runs factor 1 without its CUDA extension" in out


def test_step_cost_of_the_other_methods(bench):
    pytest.importorskip("peft")
    _, results = bench("step_cost", *TINY, "--rounds=1", "--r=8", f"--methods={LATER}")
    assert list(results) == LATER.split(",")
    for key, found in results.items():
        positive(found["ours"]["time"])
        for side in ("PEFT", "listing"):
            if "gap" not in found[side]:
                assert found[side]["loss"] == pytest.approx(found["ours"]["loss"], abs=1e-4), (key, side)
    no_type = {"mora", "boha", "abba", "svft", "lora_xs", "bottleneck", "parallel", "compacter", "sum"}
    assert {key for key, found in results.items() if "PEFT has no" in found["PEFT"].get("gap", "")} == no_type


def test_step_cost_without_peft(bench, without_peft):
    out, results = bench("step_cost", *TINY, "--rounds=1", "--methods=hira", "--r=2")
    assert "PEFT is not installed" in out
    positive(results["hira"]["ours"]["time"])


def test_hadamard(bench):
    _, results = bench("hadamard", "--rounds=1", "--shapes=32x16,16x32", "--ranks=4", "--device=cpu")
    assert list(results) == ["32x16, r=4", "16x32, r=4"]
    assert all(set(found) == {"plain"} for found in results.values())  # the kernel's side needs a GPU


def test_scaling(bench):
    values = ["--r-values=2,4", "--hidden-values=32", "--tokens-values=4", "--layers-values=1", "--factor-values=1,2"]
    out, results = bench("scaling", *TINY, *values, "--rounds=1", "--methods=lora,boft4")
    slopes = {row["axis"]: row["exponents"] for row in results if "exponents" in row}
    assert {axis: set(of) for axis, of in slopes.items()} == {
        **{axis: {"frozen", "lora", "boft4"} for axis in ("hidden", "tokens", "layers")},
        "r": {"frozen", "lora"},
        "factor": {"frozen", "boft4"},
    }
    assert f"| exponent | {slopes['r']['frozen']:.2f} | {slopes['r']['lora']:.2f} |" in out
    results = [row for row in results if "methods" in row]
    assert [(row["axis"], row["value"]) for row in results] == [
        *[("r", 2), ("r", 4), ("hidden", 32), ("tokens", 4), ("layers", 1), ("factor", 1), ("factor", 2)]
    ]
    for row in results:
        for found in row["methods"].values():
            positive(found["time"])


def test_a_method_without_an_axis_has_no_exponent_there(bench):
    out, results = bench("scaling", *TINY, "--axes=factor,layers", "--layers-values=1", "--rounds=1", "--methods=lora")
    assert [row["axis"] for row in results] == ["layers", "layers"]
    assert out.count("| exponent |") == 1


def test_an_exponent_is_the_power_with_which_cost_grows(bench):
    common = importlib.import_module("common")
    assert common.exponent([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)]) == pytest.approx(1.5)
    assert common.exponent([64, 256], [2.0, 2.0]) == pytest.approx(0)
    assert math.isnan(common.exponent([4], [1.0]))


def test_run_scaling(bench):
    words = ["model=tiny_llama", "method=lora", "r=2", "max_steps=2", "task.n_test=2", "task.n_train=8"]
    out, results = bench("run_scaling", "--axes=cells", "--cells-values=1,2", "--rounds=1", *words, "eval_before=false")
    (cells,) = results
    assert [(point["value"], point["wall"]["median"] > point["train"]["median"] > 0) for point in cells["points"]] == [
        (1, True),
        (2, True),
    ]
    assert f"| exponent | {cells['exponents']['wall']:.2f} |" in out


@pytest.mark.parametrize("axis", ["rows", "length", "cells", "processes"])
def test_every_point_of_an_axis_is_a_run_that_can_be(bench, axis):
    script = importlib.import_module("run_scaling")
    values = list(map(int, script.AXES[axis].split(",")))
    runs = [
        expand(words[1:]).cells if (words := script.words(axis, v, 4))[0] == "-m" else [compose_run(words)]
        for v in values
    ]
    assert len({len(run) for run in runs}) == (len(values) if axis == "cells" else 1)
    if axis == "processes":
        assert [run.core.batch_size * run.trainer["devices"] for (run,) in runs] == [4, 4]


def test_startup(bench):
    out, results = bench("startup", "--rounds=1", "--warmups=0", "--only=import highrank,--help")
    assert list(results) == ["import highrank", "run.py --help"]
    for name, found in results.items():
        assert f"| {name} |" in out
        positive(found)


def test_sweep_overhead(bench):
    out, found = bench("sweep_overhead", *REAL[:-1], "method=lora", "r=2", "seed=0,1", "max_steps=2")
    assert found["runs"] == 2
    assert found["wall_s"] == pytest.approx(sum(found["seconds"].values()))
    assert found["seconds"]["train_s"] > 0
    assert found["over"] > 1
    assert f"{found['over']:.2f} x training and evaluation after; 0 runs read" in " ".join(out.split())


def test_allocator(bench):
    words = ["model=tiny_llama", "--sequence=48", "--batch=1", "--steps=1", "--rounds=1"]
    out, results = bench("allocator", *words)
    assert [row["side"] for row in results] == ["kept", "above 1 MiB anew", "above 256 KiB anew"]
    assert results[0]["over_kept"]["median"] == 1
    for row in results:
        positive(row["over_kept"])
        positive(row["peak"])
    assert "peak GiB" in out


def test_memory_estimate(bench, tiny_sweep):
    _, results = bench("memory_estimate", str(tiny_sweep))
    assert {row["method"] for row in results} == {"hira", "lora", "hyperadapt"}
    for row in results:
        assert row["measured"] > 2**27
        assert row["estimated"] == row["parts"]["peak"]
        assert row["ratio"] == pytest.approx(row["estimated"] / row["measured"])


def test_merged_latency(bench):
    out, results = bench("merged_latency", *TINY, "--rounds=1", "--methods=hyperadapt,hira", "--r=2")
    assert list(results) == ["prompt", "token"]
    sides = ["a copy", *(f"{label}, {how}" for label in ("HyperAdapt", "HiRA r=2") for how in ("acting", "merged"))]
    for of in results.values():
        assert list(of) == sides
        for found in of.values():
            positive(found)
    assert all(f"| {side} |" in out for side in sides)


def test_train_throughput(bench):
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    out, results = bench("train_throughput", *REAL, "--rounds=1", "--block=2", "--test-examples=2")
    assert list(results) == ["lora", "hira"]
    for method, found in results.items():
        assert f"| {method} | PEFT + Trainer |" in out
        positive(found["speedup"])
        assert len(found["ours"]["losses"]) == len(found["PEFT"]["losses"]) == 4
        # four small steps from one start, in other batches
        assert found["ours"]["test_loss"] == pytest.approx(found["PEFT"]["test_loss"], rel=0.02)


CURVES = [*REAL, "--methods=lora", "--steps=4", "--block=1", "--every=2", "--at=2,4", "--test-examples=3"]


def test_time_to_loss(bench):
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    out, results = bench(
        "time_to_loss", *CURVES, "--methods=lora,hira", "--seeds=0,1", "--batches=20,1+packed", "lr=0.05"
    )
    assert list(results) == ["lora", "hira"]
    for method, seeds in results.items():
        assert list(seeds) == ["0", "1"]
        for found in seeds.values():
            curves = {side: found[side]["curve"] for side in ("ours 20", "ours 1+packed", "PEFT")}
            for curve in curves.values():
                assert [steps for steps, _, _ in curve] == [0, 2, 4]
                assert curve[0][1] == 0 < curve[1][1] < curve[2][1]
                # one model and one start
                assert curve[0][2] == pytest.approx(curves["PEFT"][0][2], abs=1e-5)
                assert curve[2][2] < curve[0][2]
            for side in ("ours 20", "ours 1+packed"):
                assert list(found[side]["sooner"]) == ["2", "4"]
                assert found[side]["padding"] >= 1
        rows = [line for line in out.splitlines() if line.startswith(f"| {method} | ")]
        assert len(rows) == 8  # three sides of two seeds, two medians


def test_time_to_loss_without_peft(bench, without_peft):
    out, results = bench("time_to_loss", *CURVES, "--seeds=0")
    assert "PEFT is not installed" in out
    assert len(results["lora"]["0"]["ours 20"]["curve"]) == 3


def test_time_to_loss_refuses_counts_between_its_points(bench):
    with pytest.raises(SystemExit, match="--every must be a multiple of --block"):
        bench("time_to_loss", "--steps=10", "--every=4")


def test_how_much_sooner_a_curve_reaches_a_loss(bench):
    script = importlib.import_module("time_to_loss")
    ours = [(0, 0.0, 2.0), (2, 10.0, 1.0), (4, 20.0, 1.5), (6, 30.0, 0.5)]
    theirs = [(0, 0.0, 2.0), (2, 30.0, 1.25), (4, 60.0, 0.75), (6, 90.0, 0.4)]
    assert script.seconds_to(ours, 1.0) == 10
    assert script.sooner(ours, theirs, 2) == 30 / 7.5
    assert script.sooner(ours, theirs, 4) == 60 / 27.5
    assert script.sooner(ours, theirs, 6) is None
    assert script.middle([3.0, None, 1.5]) == 1.5
    assert script.middle([None, None, 1.5]) is None


def test_the_test_loss_is_of_as_many_examples_of_each_set(bench, monkeypatch):
    script = importlib.import_module("train_throughput")
    monkeypatch.setattr(script, "encode", lambda record, protocol, tokenizer: record)
    task = SimpleNamespace(test=lambda: {"a": ["a1", "a2", "a3"], "b": ["b1"], "c": ["c1", "c2"]})
    run = SimpleNamespace(make_task=lambda: task, protocol=None)
    data = SimpleNamespace(tokenizer=None)
    assert script.test_rows(run, data, 4) == ["a1", "b1", "c1", "a2"]
    assert script.test_rows(run, data, 9) == ["a1", "b1", "c1", "a2", "c2", "a3"]


def test_train_throughput_without_peft(bench, without_peft):
    out, results = bench("train_throughput", *REAL, "--rounds=1", "--block=2", "--methods=lora", "--test-examples=2")
    assert "PEFT is not installed" in out
    positive(results["lora"]["ours"]["samples_per_second"])


EVAL = [*REAL, "--rounds=1", "--prompts=4", "--batch-sizes=1,3", "--batches=1", "protocol.max_new_tokens=4"]


def test_eval_throughput(bench):
    pytest.importorskip("peft")
    out, results = bench("eval_throughput", *EVAL)
    assert list(results) == ["hira", "lora"]
    for found in results.values():
        assert list(found) == ["1", "3"]
        for at in found.values():
            assert at["prompts"] == 4
            for side in ("ours", "generate", "no adapter", "PEFT"):
                positive(at[side]["samples_per_second"])
                positive(at[side]["ours_over"])
                assert side == "no adapter" or at[side]["same_text"] == 1
            positive(at["ours"]["batching"])
        assert found["1"]["ours"]["batching"]["median"] == 1
    assert "| over batch size 1 |" in out


def test_eval_throughput_without_peft(bench, without_peft):
    out, results = bench("eval_throughput", *EVAL, "--methods=lora")
    assert "PEFT is not installed" in out
    positive(results["lora"]["3"]["generate"]["ours_over"])
