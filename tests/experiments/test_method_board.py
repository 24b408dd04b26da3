"""The board: which methods are on it, what it reads from runs, and that its page is what its files say."""

import csv
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from highrank.base import registry
from highrank.base.errors import UserError
from highrank.cli import main as cli

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "board"


@pytest.fixture
def board(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module("board")
    sys.modules.pop("board")


@pytest.mark.parametrize(
    ("half", "absent"),
    [("wordmath", {"bitfit", "sum"}), ("stsb", {"sum", "prefix", "prompt_tuning", "p_tuning"})],
)
def test_every_method_is_on_the_board_but_those_that_its_model_cannot_have(half, absent):
    preset = yaml.safe_load((ROOT / "configs" / "experiment" / "board" / f"{half}.yaml").read_text())
    assert set(preset["sweep"]["method"]) == set(registry.available("methods")) - absent


def test_the_page_is_what_its_files_say(board):
    page = (FOLDER / "README.md").read_text()
    assert page.split(board.START)[1].split(board.END)[0] == board.tables(FOLDER / "results")


def test_ranks(board):
    rising = [[1.0, 1.1], [2.0, 2.1], [3.0, 3.1], [4.0, 4.1], [5.0, 5.1]]
    assert board.rank_correlation(rising, rising)[0] == pytest.approx(1)
    value, low, high = board.rank_correlation(rising, rising[::-1])
    assert value == pytest.approx(-1)
    assert low == pytest.approx(-1)
    assert high < 0
    mixed = [[3.0, 3.1], [1.0, 1.1], [5.0, 5.1], [2.0, 2.1], [4.0, 4.1]]
    value, low, high = board.rank_correlation(rising, mixed)
    assert value == pytest.approx(0.3)
    assert low < 0 < high


@pytest.mark.integration
def test_what_runs_say(board, tmp_path, capsys):
    words = ["model=tiny_llama", "task.n_train=16", "task.n_test=4", "max_steps=2", "batch_size=4", "placement=qv"]
    words += ["protocol.max_new_tokens=8", f"general_text={FOLDER / 'general_text.txt'}", f"output={tmp_path}"]
    sweep = tmp_path / "wordmath"
    status = cli(
        ["run", "-m", "method=hira,lora,ia3,vera", "seed=0,1", "lr_search=[1e-3,1e-2]", f"sweep_dir={sweep}", *words]
    )
    assert status == 0
    capsys.readouterr()
    assert board.main([str(tmp_path), "--only=wordmath", "--read", f"--results={tmp_path / 'results'}"]) == 0

    with (tmp_path / "results" / "runs.csv").open() as lines:
        runs = list(csv.DictReader(lines))
    assert [(run["peft_type"], run["seed"]) for run in runs] == [
        (method, seed) for method in ("hira", "lora", "ia3", "vera") for seed in "01"
    ]
    for run in runs:
        folder = sweep / run["experiment_name"]
        results = json.loads((folder / "results.json").read_text())
        assert run["config_hash"] == results["config_hash"]
        assert float(run["test_loss"]) == results["metrics"]["final"]["loss"]
        assert float(run["forgetting"]) == results["forgetting"]["forgetting"]
        assert int(run["file_size"]) == (folder / "adapter" / "adapter.safetensors").stat().st_size
        assert int(run["num_trainable_params"]) == results["params"]["trainable"]
        assert int(run["train_samples"]) == 8
        assert float(run["score"]) == 100 * float(run["test_accuracy"]) == results["metrics"]["final"]["accuracy"]

    with (tmp_path / "results" / "wordmath.csv").open() as lines:
        arms = list(csv.DictReader(lines))
    means = {arm["method"]: float(arm["score"]) for arm in arms}
    assert list(means.values()) == sorted(means.values())  # the lowest loss first
    for method, mean in means.items():
        losses = [float(run["test_loss"]) for run in runs if run["peft_type"] == method]
        assert mean == pytest.approx(sum(losses) / 2)
    page = (tmp_path / "README.md").read_text()
    assert page.count("\n| `") == 4
    assert "word problems and PEFT's board" in page
    assert "| *51.3* |" in page  # HiRA's and the best LoRA's
    svg = (tmp_path / "results" / "wordmath.svg").read_text()
    assert all(f">{method}<" in svg for method in means)

    # what did not finish is named, and the other half's rows stay
    plan = json.loads((sweep / "sweep.json").read_text())
    lost = next(cell["run"] for cell in plan["cells"] if cell["axes"] == {"method": "vera", "seed": 1})
    (sweep / lost).rename(tmp_path / "lost")
    other = dict(runs[0], half="stsb")
    with (tmp_path / "results" / "runs.csv").open("w") as lines:
        writer = csv.DictWriter(lines, list(other))
        writer.writeheader()
        writer.writerow(other)
    assert board.main([str(tmp_path), "--read", f"--results={tmp_path / 'results'}"]) == 0
    page = (tmp_path / "README.md").read_text()
    assert f"Not here: {lost} (missing)." in page
    assert page.count("(one seed)") == 1
    with (tmp_path / "results" / "runs.csv").open() as lines:
        assert [run["half"] for run in csv.DictReader(lines)] == ["stsb", *["wordmath"] * 7]
    assert "word problems and STS-B: 1 methods in both" in page

    # one seed: no interval, said
    shutil.rmtree(tmp_path / "results")
    single = tmp_path / "one" / "wordmath"
    assert cli(["run", "-m", "method=hira,lora", f"sweep_dir={single}", *words]) == 0
    assert board.main([str(tmp_path / "one"), "--only=wordmath", "--read", f"--results={tmp_path / 'results'}"]) == 0
    page = (tmp_path / "README.md").read_text()
    assert "One seed: no interval, no comparison." in page
    assert "2 methods in both, too few to rank" in page

    # another protocol in the same folder is refused
    plan = json.loads((single / "sweep.json").read_text())
    file = single / plan["cells"][0]["run"] / "results.json"
    results = json.loads(file.read_text())
    file.write_text(json.dumps(results | {"protocol": {**results["protocol"], "hash": "0" * 64}}))
    capsys.readouterr()
    assert board.main([str(tmp_path / "one"), "--only=wordmath", "--read", f"--results={tmp_path / 'results'}"]) == 2
    assert "error: report: one table has one protocol" in capsys.readouterr().err


def test_pefts_board_has_the_best_row_of_a_method_and_those_at_zero(board):
    rows = board.pefts_board()
    assert rows["lora"] == rows["hira"] == 51.3
    assert rows["miss"] == 50.4
    assert rows["layernorm"] == 0.0


def test_the_board_keeps_who_joined_and_says_what_could_not_begin(board, tmp_path, monkeypatch):
    given = []

    class Sweep:
        def __init__(self, command, cwd):
            given.append(command)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def wait(self):
            return statuses.pop()

    monkeypatch.setattr(board.subprocess, "Popen", Sweep)
    statuses = [1]
    (tmp_path / "sweep.json").write_text(json.dumps({"axes": {"method": ["hira", "mine"]}}))
    board.execute("stsb", tmp_path, ["other"], 2)
    (methods,) = (word for word in given[0] if word.startswith("method="))
    assert methods.endswith(",vera,mine,other")
    assert {"jobs=2", "lr_search=3", "lr_search_most=7", f"sweep_dir={tmp_path}"} <= set(given[0])
    for status, said in ((2, "must be able to begin"), (130, "goes on from there")):
        statuses = [status]
        with pytest.raises(UserError, match=said):
            board.execute("stsb", tmp_path, [], 1)


def test_a_board_needs_runs(board, tmp_path, capsys):
    assert board.main([f"--results={tmp_path}"]) == 2
    assert "error: board: results are needed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        board.main(["--read"])
    assert "are about a FOLDER" in capsys.readouterr().err
    assert board.main([str(tmp_path), "--only=stsb", "--read", f"--results={tmp_path / 'results'}"]) == 2
    assert "error: report: give sweeps or run directories" in capsys.readouterr().err
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "runs.csv").write_text("half\n")
    (tmp_path / "README.md").write_text("mine\n")
    with pytest.raises(UserError, match="the tables stand between"):
        board.write(tmp_path / "results", tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == "mine\n"
