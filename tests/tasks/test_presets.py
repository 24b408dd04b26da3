"""Every preset of the papers' experiments composes, says its own command, and dry-runs without weights and data."""

import itertools
import json
from pathlib import Path

import highrank.configs
import pytest
import yaml

from highrank.config import compose_run
from highrank.errors import UserError
from highrank.lab.grid import expand
from highrank.plan import make_plan

ROOT = Path(highrank.configs.__path__[0]) / "experiment"
PRESETS = sorted(str(file.relative_to(ROOT).with_suffix("")) for file in ROOT.rglob("*.yaml"))


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
    plan = make_plan(compose_run([f"experiment={name}", "dry_run=true"]))
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


def plan_of(words, monkeypatch):
    monkeypatch.delenv("HIGHRANK_DATA", raising=False)
    return make_plan(compose_run([*words.split(), "dry_run=true"]))


STEPS = [("hyperadapt/math10k", 117), ("peft/metamath", 5_000)]  # as the papers' batch sizes and epochs imply
GLUE_STEPS = {"sst2": 5_270, "mrpc": 580, "cola": 1_340, "qnli": 8_190, "rte": 400, "stsb": 450}


@pytest.mark.parametrize(("name", "steps"), STEPS)
def test_steps(name, steps, monkeypatch):
    assert plan_of(f"experiment={name}", monkeypatch).steps == steps


def test_steps_of_glue(monkeypatch):
    monkeypatch.delenv("HIGHRANK_DATA", raising=False)
    cells = expand(["experiment=hyperadapt/glue", "seed=0", "dry_run=true"]).cells
    assert {cell.axes["task.member"]: make_plan(cell.run).steps for cell in cells} == GLUE_STEPS


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
            assert make_plan(compose_run(words)).params.trainable == counts[case["method"]]


def test_a_preset_can_be_overridden(monkeypatch):
    run = compose_run(["experiment=hira/commonsense170k", "r=16", "lr=2e-4", "model=llama2_7b", "protocol=clean"])
    assert (run.method_cfg.r, run.core.lr, run.model["name"], run.protocol.name) == (16, 2e-4, "llama2_7b", "clean")
    printed = plan_of("experiment=hyperadapt/math10k_boft_printed", monkeypatch).params.trainable
    stated = plan_of("experiment=hyperadapt/math10k_boft_printed butterfly_factor=4", monkeypatch).params.trainable
    assert (printed, stated) == (6_356_992, 21_299_200)


def test_a_dry_run_counts_the_data_where_there_is_some(run_cli, folder, tmp_path):
    words = ["task=gsm8k", f"task.data={folder}", "task.allow_partial=true", "model=tiny_llama", "method=lora", "r=1"]
    status, _, err = run_cli(*words, "placement=q", "dry_run=true", f"run_dir={tmp_path / 'run'}")
    assert status == 0, err
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["num_train"] == 3
