"""Every preset of the papers' experiments composes, says its own command, and dry-runs without weights and data."""

import itertools
import json
import re
import shlex
from pathlib import Path

import highrank.configs
import pytest
import yaml

from highrank.base.errors import UserError
from highrank.config.words import compose_run
from highrank.report import published
from highrank.sweep.grid import expand
from highrank.train.plan import make_plan

ROOT = Path(highrank.configs.__path__[0]) / "experiment"
PRESETS = sorted(str(file.relative_to(ROOT).with_suffix("")) for file in ROOT.rglob("*.yaml"))


def plan_of(run):
    return make_plan(run, run.make_task())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_opens_with_its_command(name):
    lines = (ROOT / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1] == f"# python run.py experiment={name}"
    assert lines[2].startswith("# ")


def test_the_page_on_tasks_names_every_preset_and_protocol():
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()
    names = [name.removesuffix("_small") for name in PRESETS]
    assert [name for name in names if name.partition("/")[2].removeprefix("math10k_boft") not in page] == []
    protocols = [file.stem for file in (ROOT.parent / "protocol").glob("*.yaml")]
    assert [name for name in protocols if f"| `{name}` |" not in page] == []


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_dry_runs(name, monkeypatch):
    monkeypatch.delenv("HIGHRANK_DATA", raising=False)
    plan = plan_of(compose_run([f"experiment={name}", "dry_run=true"]))
    assert plan.params.trainable > 0
    assert plan.steps > 0


def section(name):
    return yaml.safe_load((ROOT / f"{name}.yaml").read_text()).get("sweep") or {}


def rows_of(name):
    """The cells of a preset's grid as {key: value}."""
    axes = [values if key == "cases" else [{key: value} for value in values] for key, values in section(name).items()]
    return [{key: value for choice in row for key, value in choice.items()} for row in itertools.product(*axes)]


def has(run, key, value):
    config, (owner, _, field) = run.resolved, key.rpartition(".")
    if key in ("method", "model"):
        return config[key]["name"] == value
    found = config[owner][field] if owner else config.get(key, config["method"].get(key))
    return found == value or (found is not None and str(value)[0].isdigit() and float(value) == float(found))


GRIDS = [name for name in PRESETS if section(name)]


@pytest.mark.parametrize("name", GRIDS)
def test_a_presets_grid_holds_the_preset_itself(name):
    alone = compose_run([f"experiment={name}"])
    assert any(all(has(alone, key, value) for key, value in row.items()) for row in rows_of(name))


@pytest.mark.parametrize("name", GRIDS)
def test_a_presets_grid_is_of_possible_runs(name):
    """Every case and method, with the last value of each other axis."""
    axes = section(name)
    fixed = [f"{key}={values[-1]}" for key, values in axes.items() if key not in ("cases", "method")]
    if {"cases", "method"} & axes.keys():
        expected = len(axes.get("cases", [0])) * len(axes.get("method", [0]))
        assert len(expand([f"experiment={name}", *fixed]).cells) == expected
    else:
        compose_run([f"experiment={name}", *fixed])


def test_a_method_in_a_presets_place_keeps_the_fields_that_it_has():
    run = compose_run(["experiment=hira/commonsense170k", "method=lora"])
    assert (run.method.name, run.method_cfg.r) == ("lora", 32)
    run = compose_run(["experiment=hira/commonsense170k", "method=p_tuning", "num_virtual_tokens=10"])
    assert run.method_cfg.num_virtual_tokens == 10
    for words in (["method=p_tuning", "r=4"], ["method=p_tuning", "method.r=4"]):
        with pytest.raises(UserError, match="p_tuning has no field 'r'"):
            compose_run(["experiment=hira/commonsense170k", *words])


def plan_without_data(words, monkeypatch):
    monkeypatch.delenv("HIGHRANK_DATA", raising=False)
    return plan_of(compose_run([*words.split(), "dry_run=true"]))


STEPS = [("hyperadapt/math10k", 117), ("peft/metamath", 5_000)]  # as the papers' batch sizes and epochs imply
GLUE_STEPS = {"sst2": 5_270, "mrpc": 580, "cola": 1_340, "qnli": 8_190, "rte": 400, "stsb": 450}


@pytest.mark.parametrize(("name", "steps"), STEPS)
def test_steps(name, steps, monkeypatch):
    assert plan_without_data(f"experiment={name}", monkeypatch).steps == steps


def test_steps_of_glue(monkeypatch):
    monkeypatch.delenv("HIGHRANK_DATA", raising=False)
    cells = expand(["experiment=hyperadapt/glue", "seed=0", "dry_run=true"]).cells
    assert {cell.axes["task.member"]: plan_of(cell.run).steps for cell in cells} == GLUE_STEPS


PRINTED = [  # what the tables' parameter shares count, on Llama-3-8B
    ("hira/commonsense170k", {"hira": 28_311_552, "lora": 56_623_104, "dora": 57_409_536, "mora": 56_583_168}),
    ("hira/commonsense170k", {"prompt_tuning": 81_920, "p_tuning": 50_425_856}),
    ("hyperadapt/math10k", {"hyperadapt": 2_621_440, "vera": 1_605_632, "boft": 6_356_992, "dora": 85_262_336}),
]


@pytest.mark.parametrize(("name", "counts"), PRINTED)
def test_counts_of_a_tables_rows(name, counts, monkeypatch):
    monkeypatch.delenv("HIGHRANK_DATA", raising=False)
    for case in section(name)["cases"]:
        if (
            case["model"] == "llama3_8b"
            and case["method"] in counts
            and case.get("r") != (32 if case["method"] == "hira" else 1)
        ):
            words = [f"experiment={name}", *(f"{key}={value}" for key, value in case.items()), "dry_run=true"]
            assert plan_of(compose_run(words)).params.trainable == counts[case["method"]]


def test_a_preset_can_be_overridden(monkeypatch):
    run = compose_run(["experiment=hira/commonsense170k", "r=16", "lr=2e-4", "model=llama2_7b", "protocol=clean"])
    assert (run.method_cfg.r, run.core.lr, run.model["name"], run.protocol.name) == (16, 2e-4, "llama2_7b", "clean")
    printed = plan_without_data("experiment=hyperadapt/math10k_boft_printed", monkeypatch).params.trainable
    stated = plan_without_data(
        "experiment=hyperadapt/math10k_boft_printed butterfly_factor=4", monkeypatch
    ).params.trainable
    assert (printed, stated) == (6_356_992, 21_299_200)


def test_a_dry_run_counts_the_data_where_there_is_some(run_cli, folder, tmp_path):
    words = ["task=gsm8k", f"task.data={folder}", "task.allow_partial=true", "model=tiny_llama", "method=lora", "r=1"]
    status, _, err = run_cli(*words, "placement=q", "dry_run=true", f"run_dir={tmp_path / 'run'}")
    assert status == 0, err
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["num_train"] == 3


EXPERIMENTS = Path(__file__).parents[2] / "experiments"
PAGES = sorted(page for paper in ("hira", "hyperadapt") for page in (EXPERIMENTS / paper).glob("*/README.md"))
SHOWN = {"HiRA": {"Table": {1, 2, 3, 4, 5, 6, 9, 12, 13, 14}, "Figure": {1, 2, 4, 5, 6, 7, 8, 9, 10, 11}}}
SHOWN |= {"HyperAdapt": {"Figure": {1, 3, 4, 5}}}


def commands(page):
    """The words of the commands in a page's code block that run an experiment."""
    lines = [
        shlex.split(line, comments=True) for line in page.read_text().splitlines() if line.startswith("python run")
    ]
    return [line[2:] for line in lines if any(word.startswith("experiment=") for word in line)]


def preset_of(words):
    ending = "_small" if "scale=small" in words else ""
    return next(word for word in words if word.startswith("experiment=")).removeprefix("experiment=") + ending


def title_of(page):
    return page.read_text().splitlines()[0].removeprefix("# ")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_commands_of_an_experiment_are_possible(page):
    """Each with the first value of every axis; the places for a user's own folders are left out."""
    assert commands(page)
    for command in commands(page):
        assert preset_of(command) in PRESETS
        words = [
            word for word in command if word != "-m" and not word.startswith(("lr_search=", "task.data", "task.bert"))
        ]
        if any(word.startswith("cases=") for word in words):
            expand(words)
        else:
            compose_run([word.split(",")[0] for word in words])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_an_experiment_says_what_it_asks_costs_expects_and_found(page):
    text = page.read_text()
    places = [
        text.find(part) for part in ("**Question.**", "```bash", "**Budget.**", "**Expected.**", "\n## Result at small")
    ]
    assert min(places) > 0
    assert places == sorted(places)
    assert f"({page.relative_to(EXPERIMENTS)})" in (EXPERIMENTS / "README.md").read_text()
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


OURS = {"peft/rates_small", "hyperadapt/lemma1_small", "hyperadapt/untrained_small"}
"""Presets of experiments that no paper has."""


def test_every_preset_of_the_papers_is_in_an_experiment():
    used = {preset_of(command) for page in PAGES for command in commands(page)}
    ours = {name for name in PRESETS if name.startswith(("board/", "retention/", "long_context/")) or name in OURS}
    assert used == set(PRESETS) - ours


def test_every_table_and_figure_has_an_experiment():
    found = {}
    for paper, titles in itertools.groupby(map(title_of, PAGES), key=lambda title: title.partition(",")[0]):
        kind = None
        for word in re.findall(r"Table|Figure|\d+", " ".join(title.partition(":")[0] for title in titles)):
            kind = word if not word.isdigit() else kind
            found.setdefault(paper, {}).setdefault(kind, set()).update([int(word)] if word.isdigit() else [])
    assert {paper: {kind: found[paper].get(kind) for kind in kinds} for paper, kinds in SHOWN.items()} == SHOWN
    tables = {row.source.split(", ")[1] for row in published.ROWS if row.source.startswith("HyperAdapt")}
    assert {title.partition(", ")[2] for title in map(title_of, PAGES)} >= tables


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_an_experiment_names_the_steps_of_its_small_scale(page):
    said = {int(number) for number in re.findall(r"(\d+) steps of 16", page.read_text())}
    small = [name for name in map(preset_of, commands(page)) if name.endswith("_small")]
    assert said <= {compose_run([f"experiment={name}"]).core.max_steps for name in small}
