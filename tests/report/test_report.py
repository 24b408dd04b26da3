"""`highrank report` on made-up sweeps: what is claimed, what is refused, what is named, and how it is written."""

import csv
import io
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats

from highrank.base.errors import UserError
from highrank.cli import main
from highrank.config.words import compose_run
from highrank.report import figures, tables
from highrank.report.page import read, report
from highrank.report.published import ROWS, beside, elsewhere
from highrank.report.runs import differences, read_runs, read_sweep
from highrank.report.scores import Pivot, collect, compare, items, pivot
from highrank.report.statistics import holm, paired_test, seed_means, seed_variance

SURE = np.arange(200) < 150
"""150 of 200 examples right."""


def table(folder, name="scores"):
    return list(csv.DictReader(io.StringIO((folder / "report" / f"{name}.csv").read_text())))


def arms(folder):
    """Returns, per arm, its scores by set."""
    results = collect(read_sweep(folder).records)
    found = items(results, pivot(results))
    compare(found, pivot(results))
    return {(item.arm.label, item.at["set"]): item.score for item in found}


def write(folder, **options):
    return report(read([folder]), **options)


class Page(HTMLParser):
    """What a browser would load and show."""

    VOID = ("meta", "link", "br", "img", "path", "use", "rect")

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.ids, self.names = [], [], [], []
        self.tables, self.captions, self.rules = {}, [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.names.append(tag)
        self.loads += [values[key] for key in ("src", "href", "xlink:href", "action") if key in values]
        self.rules.append(values.get("style") or "")
        if "data-name" in values:
            self.tables[values["data-name"]] = []
        if tag == "tr":
            list(self.tables.values())[-1].append([])
        if tag in ("td", "th"):
            list(self.tables.values())[-1][-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)
        self.loads += [value for key, value in attrs if key in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            list(self.tables.values())[-1][-1][-1] += data


@pytest.fixture
def grid(fake):
    """hira and lora at two ranks, and hyperadapt, which has none; three seeds, two test sets."""
    for seed in range(3):
        for r in (4, 16):
            fake.run({"method": "hira", "r": r, "seed": seed}, 0.75 + r / 400, ("gsm8k", "svamp"), 120, 0.01)
            fake.run({"method": "lora", "r": r, "seed": seed}, 0.45, ("gsm8k", "svamp"), 120, 0.01)
        fake.run({"method": "hyperadapt", "seed": seed}, 0.3, ("gsm8k", "svamp"), 120, 0.01)
    return fake.close()


# --- what is claimed --------------------------------------------------------------


def test_the_table_holds_means_and_deviations_over_seeds(grid):
    write(grid)
    rows = {(row["method"], row["r"]): row for row in table(grid) if row["row"] == "arm"}
    assert set(rows) == {("hira", "4"), ("hira", "16"), ("lora", "4"), ("lora", "16"), ("hyperadapt", "")}
    runs = [json.loads((grid / f"methodhira_r16_seed{s}" / "results.json").read_text()) for s in range(3)]
    for column, values in (
        ("gsm8k", [run["metrics"]["final"]["sets"]["gsm8k"]["accuracy"] for run in runs]),
        ("average", [run["metrics"]["final"]["accuracy"] for run in runs]),
    ):
        row = rows["hira", "16"]
        assert float(row[column]) == pytest.approx(np.mean(values))
        assert float(row[f"{column} sd"]) == pytest.approx(np.std(values, ddof=1))
        assert float(row[f"{column} low"]) < np.mean(values) < float(row[f"{column} high"])
        assert row[f"{column} seeds"] == "3"
    assert rows["hira", "16"]["average n"] == "240"


def test_two_arms_are_tested_as_scipy_tests_them_over_seeds_and_over_examples(fake):
    """min F' of the two paired t-tests."""
    shares = {"hira": [0.9, 0.85, 0.95], "lora": [0.5, 0.55, 0.4]}
    for method, own in shares.items():
        for seed, share in enumerate(own):
            fake.run({"method": method, "seed": seed}, 0, correct={"made": np.arange(200) < 200 * share})
    found = arms(fake.close())
    worse = found["lora", "made"]
    runs = np.array([[np.arange(200) < 200 * share for share in own] for own in shares.values()], dtype=float)
    by_seed, by_example = stats.ttest_rel(*runs.mean(axis=2)), stats.ttest_rel(*runs.mean(axis=1))
    f1, f2 = by_seed.statistic**2, by_example.statistic**2
    df = (f1 + f2) ** 2 / (f1**2 / by_example.df + f2**2 / by_seed.df)
    assert worse.p == pytest.approx(stats.f.sf(f1 * f2 / (f1 + f2), 1, df))


def test_p_values_are_corrected_for_the_number_of_arms(grid):
    found = {label: score for (label, name), score in arms(grid).items() if name == "svamp"}
    seeds = [dict(zip(score.seeds, seed_means(score.examples), strict=True)) for score in found.values()]
    (best,) = (score for score in found.values() if score.reference)
    others = [score for score in found.values() if score is not best]
    raw = [paired_test(score.examples, best.examples, seed_variance(seeds)).p for score in others]
    assert [score.p for score in others] == holm(raw) != raw


def test_only_the_same_examples_are_paired(fake):
    for seed in range(2):
        fake.run({"method": "hira", "seed": seed}, 0, correct={"made": SURE})
        path = fake.run({"method": "lora", "seed": seed}, 0, correct={"made": ~SURE})
        file = path / "predictions" / "made.jsonl"
        file.write_text(file.read_text().replace("made-", "other-"))
    found = arms(fake.close())
    assert found["lora", "made"].low is not None
    assert found["lora", "made"].p is None
    assert not found["hira", "made"].bold


def test_the_best_is_bold_only_if_it_beats_every_other_arm(fake):
    for seed in range(3):
        fake.run({"method": "hira", "seed": seed}, 0, correct={"made": np.roll(SURE, seed)})
        fake.run({"method": "lora", "seed": seed}, 0, correct={"made": np.roll(np.arange(200) < 60, seed)})
    found = arms(fake.close())
    assert found["hira", "made"].bold
    assert not found["lora", "made"].bold
    assert not found["lora", "made"].as_good
    for seed in range(3):  # an equal of the best takes its bold away
        fake.run({"method": "hyperadapt", "seed": seed}, 0, correct={"made": np.roll(SURE, seed)})
    found = arms(fake.close())
    assert not any(score.bold for score in found.values())
    assert [label for (label, _), score in found.items() if score.as_good or score.reference] == ["hira", "hyperadapt"]
    page = write(fake.folder).read_text()
    assert "Not distinguishable from it: hyperadapt." in page
    assert 'class=" best"' not in page


def test_a_real_difference_needs_more_than_examples(fake):
    """800 examples of one direction, but seeds that disagree about the winner."""
    for seed, (a, b) in enumerate([(0.9, 0.3), (0.4, 0.6), (0.8, 0.5)]):
        fake.run({"method": "hira", "seed": seed}, 0, correct={"made": np.arange(800) < 800 * a})
        fake.run({"method": "lora", "seed": seed}, 0, correct={"made": np.arange(800) < 800 * b})
    assert not any(score.bold for score in arms(fake.close()).values())


def test_one_seed_claims_no_deviation_interval_or_test(fake):
    for method, right in (("hira", SURE), ("lora", ~SURE)):
        fake.run({"method": method, "seed": 0}, 0, correct={"made": right})
    page = write(fake.close()).read_text()
    assert "One seed: whether it is really better cannot be said." in page
    for row in table(fake.folder):
        assert {row.get(f"made {key}") for key in ("sd", "low", "high", "p")} == {""}
    assert "±" not in page.split("<section><h2 id=")[1]
    assert not (fake.folder / "report" / "scores.tex").read_text().count("textbf")


def test_a_named_baseline(grid):
    write(grid, baseline={"method": "lora", "r": "4"})
    bold = re.findall(
        r'>(\w+)</th><th[^>]*>(\d*).?</th><td class=" best"', (grid / "report" / "index.html").read_text()
    )
    assert bold == [("hira", "4"), ("hira", "16")]
    verdicts = {(row["arm"], row["set"]): row["verdict"] for row in table(grid, "tests")}
    assert verdicts["hyperadapt", "average"] == "real"  # really worse, and so not bold
    assert ("lora, r=4", "average") not in verdicts


def test_a_baseline_that_is_no_arm_or_several(grid):
    with pytest.raises(
        UserError, match=r"the baseline is an arm of the sweep, got --baseline method=dora; the arms are"
    ):
        write(grid, baseline={"method": "dora"})
    with pytest.raises(UserError, match=r"hyperadapt needs one baseline, got lora, r=4 and lora, r=16"):
        write(grid, baseline={"method": "lora"})


def test_predictions_that_are_missing_or_of_another_run_end_the_claim_not_the_table(fake):
    for seed in range(3):
        for method in ("hira", "lora"):
            fake.run({"method": method, "seed": seed}, 0.5)
    folder = fake.close()
    (folder / "methodhira_seed1" / "predictions" / "made.jsonl").unlink()
    other = folder / "methodlora_seed2" / "predictions" / "made.jsonl"
    other.write_text(other.read_text().replace("true", "false"))
    page = write(folder).read_text()
    assert "predictions/made.jsonl is missing or damaged: no interval or test for the arms of methodhira_seed1." in page
    assert (
        "predictions/made.jsonl is not what results.json counts: no interval or test for the arms of methodlora_seed2."
        in page
    )
    for row in table(folder):
        assert row["made"]
        assert row["made low"] == row["made p"] == ""


def test_other_rows_and_columns(grid):
    write(grid, rows=["method"], columns=["r"])
    assert [row["method"] for row in table(grid)] == ["hira", "lora", "hyperadapt"]
    assert {"r=4", "r=16", "r=4 sd"} <= set(table(grid)[0])
    write(grid, rows=["method"], columns=["set"])
    assert {"scores-4", "scores-16", "scores-none"} <= {file.stem for file in (grid / "report").glob("*.csv")}
    write(grid, rows=["set"])
    assert [row["set"] for row in table(grid)] == ["gsm8k", "svamp", "average"]
    with pytest.raises(UserError, match=r"rows and columns are swept keys or set, got R; the keys are method, r, set"):
        write(grid, rows=["R"])
    with pytest.raises(UserError, match="a key is a row or a column"):
        write(grid, rows=["r"], columns=["r"])


def test_an_arm_that_lacks_a_set_has_no_average(fake):
    for method, sets in (("hira", ("rte",)), ("hira", ("mrpc",)), ("lora", ("rte",))):
        fake.run({"method": method, "task": f"glue/{sets[0]}", "seed": 0}, 0.6, sets)
    write(fake.close())
    rows = {row["method"]: row for row in table(fake.folder)}
    assert rows["lora"]["rte"]
    assert rows["lora"]["mrpc"] == rows["lora"]["average"] == ""
    assert rows["hira"]["average"]
    fake.cells.pop(1)
    fake.run({"method": "dora", "task": "glue/mrpc", "seed": 0}, 0.6, ("mrpc",))
    results = collect(read_sweep(fake.close()).records)
    with pytest.raises(UserError, match=r"an average needs all test sets in one arm, got none with rte, mrpc"):
        items(results, Pivot(["method"], []))


# --- what is refused and what is named --------------------------------------------


def test_protocols_are_not_mixed_unless_asked(fake):
    fake.run({"method": "hira", "seed": 0}, 0.5)
    fake.run({"method": "lora", "seed": 0}, 0.5, protocol={"name": "hira", "hash": "e" * 64, "version": 1})
    folder = fake.close()
    with pytest.raises(
        UserError, match=r"one table has one protocol, got clean dddddddd .*hira eeeeeeee .*--mix protocols"
    ):
        write(folder)
    assert "Mixed protocols in one table, as asked" in write(folder, mix=["protocols"]).read_text()


@pytest.mark.parametrize("file", [{"sha256": "f" * 64}, {"rows": 49}])
def test_data_are_not_mixed_unless_asked(fake, file):
    fake.run({"method": "hira", "seed": 0}, 0.5)
    data = [{"name": "made/test", "rows": 50, "sha256": "b" * 64, **file}]
    fake.run({"method": "lora", "seed": 0}, 0.5, data=data)
    folder = fake.close()
    with pytest.raises(UserError, match=r"one table has one data, got .*--mix data"):
        write(folder)
    with pytest.raises(UserError, match="one table has one data"):
        write(folder, mix=["protocols"])
    assert "Mixed data in one table, as asked" in write(folder, mix=["data"]).read_text()


def test_test_sets_of_different_size_are_not_mixed(fake):
    fake.run({"method": "hira", "seed": 0}, 0.5, n=50)
    fake.run({"method": "lora", "seed": 0}, 0.5, n=40)
    with pytest.raises(UserError, match=r"made: n=50, data_seed=0 .*made: n=40"):
        write(fake.close())


def test_missing_failed_and_damaged_cells_are_named(fake, capsys):
    fake.run({"method": "hira", "seed": 0}, 0.5)
    fake.run({"method": "hira", "seed": 1}, 0.5, status="oom", error="OutOfMemoryError: 3 GiB")
    for seed, (name, text) in enumerate(
        [("results.json", '{"status": "done", '), ("config.yaml", "method: [a"), ("results.json", "[]")], 2
    ):
        (fake.run({"method": "hira", "seed": seed}, 0.5) / name).write_text(text)
    path = fake.run({"method": "hira", "seed": 5}, 0.5)
    results = json.loads((path / "results.json").read_text())
    results["metrics"]["final"]["sets"]["made"]["accuracy"] = float("nan")
    (path / "results.json").write_text(json.dumps(results))
    path = fake.run({"method": "hira", "seed": 6}, 0.5)
    (path / "results.json").write_text(json.dumps(results | {"config_hash": "0" * 64}))
    for seed, wrong in ((7, {"status": "finished"}), (8, {"time": {"train_s": "long"}}), (9, {"params": 3})):
        path = fake.run({"method": "hira", "seed": seed}, 0.5)
        (path / "results.json").write_text(json.dumps({**json.loads((path / "results.json").read_text()), **wrong}))
    fake.cells.append({"run": "never", "config_hash": "x", "words": [], "axes": {"method": "lora", "seed": 0}})
    assert main(["report", str(fake.close())]) == 0
    out = capsys.readouterr().out
    named = dict(re.findall(r"not in the tables: (\S+): (\w+)", out))
    assert named == {"never": "missing", "methodhira_seed1": "oom"} | {
        f"methodhira_seed{s}": "damaged" for s in range(2, 10)
    }
    page = (fake.folder / "report" / "index.html").read_text()
    assert {row[0]: row[1] for row in Page(page).tables["absent"][1:]} == named
    assert "OutOfMemoryError: 3 GiB" in page
    assert "1 of 11 runs" in page


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        "[" * 20_000,
        '{"name": "a", "axes": {}, "cells": {}, "lr_search": null}',
        '{"name": "a", "axes": {}, "cells": [{"run": "x"}]}',
        '{"name": 1, "axes": []',
    ],
)
def test_a_damaged_plan(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(UserError, match=r"sweep.json must hold name, axes and cells"):
        read_sweep(tmp_path)


def test_no_finished_run(fake, tmp_path, capsys):
    fake.run({"method": "hira", "seed": 0}, 0.5, status="failed", error="x")
    for folder in (fake.close(), tmp_path):
        assert main(["report", str(folder)]) == 2
        assert "report: a finished run is needed, got none among 1" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 2
    assert "got none among 0" in capsys.readouterr().err
    assert not (fake.folder / "report").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required"),
        (["nowhere"], "which is no folder"),
        (["{}", "--mix", "seeds"], "--mix takes protocols or data"),
        (["{}", "--baseline", "lora"], "a baseline is key=value, got lora"),
        (["{}", "--what"], "unrecognized arguments: --what"),
    ],
)
def test_bad_words(grid, capsys, words, said):
    assert main(["report", *(word.format(grid) for word in words)]) == 2
    assert said in capsys.readouterr().err


# --- run directories without a sweep ----------------------------------------------


def test_runs_from_before_a_key_are_told_apart_by_it(fake):
    for axes in ({"seed": 0}, {"seed": 1, "head_lr": None}, {"seed": 0, "head_lr": 3e-2}):
        fake.run({"method": "lora", **axes}, 0.5)
    records, _ = read_runs([fake.folder])
    assert sorted((r.axes["seed"], str(r.axes["head_lr"])) for r in records) == [(0, "0.03"), (0, "None"), (1, "None")]


def test_runs_by_themselves_are_told_apart_by_the_keys_in_which_they_differ(fake, capsys):
    for seed in range(2):
        for method, lr in (("hira", 5e-3), ("lora", 3e-4)):
            fake.run({"method": method, "placement": "qv", "lr": lr, "seed": seed}, 0.5)
    assert main(["report", str(fake.folder), "--out", str(fake.folder / "page")]) == 0
    assert capsys.readouterr().out.strip().endswith("page/index.html")
    records, skipped = read_runs([fake.folder])
    assert not skipped
    assert [dict(record.axes) for record in records[:2]] == [
        {"method": "hira", "seed": 0},
        {"method": "hira", "seed": 1},
    ]


def test_what_follows_from_a_group_is_no_axis():
    def one(method, lr, **keys):
        return {
            "method": {"name": method, "r": 8},
            "lr": lr,
            "seed": 0,
            "protocol": {"name": "clean", "eos": True},
            **keys,
        }

    assert differences([one("hira", 1e-3), one("lora", 1e-4)]) == [{"method": "hira"}, {"method": "lora"}]
    assert differences([one("hira", 1e-3), one("hira", 1e-4)]) == [{"lr": 1e-3}, {"lr": 1e-4}]
    other = one("hira", 1e-3, protocol={"name": "hira", "eos": False})
    assert differences([one("hira", 1e-3), other]) == [{"protocol": "clean"}, {"protocol": "hira"}]
    loose = one("hira", 1e-3, protocol={"name": "clean", "eos": False})
    assert differences([one("hira", 1e-3), loose]) == [{"protocol.eos": True}, {"protocol.eos": False}]


def test_one_run(fake):
    path = fake.run({"method": "hira", "seed": 3}, 0.5)
    page = report(read([path]))
    assert page == path / "report" / "index.html"
    assert "It is the only arm." in page.read_text()
    assert [row["method"] for row in table(path, "cost")] == ["hira"]


def test_a_run_named_twice_counts_once(fake):
    path = fake.run({"method": "hira", "seed": 0}, 0.5)
    assert len(collect(read_runs([path, path, fake.folder])[0]).arms[0].records) == 1


# --- what stands beside the scores ------------------------------------------------


def test_untuned_model_and_majority_class(grid):
    write(grid)
    reference = {row["method"]: row for row in table(grid) if row["row"] == "reference"}
    assert float(reference["untuned tiny_llama"]["average"]) == 25
    assert float(reference["majority class"]["gsm8k"]) == 50


def test_tasks_with_sets_of_their_own_are_columns(fake):
    for seed in range(2):
        for method in ("hira", "lora"):
            for name in ("rte", "mrpc"):
                fake.run({"method": method, "task": f"glue/{name}", "seed": seed}, 0.6, (name,))
    write(fake.close())
    rows = table(fake.folder)
    assert [row["method"] for row in rows if row["row"] == "arm"] == ["hira", "lora"]
    assert {"rte", "mrpc", "average"} <= set(rows[0])


def test_axes_are_read_as_the_config_has_them(fake):
    """A sweep's words may hold 1e-2 as a text, task.member, and a rate for each method."""
    for seed in range(2):
        for name in ("rte", "mrpc"):
            for method, lr in (("hira", "2e-2"), ("lora", "5e-3")):
                fake.run({"method": method, "task": f"glue/{name}", "lr": float(lr), "seed": seed}, 0.6, (name,))
                fake.cells[-1]["axes"] = {"task.member": name, "method": method, "lr": lr, "seed": seed}
    write(fake.close())
    rows = table(fake.folder)
    assert list(rows[0])[:3] == ["row", "method", "rte"]
    assert [row["lr"] for row in table(fake.folder, "cost")] == ["0.02", "0.005"]
    assert "All with" not in (fake.folder / "report" / "index.html").read_text()


def test_leak_free_scores(fake):
    fake.run({"method": "hira", "seed": 0}, 0.5, ("addsub",), leaked=20)
    path = fake.run({"method": "lora", "seed": 0}, 0.5, ("addsub",), leaked=20)
    write(fake.close())
    found = json.loads((path / "results.json").read_text())["metrics"]["final"]["sets"]["addsub"]
    row = next(row for row in table(fake.folder, "measures") if row["method"] == "lora")
    assert float(row["addsub: accuracy clean"]) == pytest.approx(found["accuracy_clean"])
    assert row["addsub: leaked"] == "20.0"
    for method in ("hira", "lora"):
        fake.run({"method": method, "task": "metamath", "seed": 0}, 0.5, ("gsm8k",))
        fake.cells[-1]["axes"].pop("task")
    fake.cells.pop()  # lora has no second set
    write(fake.close())
    rows = {row["method"]: row for row in table(fake.folder, "measures")}
    hira = [
        json.loads(file.read_text())["metrics"]["final"]["sets"]
        for file in sorted(fake.folder.glob("*hira*/results.json"))
    ]
    clean = [own.get("accuracy_clean", own["accuracy"]) for sets in hira for own in sets.values()]
    assert float(rows["hira"]["average, leak-free"]) == pytest.approx(np.mean(clean))
    assert rows["lora"]["average, leak-free"] == ""


def test_the_cost_table_says_whether_and_how_the_rate_was_searched(fake):
    for method in ("hira", "lora"):
        fake.run({"method": method, "seed": 0}, 0.5)
    trials = [
        {"lr": lr, "loss": loss, "run": "x", "status": "done"} for lr, loss in ((1e-3, 2.0), (3e-3, 1.5), (1e-2, None))
    ]
    fake.search = {
        "values": 3,
        "seed": 0,
        "arms": [{"axes": {"method": "hira"}, "trials": trials, "lr": 3e-3, "at_edge": True}],
    }
    page = write(fake.close()).read_text()
    rows = {row["method"]: row for row in table(fake.folder, "cost")}
    assert rows["hira"]["rate search"] == "3 tried, seed 0, best at the edge"
    assert rows["lora"]["rate search"] == "none"
    assert (rows["hira"]["trainable"], rows["hira"]["% trainable"]) == ("20000.0", "2.0")
    assert float(rows["hira"]["train s"]) == 12
    (search,) = table(fake.folder, "lr_search")
    assert (search["0.001"], search["0.003"], search["0.01"]) == ("2.0", "1.5", "done")
    assert 'id="figure-lr-search"' in page


def test_sweeps_of_several_tasks_make_one_table_with_their_searches(fake, tmp_path):
    folders = []
    for task, steps, tried in (("glue/cola", 600, 4), ("glue/rte", 100, 2)):
        sweep = type(fake)(tmp_path / task.replace("/", "-"))
        for method in ("hira", "lora"):
            sweep.run(
                {"method": method, "task": task, "max_steps": steps, "lr": tried * 1e-3, "seed": 0}, 0.5, (task[5:],)
            )
            sweep.cells[-1]["axes"] = {"method": method, "seed": 0}
        trials = [{"lr": i * 1e-3, "loss": 1 / i, "run": "x", "status": "done"} for i in range(1, tried + 1)]
        arm = {"axes": {"method": "hira"}, "trials": trials, "lr": tried * 1e-3, "at_edge": tried == 2}
        sweep.search = {"values": tried, "seed": 0, "arms": [arm]}
        folders.append(sweep.close())
    report(read(folders, tmp_path / "page"))
    rows = csv.DictReader((tmp_path / "page" / "cost.csv").read_text().splitlines())
    assert [(row["method"], row["rate search"]) for row in rows] == [
        ("hira", "2 to 4 tried, seed 0, best at the edge"),
        ("lora", "none"),
    ]
    assert not (tmp_path / "page" / "lr_search.csv").exists()


def test_an_arm_without_a_rate_is_named(fake):
    fake.run({"method": "hira", "seed": 0}, 0.5)
    fake.search = {
        "values": 2,
        "seed": 0,
        "arms": [{"axes": {"method": "lora"}, "trials": [], "lr": None, "at_edge": False}],
    }
    assert ("method=lora", "no rate") in [absent[:2] for absent in read([fake.close()]).absent]


# --- published values -------------------------------------------------------------


def test_printed_averages_are_means_of_printed_scores():
    """Within rounding; HiRA's and HyperAdapt's own slips are the exceptions."""
    slips = {("BOFT", "qwen2.5_7b"): 0.1}
    for row in ROWS:
        if row.average is not None and row.scores:
            near = slips.get((row.label, row.model), 0.052)
            assert np.mean(list(row.scores.values())) == pytest.approx(row.average, abs=near), row


def test_printed_rows_are_complete():
    count = {}
    for row in ROWS:
        count[row.source] = count.get(row.source, 0) + 1
    assert {source.partition(", ")[2]: n for source, n in count.items()} == {
        **{"Table 1": 14, "Table 2": 14, "Table 3": 14, "Table 4": 1, "Table 5": 7, "Table 6": 8, "Table 12": 2},
        **{"Table 13": 3, "Table 14": 1, "Figure 6": 1, "Figure 9": 16},
        **{"arithmetic table": 17, "commonsense table": 15, "GLUE table": 18, "MetaMathQA benchmark": 25},
    }
    transfer = {m: [r for r in ROWS if "Figure 9" in r.source and r.method == m] for m in ("lora", "hira")}
    own = {m: np.mean([r.scores[r.label] for r in rows]) for m, rows in transfer.items()}
    assert own == pytest.approx({"lora": 81.28, "hira": 83.39}, abs=0.01)


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.source.startswith("PEFT")], ids=lambda row: f"{row.method}-{row.scores}"
)
def test_a_row_of_pefts_board_is_a_run_that_can_be(row):
    words = [f"{key}={value}" for key, value in row.variant.items()]
    run = compose_run([f"method={row.method}", f"model={row.model}", f"task={row.task}", *words])
    assert row.matches(run.resolved)


@pytest.mark.parametrize(
    ("words", "average"),
    [
        (["method=hira", "r=32", "task=commonsense170k", "protocol=hira"], [86.72]),
        (["method=hira", "r=32", "task=commonsense170k", "placement=qv"], [85.31]),
        (["method=hira", "r=32", "task=commonsense170k", "R=w0_trunc", "R_rank=128"], [86.15]),
        (["method=hira", "r=8", "task=commonsense170k"], []),
        (["method=hilora", "r1=20", "r2=12", "task=commonsense170k"], [87.48]),
        (["method=lora", "r=32", "placement=all", "task=commonsense170k"], [84.3]),
        (["method=hyperadapt", "placement=all", "task=math10k"], [75.5]),
        (["method=hira", "r=32", "task=wordmath"], []),
    ],
)
def test_printed_rows_find_their_runs(words, average):
    config = compose_run(["model=llama3_8b", *words]).resolved
    assert [row.average for row in beside(config) if row.average is not None] == average
    config["model"]["name"] = "smollm2_135m"
    assert beside(config) == []
    assert bool(elsewhere(config, ["r"])) == ("r=8" not in words)
    assert elsewhere(config)


def test_printed_values_stand_beside_ours(fake):
    sets = ("boolq", "piqa", "siqa", "arc_c", "arc_e", "obqa", "hellaswag", "winogrande")
    for r in (16, 32):
        fake.run({"method": "hira", "r": r, "task": "commonsense170k", "model": "llama3_8b", "seed": 0}, 0.5, sets)
    page = write(fake.close()).read_text()
    rows = {row["r"]: row for row in table(fake.folder)}
    printed = rows["HiRA (ICLR 2025), Table 1: HiRA (r = 32), llama3_8b"]
    assert (float(printed["boolq"]), float(printed["average"])) == (75.4, 86.72)
    assert ">published<" in page  # in the curve over r


# --- figures ----------------------------------------------------------------------


def drawn(page):
    return set(re.findall(r'id="figure-([\w-]+)"', page.read_text()))


def test_the_axes_decide_which_figures_there_are(grid):
    assert drawn(write(grid)) == {"pareto", "curve-r", "bars-method"}


@pytest.mark.parametrize(
    ("key", "values", "figure"),
    [
        ("placement", ["fc", "qv", ["q", "down"]], "bars-placement"),
        ("R", ["w0", "w0_smooth", "random_uniform"], "bars-R"),
        ("lr", [1e-4, 1e-3, 1e-2], "curve-lr"),
        ("R_rank", [32, 128, 512], "curve-R_rank"),
    ],
)
def test_ablation_figures(fake, key, values, figure):
    for value in values:
        for seed in range(2):
            fake.run({key: value, "seed": seed}, 0.5)
    assert figure in drawn(write(fake.close()))


def test_a_split_has_its_own_figure(fake):
    for r1, r2 in ((2, 30), (16, 16), (30, 2)):
        fake.run({"method": "hilora", "r1": r1, "r2": r2, "seed": 0}, 0.5)
    page = write(fake.close())
    assert drawn(page) == {"split"}
    assert ">16+16<" in page.read_text()


def test_transfer_matrices(fake):
    sets = ("boolq", "piqa")
    for method in ("hira", "lora"):
        for i, name in enumerate(sets):
            correct = {own: np.arange(100) < (90 if own == name else 30 + 10 * i) for own in sets}
            fake.run({"method": method, "task": f"commonsense170k/{name}", "seed": 0}, 0, correct=correct)
    page = write(fake.close())
    assert drawn(page) == {"transfer"}
    assert "hira: own set 90.0, other sets 35.0" in page.read_text()


def test_analysed_runs_bring_rank_maps_and_spectra(fake):
    from safetensors.numpy import save_file

    for method in ("hira", "lora"):
        path = fake.run({"method": method, "seed": 0}, 0.5)
        views = [{"name": f"{layer}.q", "part": "q", "layer": layer, "normalized_rank": 0.5} for layer in range(3)]
        (path / "analysis").mkdir()
        (path / "analysis" / "statistics.json").write_text(json.dumps({"views": views}))
        arrays = {f"delta/{view['name']}": np.geomspace(1, 1e-9, 20) for view in views}
        save_file(arrays, path / "analysis" / "singular_values.safetensors")
    assert {"rank-maps", "spectra"} <= drawn(write(fake.close()))
    for file in fake.folder.glob("*/analysis/singular_values.safetensors"):
        file.write_bytes(b"damaged")
    assert "spectra" not in drawn(write(fake.folder))
    for text in (
        '{"views": [{}]}',
        '{"views": [{"name": "0.q", "part": "q", "layer": "0", "normalized_rank": 1}]}',
        "3",
    ):
        for file in fake.folder.glob("*/analysis/statistics.json"):
            file.write_text(text)
        assert "rank-maps" not in drawn(write(fake.folder))


# --- how it is written ------------------------------------------------------------


def test_the_page_stands_alone_and_is_whole(grid):
    text = write(grid).read_text()
    page = Page(text)
    assert all(load.startswith(("#", "data:")) for load in page.loads)
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org)", text)
    assert page.names.count("h1") == 1
    assert '<meta name="viewport" content="width=device-width' in text
    assert page.names.count("svg") == len(drawn(grid / "report" / "index.html"))
    assert page.names.count("figcaption") == page.names.count("figure") == 3
    assert set(page.tables) == {"scores", "cost", "tests", "measures", "published"}
    for rows in page.tables.values():
        assert len({len(row) for row in rows}) == 1
    targets = {load[1:] for load in page.loads if load.startswith("#") and load[1:]}
    assert targets <= set(re.findall(r'id="([^"]+)"', text))


def test_every_figure_is_a_file_that_can_be_shown_anywhere(grid):
    page = write(grid)
    files = {file.stem: file.read_text() for file in page.parent.glob("*.svg")}
    assert set(files) == drawn(page) == {"pareto", "curve-r", "bars-method"}
    for text in files.values():
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root[0].attrib == {"width": "100%", "height": "100%", "fill": "white"}
        assert "currentColor" not in text
        assert ">score, %<" in text


def test_arms_that_share_a_colour_have_other_markers():
    assert len({(figures._style(i)["color"], figures._marker(i)) for i in range(64)}) == 64
    assert [figures._marker(i) for i in range(8)] == list(figures.MARKERS)


def test_many_arms_have_their_names_beside_their_points(fake):
    names = [f"method{i}" for i in range(12)]
    for i, name in enumerate(names):
        for seed in range(2):
            fake.run({"method": name, "r": i + 1, "seed": seed}, 0.3 + 0.05 * i)
    page = write(fake.close())
    svg = (page.parent / "pareto.svg").read_text()
    assert all(f">{name}" in svg for name in names)
    assert svg.count("legend") == 0


def test_the_page_shows_what_csv_holds(grid):
    shown = Page(write(grid).read_text()).tables["scores"]
    for row, cells in zip(table(grid), shown[1:], strict=True):
        for column, cell in zip(shown[0], cells, strict=True):
            if column in ("gsm8k", "svamp", "average"):
                assert cell.startswith(f"{float(row[column]):.1f}")
                assert not row[f"{column} sd"] or f"± {float(row[f'{column} sd']):.1f}" in cell
                assert not row[f"{column} low"] or f"[{float(row[f'{column} low']):.1f}, " in cell


def test_the_same_runs_give_the_same_report(grid):
    write(grid)
    first = {file.name: file.read_bytes() for file in (grid / "report").iterdir()}
    write(grid)
    assert {file.name: file.read_bytes() for file in (grid / "report").iterdir()} == first


def test_names_from_outside_are_text_not_markup(fake):
    path = fake.run({"method": "hira", "seed": 0}, 0.5)
    results = json.loads((path / "results.json").read_text())
    results["versions"]["device"] = "<script>alert(1)</script>"
    (path / "results.json").write_text(json.dumps(results))
    page = write(fake.close(name="<b>sweep</b>")).read_text()
    assert "<script>alert" not in page
    assert "&lt;b&gt;sweep&lt;/b&gt;" in page


@pytest.fixture
def small():
    cells = [
        tables.TableCell("a_b", "a_b"),
        tables.TableCell(81.25, "81.2", "± 1.0", "[79.0, 83.0]", bold=True, more={"sd": 1.0}),
    ]
    other = [tables.TableCell("x|y", "x|y"), tables.TableCell(None)]
    return tables.Table("t", "Title & more", "Caption: 95 %", ["arm", "set_1"], [cells, other])


def test_latex(small):
    text = tables.to_latex(small)
    assert r"a\_b & \textbf{81.2 $\pm$ 1.0} {\scriptsize [79.0, 83.0]} \\" in text
    assert r"\caption{Title \& more. Caption: 95 \%}" in text
    assert r"\begin{tabular}{lr}" in text
    assert [line for line in text.splitlines() if "rule" in line] == [r"\toprule", r"\midrule", r"\bottomrule"]


def test_markdown(small):
    lines = tables.to_markdown(small).splitlines()
    assert lines[2:6] == ["| arm | set_1 |", "| --- | ---: |", "| a_b | **81.2 ± 1.0** [79.0, 83.0] |", "| x\\|y | – |"]


def test_csv_is_not_rounded(small):
    rows = list(csv.reader(io.StringIO(tables.to_csv(small))))
    assert rows == [["row", "arm", "set_1", "set_1 sd"], ["arm", "a_b", "81.25", "1.0"], ["arm", "x|y", "", ""]]
