"""What TensorBoard's own backend reads out of runs and sweeps."""

import json
import shutil
import struct
import zlib

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from highrank.report import dashboard

pytestmark = pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated")
STATUSES = [f"STATUS_{name}" for name in ("UNKNOWN", "SUCCESS", "FAILURE", "RUNNING")]


@pytest.fixture
def tensorboard():
    """Returns a function that opens TensorBoard's web application on a folder, in this process."""
    from tensorboard import program
    from tensorboard.backend.application import TensorBoardWSGIApp
    from tensorboard.backend.event_processing.data_ingester import LocalDataIngester
    from werkzeug.test import Client

    def open_folder(folder):
        board = program.TensorBoard()
        board.configure(logdir=str(folder), reload_interval=0, reload_task="blocking", load_fast="false")
        data = LocalDataIngester(board.flags)
        data.start()
        return Client(TensorBoardWSGIApp(board.flags, board.plugin_loaders, data.data_provider))

    return open_folder


@pytest.fixture
def sweep(tiny_sweep, tmp_path):
    """Returns a copy of the sweep folder to change."""
    return shutil.copytree(tiny_sweep, tmp_path / "sweep")


def get(client, route, **query):
    answer = client.get(f"/data/plugin/{route}", query_string=query)
    assert answer.status_code == 200, answer.text
    return answer.get_json()


def experiment(client):
    return client.post("/data/plugin/hparams/experiment", json={}).get_json()


def sessions(client):
    """Returns {run: its row of the HPARAMS table}."""
    request = {"startIndex": 0, "sliceSize": 100, "allowedStatuses": STATUSES}
    groups = client.post("/data/plugin/hparams/session_groups", json=request).get_json()["sessionGroups"]
    assert all([session["name"] for session in group["sessions"]] == [group["name"]] for group in groups)
    return {group["name"]: group for group in groups}


def metrics(row):
    return {each["name"]["tag"]: each["value"] for each in row["metricValues"]}


def read(folder, name="results.json"):
    return json.loads((folder / name).read_text())


def change(folder, **values):
    (folder / "results.json").write_text(json.dumps(read(folder) | values))


def events(folder):
    return {file: file.read_bytes() for file in folder.rglob("*tfevents*")}


def png(width, height):
    """Returns a black image."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes((width + 1) * height))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_the_table_has_every_method_and_every_column(tiny_sweep, tensorboard):
    client = tensorboard(tiny_sweep)
    about = experiment(client)
    columns = {column["name"]: column for column in about["hparamInfos"]}
    assert list(columns) == ["method", "r", "lr"]  # what is swept comes first
    assert columns["method"]["domainDiscrete"] == ["hira", "hyperadapt", "lora"]
    assert columns["r"]["domainDiscrete"] == [2, 4]
    assert columns["lr"]["domainInterval"] == {"minValue": 0.001, "maxValue": 0.005}
    tags = [metric["name"]["tag"] for metric in about["metricInfos"]]
    assert tags[:5] == [
        "final/accuracy",
        "final/loss",
        "cost/trainable",
        "cost/total_s",
        "final/wordmath/accuracy",
    ]
    others = {
        "final/wordmath/unparsed",
        "final/wordmath/loss",
        "cost/percent",
        "cost/train_s",
        "cost/peak_resident_gib",
    }
    assert others == set(tags[5:])

    rows, plan = sessions(client), read(tiny_sweep, "sweep.json")
    assert set(rows) == {cell["run"] for cell in plan["cells"]}
    assert len(rows) == 5  # hyperadapt has no r
    for cell in plan["cells"]:
        row, results = rows[cell["run"]], read(tiny_sweep / cell["run"])
        assert {key: row["hparams"].get(key) for key in ("method", "r")} == {"r": None, **cell["axes"]}
        assert row["sessions"][0]["status"] == "STATUS_SUCCESS"
        assert row["sessions"][0]["endTimeSecs"] - row["sessions"][0]["startTimeSecs"] == pytest.approx(
            results["time"]["total_s"], abs=0.1
        )
        found, final = metrics(row), results["metrics"]["final"]
        assert set(found) == set(tags)
        single = 1e-6  # scalars are kept in single precision
        assert found["final/accuracy"] == pytest.approx(final["accuracy"], rel=single)
        assert found["final/wordmath/loss"] == pytest.approx(final["sets"]["wordmath"]["loss"], rel=single)
        assert found["final/wordmath/unparsed"] == pytest.approx(final["sets"]["wordmath"]["unparsed"], rel=single)
        assert found["cost/trainable"] == results["params"]["trainable"]
        assert found["cost/total_s"] == pytest.approx(results["time"]["total_s"], rel=single)
        memory = results["memory"]["peak_resident_bytes"] / 2**30
        assert found["cost/peak_resident_gib"] == pytest.approx(memory, rel=single)


def test_no_metric_by_default(tiny_sweep, tensorboard):
    tags = get(tensorboard(tiny_sweep), "scalars/tags")
    runs = [cell["run"] for cell in read(tiny_sweep, "sweep.json")["cells"]]
    assert set(runs) <= set(tags)
    for run in runs:
        assert {"train/loss", "final/accuracy", "final/wordmath/accuracy"} <= set(tags[run])
        assert "hp_metric" not in tags[run]


def test_custom_scalars_show_every_run(tiny_sweep, tensorboard):
    client = tensorboard(tiny_sweep)
    layout = {
        category["title"]: {chart["title"]: chart["multiline"]["tag"] for chart in category["chart"]}
        for category in get(client, "custom_scalars/layout")["category"]
    }
    assert list(layout) == ["training", "final", "cost"]
    assert list(layout["training"]) == ["loss"]
    assert list(layout["final"]) == ["macro average", "macro average loss", "wordmath", "wordmath loss"]
    wanted = {
        "loss": {"train/loss"},
        "macro average": {"final/accuracy"},
        "macro average loss": {"final/loss"},
        "wordmath": {"final/wordmath/accuracy", "final/wordmath/unparsed"},
        "wordmath loss": {"final/wordmath/loss"},
        "trainable": {"cost/trainable"},
    }
    for cell in read(tiny_sweep, "sweep.json")["cells"]:
        for title, tags in wanted.items():
            patterns = "|".join(f"({tag})" for charts in layout.values() for tag in charts.get(title, []))
            shown = get(client, "custom_scalars/scalars", run=cell["run"], tag=patterns)["tag_to_events"]
            assert set(shown) == tags
    assert len(shown["cost/trainable"]) == 1


def test_writing_again_changes_nothing(sweep):
    before = events(sweep)
    assert sum(file.name.endswith(".session") for file in before) == 5
    assert sum(file.name.endswith(".experiment") for file in before) == 1
    dashboard.write(sweep)
    assert events(sweep) == before


def test_runs_that_did_not_end_well(sweep, tensorboard):
    oom, interrupted, running, damaged, missing = (cell["run"] for cell in read(sweep, "sweep.json")["cells"])
    change(sweep / oom, status="oom", metrics={})
    change(sweep / interrupted, status="interrupted", metrics={})
    change(sweep / running, status="running", metrics={})
    dashboard.write_run(sweep / running)
    (sweep / damaged / "results.json").write_text("{")
    shutil.rmtree(sweep / missing)
    dashboard.write(sweep)
    rows = sessions(tensorboard(sweep))
    ended = {run: row["sessions"][0]["status"] for run, row in rows.items()}
    assert ended[oom] == "STATUS_FAILURE"
    assert ended[interrupted] == ended[running] == "STATUS_UNKNOWN"
    assert rows[interrupted]["sessions"][0]["endTimeSecs"] > 0
    assert not rows[running]["sessions"][0].get("endTimeSecs")
    assert not any(tag.startswith("final/") for tag in metrics(rows[oom]))
    assert metrics(rows[oom])["cost/trainable"] > 0
    assert missing not in rows


def test_trials_of_a_search_are_no_sessions(sweep, tensorboard):
    run = read(sweep, "sweep.json")["cells"][0]["run"]
    shutil.copytree(sweep / run, sweep / "search" / run)
    assert f"search/{run}" in sessions(tensorboard(sweep))
    dashboard.write(sweep)
    assert f"search/{run}" not in (rows := sessions(tensorboard(sweep)))
    assert len(rows) == 5


def test_figures_are_images(sweep, tensorboard):
    run = read(sweep, "sweep.json")["cells"][0]["run"]
    for folder, figure in ((sweep / run, png(3, 2)), (sweep, png(4, 5))):
        (folder / "analysis").mkdir()
        (folder / "analysis" / "spectra.png").write_bytes(figure)
    dashboard.refresh(sweep / run)
    client = tensorboard(sweep)
    assert set(get(client, "images/tags")) == {".", run}
    for name, figure, size in ((run, png(3, 2), (3, 2)), (".", png(4, 5), (4, 5))):
        (found,) = get(client, "images/images", run=name, tag="analysis/spectra", sample=0)
        assert client.get(f"/data/plugin/images/individualImage?{found['query']}").data == figure
        (image,) = EventAccumulator(str(sweep / name)).Reload().Images("analysis/spectra")
        assert (image.width, image.height) == size


def test_the_type_of_a_column(sweep, tensorboard):
    plan = read(sweep, "sweep.json")
    values = {
        "official_numerics": [True, False],
        "placement": ["fc", ["q", "down"]],
        "R_rank": [None, 8],
        "task.data_seed": list(range(12)),
        "epochs": [1, 0.5],
        "lr": ["1e-3", "5e-3"],
        "layers": ["all", 1],
    }
    plan["axes"] = values
    for cell, *own in zip(plan["cells"], *values.values(), strict=False):
        cell["axes"] = dict(zip(values, own, strict=True))
    (sweep / "sweep.json").write_text(json.dumps(plan))
    dashboard.write(sweep)
    client = tensorboard(sweep)
    columns = {column["name"]: column for column in experiment(client)["hparamInfos"]}
    assert set(columns) == set(values)
    assert columns["official_numerics"]["domainDiscrete"] == [False, True]
    assert columns["placement"]["domainDiscrete"] == ["fc", "q,down"]
    assert columns["R_rank"]["domainDiscrete"] == ["8", "null"]
    assert columns["task.data_seed"]["domainInterval"] == {"minValue": 0, "maxValue": 11}
    assert columns["epochs"]["domainDiscrete"] == [0.5, 1]
    assert columns["lr"]["domainDiscrete"] == [0.001, 0.005]
    assert columns["layers"]["domainDiscrete"] == ["1", "all"]
    first = sessions(client)[plan["cells"][0]["run"]]["hparams"]
    second = sessions(client)[plan["cells"][1]["run"]]["hparams"]
    assert {key: first[key] for key in values} == {
        "official_numerics": True,
        "placement": "fc",
        "R_rank": "null",
        "task.data_seed": 0,
        "epochs": 1,
        "lr": 0.001,
        "layers": "all",
    }
    assert second["placement"] == "q,down"
    assert second["R_rank"] == "8"
    assert second["lr"] == 0.005
    assert second["layers"] == "1"


def test_runs_without_a_sweep(run_cli, tmp_path, tensorboard):
    for method in ("lora", "hyperadapt"):
        words = ["model=tiny_llama", "task.n_train=8", "task.n_test=2", "max_steps=2", "eval_before=false"]
        assert run_cli(f"method={method}", *words)[0] == 0
    client = tensorboard(tmp_path / "outputs")
    columns = {column["name"]: column for column in experiment(client)["hparamInfos"]}
    assert {"method", "r", "lr", "task", "model", "protocol", "placement", "seed", "batch_size"} <= set(columns)
    assert not {"output", "run_dir", "dry_run"} & set(columns)
    assert columns["method"]["differs"]
    assert not columns["seed"]["differs"]
    rows = sessions(client)
    assert sorted(row["hparams"]["method"] for row in rows.values()) == ["hyperadapt", "lora"]
    assert all(row["sessions"][0]["status"] == "STATUS_SUCCESS" for row in rows.values())
    assert all({"final/accuracy", "train/loss", "cost/trainable"} <= set(metrics(row)) for row in rows.values())
