"""What the experiments' page says came out: it is read from the numbers, and judged by rule."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def findings(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module("findings")
    sys.modules.pop("findings")


def test_the_page_is_what_the_numbers_say(findings):
    page = (FOLDER / "README.md").read_text()
    assert page.split(findings.START)[1].split(findings.END)[0] == findings.tables()


def test_every_folder_of_a_paper_is_on_the_page():
    page = (FOLDER / "README.md").read_text()
    folders = [
        file.parent.relative_to(FOLDER)
        for paper in ("hira", "hyperadapt")
        for file in FOLDER.glob(f"{paper}/*/README.md")
    ]
    assert len(folders) == 20
    assert [str(folder) for folder in folders if f"({folder}/README.md)" not in page] == []


def test_a_difference_counts_where_intervals_lie_apart(findings):
    low, middle, high = (findings.Arm(name, x, x - 2, x + 2) for name, x in (("a", 1), ("b", 4), ("c", 9)))
    assert findings.above(high, low) == findings.YES
    assert findings.above(low, high) == findings.NO
    assert findings.above(middle, low) == findings.above(low, middle) == findings.UNKNOWN
    assert findings.above(low, high, less_is_better=True) == findings.YES
    assert findings.within(20, low, high) == findings.YES
    assert findings.within(3, low, high) == findings.NO
    assert findings.within(8, low, high) == findings.UNKNOWN


@pytest.mark.parametrize(
    ("verdicts", "over_all"),
    [
        (["yes", "yes"], "yes"),
        (["yes", "cannot tell"], "in part"),
        (["yes", "no"], "in part"),
        (["no", "cannot tell"], "no"),
        (["no", "no"], "no"),
        (["cannot tell", "cannot tell"], "cannot tell"),
        (["cannot tell"], "cannot tell"),
    ],
)
def test_a_claim_of_several_differences(findings, verdicts, over_all):
    assert findings.together(verdicts) == over_all


def test_an_arm_is_one_row(findings, tmp_path):
    (tmp_path / "results").mkdir()
    file = tmp_path / "results" / "scores.csv"
    file.write_text("row,r,stsb,stsb low,stsb high\narm,1,70,69,71\narm,4,80,79,81\nreference,1,50,,\n")
    assert findings.score(tmp_path, "r=4", "stsb", {"r": "4"}) == findings.Arm("r=4", 80, 79, 81)
    found, verdict = findings.ordered("stsb", findings._r(4), findings._r(1))(tmp_path)
    assert (found, verdict) == ("r=4 80.0 [79.0, 81.0], r=1 70.0 [69.0, 71.0]", findings.YES)
    assert findings.best("stsb", findings._r(1), findings._r(4))(tmp_path)[1] == findings.NO
    assert findings.near(5, "stsb", findings._r(1), findings._r(4))(tmp_path)[1] == findings.NO
    with pytest.raises(ValueError, match="unpack"):
        findings.score(tmp_path, "all", "stsb", {})
