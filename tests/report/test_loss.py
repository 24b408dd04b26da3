"""The test loss in a report: less is better, in every table, test and sentence; runs without it are reported as before."""

import csv
import io
import json

import numpy as np
import pytest
from scipy import stats

from highrank.report.dashboard import scalars
from highrank.report.page import read, report
from highrank.report.runs import read_sweep
from highrank.report.scores import collect, compare, items, losses, pivot

BEST = {"hira": 0.80, "lora": 0.90, "hyperadapt": 1.00}
"""Nats per token; the share of right answers is the other way round, so that the two disagree on what is best."""


def with_loss(path, level, tokens=None, left_out=0):
    """Gives a made-up run the losses of its gold answers: examples are as hard for every run."""
    results = json.loads((path / "results.json").read_text())
    final = results["metrics"]["final"]
    for name, metrics in final["sets"].items():
        file = path / "predictions" / f"{name}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        hard = np.random.default_rng(len(name))
        noise = np.random.default_rng([ord(c) for c in path.name])
        for i, row in enumerate(rows):
            t = int(hard.integers(5, 30)) if tokens is None else tokens
            nats = t * (level + 0.1 * hard.standard_normal() + 0.01 * noise.standard_normal())
            row |= {"nats": nats, "target_tokens": t} if i >= left_out else {"nats": None, "target_tokens": 0}
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        taken = [row for row in rows if row["target_tokens"]]
        metrics["loss"] = sum(row["nats"] for row in taken) / sum(row["target_tokens"] for row in taken)
        metrics["perplexity"] = float(np.exp(metrics["loss"]))
        metrics |= {"loss_left_out": left_out} if left_out else {}
        results["metrics"]["before"]["sets"][name]["loss"] = 2.0
    final["loss"] = float(np.mean([metrics["loss"] for metrics in final["sets"].values()]))
    (path / "results.json").write_text(json.dumps(results))


def fill(fake, methods=tuple(BEST), seeds=3, sets=("gsm8k",), **options):
    for i, method in enumerate(methods):
        for seed in range(seeds):
            path = fake.run({"method": method, "seed": seed}, 0.3 + 0.2 * i, sets, 120)
            with_loss(path, BEST[method], **options)
    return fake.close()


def table(folder, name):
    return list(csv.DictReader(io.StringIO((folder / "report" / f"{name}.csv").read_text())))


def write(folder, **options):
    return report(read([folder]), **options).read_text()


def scores(folder, baseline=None):
    results = losses(collect(read_sweep(folder).records))
    found = items(results, pivot(results))
    compare(found, pivot(results), baseline, lower=True)
    return {(item.arm.label, item.at["set"]): item.score for item in found}


def test_the_lowest_loss_is_the_best(fake):
    found = scores(fill(fake))
    best, middle, worst = (found[method, "gsm8k"] for method in BEST)
    assert best.reference
    assert best.bold
    assert not middle.bold
    assert not worst.bold
    assert 0 < middle.difference < worst.difference
    assert middle.p < 0.05
    assert best.low < best.mean < best.high


def test_it_is_tested_over_seeds_and_examples_like_accuracy(fake):
    folder = fill(fake, ("hira", "lora"))
    found = scores(folder)

    def values(method):
        arrays = []
        for seed in range(3):
            lines = (folder / f"method{method}_seed{seed}" / "predictions" / "gsm8k.jsonl").read_text().splitlines()
            rows = sorted(map(json.loads, lines), key=lambda row: row["id"])
            nats, tokens = (np.array([row[key] for row in rows]) for key in ("nats", "target_tokens"))
            loss = nats.sum() / tokens.sum()
            arrays.append(loss + (nats - loss * tokens) / tokens.mean())
        return np.array(arrays)

    d = values("lora") - values("hira")
    over_seeds, over_examples = stats.ttest_1samp(d.mean(1), 0), stats.ttest_1samp(d.mean(0), 0)
    t2 = 1 / (1 / over_seeds.statistic**2 + 1 / over_examples.statistic**2)
    variances = [(d.mean(1).var(ddof=1) / 3, 2), (d.mean(0).var(ddof=1) / 120, 119)]
    df = sum(v for v, _ in variances) ** 2 / sum(v**2 / n for v, n in variances)
    score = found["lora", "gsm8k"]
    assert score.difference == pytest.approx(d.mean())
    assert score.p == pytest.approx(2 * stats.t.sf(np.sqrt(t2), df), rel=1e-6)


def test_against_a_baseline_bold_is_what_has_less(fake):
    found = scores(fill(fake), {"method": "lora"})
    assert found["hira", "gsm8k"].bold
    assert found["hira", "gsm8k"].difference < 0
    assert not found["hyperadapt", "gsm8k"].bold
    assert found["hyperadapt", "gsm8k"].p < 0.05


def test_the_page_and_its_tables(fake):
    folder = fill(fake, sets=("gsm8k", "svamp"))
    page = write(folder)
    rows = {row["method"]: row for row in table(folder, "loss") if row["row"] == "arm"}
    for method in BEST:
        runs = [json.loads((folder / f"method{method}_seed{s}" / "results.json").read_text()) for s in range(3)]
        for column, of in (("gsm8k", lambda final: final["sets"]["gsm8k"]["loss"]), ("average", lambda f: f["loss"])):
            values = [of(run["metrics"]["final"]) for run in runs]
            assert float(rows[method][column]) == pytest.approx(np.mean(values))
            assert float(rows[method][f"{column} sd"]) == pytest.approx(np.std(values, ddof=1))
            assert float(rows[method][f"{column} low"]) < np.mean(values) < float(rows[method][f"{column} high"])
    (untuned,) = (row for row in table(folder, "loss") if row["row"] == "reference")
    assert (untuned["method"], float(untuned["gsm8k"]), float(untuned["average"])) == ("untuned tiny_llama", 2.0, 2.0)
    differences = {(row["arm"], row["set"]): float(row["difference"]) for row in table(folder, "loss_tests")}
    assert differences["hyperadapt", "average"] > differences["lora", "average"] > 0
    measures = table(folder, "measures")[0]
    assert "gsm8k: perplexity" in measures
    assert "gsm8k: loss" not in measures  # it has a table of its own
    lowest = f"{float(rows['hira']['average']):.4f}"
    assert f"Lowest test loss on average: hira, {lowest} nats per token" in page
    assert "Best on average: hyperadapt" in page  # of accuracy, more
    assert "Loss in nats per token of the gold answers, less is better" in page
    assert f"**{lowest} ±" in (folder / "report" / "loss.md").read_text()


def test_one_seed_claims_nothing(fake):
    assert all(
        (score.low, score.p, score.bold) == (None, None, False) for score in scores(fill(fake, seeds=1)).values()
    )


def test_answers_that_do_not_fit_are_not_counted_as_examples(fake):
    folder = fill(fake, ("hira", "lora"), left_out=20)
    found = scores(folder)
    assert found["hira", "gsm8k"].n == 100
    assert found["hira", "gsm8k"].examples[0].shape == (3, 100)
    write(folder)
    assert float(table(folder, "measures")[0]["gsm8k: loss left out"]) == 20


def test_runs_from_before_it_are_reported_as_they_were(fake):
    for seed in range(2):
        fake.run({"method": "hira", "seed": seed}, 0.5)
        fake.run({"method": "lora", "seed": seed}, 0.6)
    folder = fake.close()
    page = write(folder)
    assert losses(collect(read_sweep(folder).records)) is None
    assert not list((folder / "report").glob("loss*"))
    assert "loss" not in page.partition("<main>")[2]


def test_runs_with_and_without_it_stand_in_one_report(fake):
    for seed in range(2):
        fake.run({"method": "hyperadapt", "seed": seed}, 0.5, ("gsm8k",), 120)
    folder = fill(fake, ("hira", "lora"))
    page = write(folder, baseline={"method": "hyperadapt"})
    assert [row["method"] for row in table(folder, "loss") if row["row"] == "arm"] == ["hira", "lora"]
    assert "2 of 8 runs lack the test loss of a set" in page


def test_losses_per_other_tokens_are_not_compared(fake):
    for method, tokens in (("hira", 10), ("lora", 12)):
        for seed in range(3):
            with_loss(fake.run({"method": method, "seed": seed}, 0.5, ("gsm8k",), 120), BEST[method], tokens)
    folder = fake.close()
    found = scores(folder)
    assert [score.p for score in found.values()] == [None, None]
    assert not any(score.bold or score.as_good for score in found.values())
    assert "Gold answers of other tokens" in write(folder)


def test_predictions_of_another_run_end_the_claim_not_the_table(fake):
    folder = fill(fake, ("hira", "lora"))
    file = folder / "methodlora_seed0" / "predictions" / "gsm8k.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "nats": row["nats"] + 1}) + "\n" for row in rows))
    assert scores(folder)["lora", "gsm8k"].p is None
    assert "predictions/gsm8k.jsonl is not what results.json counts" in write(folder)


def test_the_dashboard_has_it_per_set(fake):
    folder = fill(fake, ("hira",), 1)
    results = json.loads((folder / "methodhira_seed0" / "results.json").read_text())
    tags = scalars(results)
    assert tags["final/gsm8k/loss"] == results["metrics"]["final"]["sets"]["gsm8k"]["loss"]
    assert tags["final/loss"] == results["metrics"]["final"]["loss"]
