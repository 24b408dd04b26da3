"""highrank push, and what it has pushed read back by hf:user/name@revision: on a Hub of our own, on the loopback."""

import json
import re
import shutil

import pytest
import safetensors.torch
import torch
from hub_server import READS, WRITES, Hub, Repo
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import close_session
from trained import SMALL, logits, write_run

import highrank
from highrank.base import hub as hub_module
from highrank.cli import main
from highrank.config.words import compose_run
from highrank.interop.loaded import evaluate_runs
from highrank.model.backbones import load_backbone
from highrank.train.results import RunDirectory
from highrank.train.saved import load_run, read_run

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # raised inside huggingface_hub 2.4
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # raised inside PEFT
]
OURS = {"README.md", "config.yaml", "results.json", "adapter/adapter.json", "adapter/adapter.safetensors"}
PEFTS = {"adapter_config.json", "adapter_model.safetensors"}
LORA = ("model=tiny_llama", "method=lora", "r=2", "placement=qv")


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub that the clients ask, with ann's token and an empty cache."""
    server = Hub()
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_TOKEN", WRITES)
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    settings = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "ENDPOINT": server.url}
    settings["HUGGINGFACE_CO_URL_TEMPLATE"] = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    settings |= {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_TOKEN_PATH": str(tmp_path / "no_token")}
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)  # PEFT's, made when the module was imported
    close_session()
    yield server
    close_session()
    server.close()


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    folder, _ = write_run(tmp_path_factory.mktemp("runs") / "lora", *LORA)
    for name in ("checkpoints/last.ckpt", "predictions/test.jsonl", "events.out.tfevents.1"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("of this machine")
    return folder


@pytest.fixture
def push(capsys):
    """Returns a function that pushes: the last line of its output, and what it said on the way."""

    def call(run, *words, to="ann/mine"):
        status = main(["push", str(run), "--to", to, *words])
        out, err = capsys.readouterr()
        assert status == 0, err
        return out.splitlines()[-1], err

    return call


@pytest.fixture
def refused(capsys):
    """Returns a function that pushes in vain: the one line that says why."""

    def call(run, *words, to="ann/mine"):
        capsys.readouterr()
        assert main(["push", str(run), "--to", to, *words]) == 2
        out, err = capsys.readouterr()
        last = err.splitlines()[-1]
        assert (out, last[:7]) == ("", "error: "), err
        return last

    return call


def held(server, repo="ann/mine", branch="main"):
    return server.repos[repo].at(branch)[1]


def tensors(raw):
    return safetensors.torch.load(raw)


def test_an_adapter_is_pushed_and_read_back_bit_for_bit(server, push, lora):
    place, _ = push(lora, "--message", "first try")
    repo, files = server.repos["ann/mine"], held(server)
    assert files.keys() == OURS | PEFTS
    assert place == f"hf:ann/mine@{repo.branches['main']}"
    assert (repo.private, repo.messages) == (True, ["first try"])
    for name in ("adapter.json", "adapter.safetensors"):
        assert files[f"adapter/{name}"] == (lora / "adapter" / name).read_bytes()
    model = highrank.load("hf:ann/mine").model
    assert torch.equal(logits(model), logits(highrank.load(lora).model))
    bare = load_run(lora)[1]
    on_bare = highrank.load_adapter(load_backbone({"name": "tiny_llama", "dtype": "float32"}, None).model, place)
    assert torch.equal(logits(on_bare.model), logits(bare.model))


def test_peft_loads_the_same_repository(server, push, lora):
    peft = pytest.importorskip("peft")
    place, _ = push(lora)
    base = load_backbone({"name": "tiny_llama", "dtype": "float32"}, None).model
    theirs = peft.PeftModel.from_pretrained(base, "ann/mine")
    difference = (logits(theirs) - logits(highrank.load(place).model)).abs().max()
    assert difference < 1e-6  # sums in another order, of logits below 1


def test_nothing_of_the_machine_is_pushed(server, push, tmp_path, monkeypatch):
    """Absolute paths are typed for the base, the data, the start, the general text and the folders."""
    backbone = load_backbone({"name": "tiny_llama", "dtype": "float32"}, None)
    base, data = tmp_path / "secret" / "base", tmp_path / "secret" / "rows.jsonl"
    backbone.model.save_pretrained(base)
    backbone.tokenizer.save_pretrained(base)
    data.write_text("".join(f'{{"prompt": "{n} + 1", "answer": "{n + 1}"}}\n' for n in range(6)))
    words = ["task=jsonl", f"task.train={data}", f"task.test={data}", "model=hf:own", "model.dtype=float32"]
    words += [f"path={base}", f"general_text={data}", f"output={tmp_path}", "eval_also={jsonl: {test: X, train: X}}"]
    words[-1] = words[-1].replace("X", str(data))
    words += [f"trainer.default_root_dir={tmp_path}", *LORA[1:]]
    folder, _ = write_run(tmp_path / "run", *words)
    results = json.loads((folder / "results.json").read_text())
    results |= {"data": [{"name": str(data), "rows": 6, "sha256": "0"}], "error": str(tmp_path)}
    results |= {"imported": {"folder": str(base)}, "start": {"run": str(base), "as": "adapter", "config_hash": "0"}}
    results["start"] |= {"method": "lora", "task": "jsonl"}
    (folder / "results.json").write_text(json.dumps(results))
    for kind in ("adapter", "merged"):
        push(folder, "--format", kind, to=f"ann/{kind}")
        for name, raw in held(server, f"ann/{kind}").items():
            for place in (str(tmp_path), "secret", "predictions", "of this machine"):
                assert place.encode() not in raw, f"{place} in {name} of {kind}"
    assert held(server, "ann/adapter").keys() == OURS | PEFTS
    files = held(server, "ann/adapter")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "own"
    assert read_run(hub_module.fetched("test", "hf:ann/adapter")).given["task.train"] == "rows.jsonl"
    assert torch.equal(
        logits(load_run(hub_module.fetched("test", "hf:ann/adapter"), [f"path={base}"])[1].model),
        logits(load_run(folder)[1].model),
    )


def test_a_pushed_run_has_the_hash_it_had_where_its_paths_were_relative(server, push, lora, tmp_path, monkeypatch):
    push(lora)
    there = json.loads(held(server)["results.json"])["config_hash"]
    assert there == json.loads((lora / "results.json").read_text())["config_hash"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    words = ["task=jsonl", "task.train=rows.jsonl", "task.test=rows.jsonl", *LORA]
    folder, _ = write_run(tmp_path / "run", *words)
    push(folder, to="ann/relative")
    there = json.loads(held(server, "ann/relative")["results.json"])["config_hash"]
    assert there == json.loads((folder / "results.json").read_text())["config_hash"]


def test_a_base_with_a_name_on_the_hub_is_named_by_it(server, push, tmp_path):
    backbone = load_backbone({"name": "tiny_llama", "dtype": "float32"}, None)
    backbone.model.save_pretrained(tmp_path / "base")
    backbone.tokenizer.save_pretrained(tmp_path / "base")
    words = ["model=hf:someone/base@v1", "model.dtype=float32", f"path={tmp_path / 'base'}"]
    folder, _ = write_run(tmp_path / "run", *words, *LORA[1:])
    push(folder)
    files = held(server)
    assert b"base_model: someone/base\n" in files["README.md"]
    told = json.loads(files["adapter_config.json"])
    assert (told["base_model_name_or_path"], told["revision"]) == ("someone/base", "v1")
    run = read_run(hub_module.fetched("test", "hf:ann/mine"))
    assert (run.core.path, run.model["hub"], run.model["revision"]) == (None, "someone/base", "v1")


def test_a_method_that_peft_lacks_is_pushed_without(server, push, tmp_path):
    folder, _ = write_run(tmp_path / "run", "model=tiny_llama", "method=mora", "r=2", "placement=qv")
    _, said = push(folder)
    assert held(server).keys() == OURS
    assert "push: HighRank alone will load it: PEFT has no type for mora" in said
    assert b"library_name: highrank" in held(server)["README.md"]
    assert torch.equal(logits(highrank.load("hf:ann/mine").model), logits(highrank.load(folder).model))


def test_full_fine_tuning_says_what_its_adapter_is(server, push, tmp_path):
    folder, _ = write_run(tmp_path / "run", "model=tiny_llama", "method=full")
    _, said = push(folder)
    assert re.search(r"full trains the model's own weights, and its adapter is all of them \(\d.* MB\)", said)
    assert torch.equal(logits(highrank.load("hf:ann/mine").model), logits(highrank.load(folder).model))


def test_a_merged_model_is_pushed_and_read_back(server, push, lora):
    place, _ = push(lora, "--format", "merged", "--dtype", "float32", "--public")
    assert server.repos["ann/mine"].private is False
    assert {"config.json", "model.safetensors", "tokenizer.json", "fidelity.json", "README.md"} <= held(server).keys()
    assert b"\nlibrary_name: transformers\n" in held(server)["README.md"]
    run = compose_run([f"model={place}", "model.dtype=float32"])
    assert (run.model["hub"], run.model["revision"]) == ("ann/mine", server.repos["ann/mine"].branches["main"])
    assert run.hash == compose_run(["model=hf:ann/mine", f"model.revision={place[-40:]}", "model.dtype=float32"]).hash
    merged = load_backbone(run.model, None)
    assert merged.source.kind == "hub"
    trained = load_run(lora)[2]
    trained.merge()
    assert torch.equal(logits(merged.model), logits(trained.model))


def test_a_revision_is_a_branch_or_a_commit(server, push, lora, tmp_path):
    second, _ = write_run(tmp_path / "second", *LORA, scale=0.5)
    first_place, _ = push(lora, "--revision", "first")
    push(second)
    assert held(server, branch="first").keys() == held(server).keys()
    for place, run in ((first_place, lora), ("hf:ann/mine@first", lora), ("hf:ann/mine", second)):
        assert torch.equal(logits(highrank.load(place).model), logits(highrank.load(run).model))
    push(lora)  # the branch has moved: the newest is read
    assert torch.equal(logits(highrank.load("hf:ann/mine").model), logits(highrank.load(lora).model))


def test_what_was_fetched_is_read_without_a_hub(server, push, lora, monkeypatch):
    place, _ = push(lora)
    hub_module.fetched("test", "hf:ann/mine")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(server.asked)
    for name in ("hf:ann/mine", place):
        assert torch.equal(logits(highrank.load(name).model), logits(highrank.load(lora).model))
    assert len(server.asked) == asked


def test_a_dry_run_asks_nobody_and_says_the_bytes(server, push, capsys, lora, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    for words in ((), ("--format", "merged", "--dtype", "float32")):
        assert main(["push", str(lora), "--to", "ann/mine", "--dry-run", *words]) == 0
        *rows, total = capsys.readouterr().out.splitlines()
        sizes = {row.split()[1]: int(row.split()[0].replace(",", "")) for row in rows}
        assert (server.asked, server.repos) == ([], {})
        assert re.fullmatch(r" *([\d,]+)  bytes for ann/mine \(private\); nothing was pushed", total)
        assert int(total.split()[0].replace(",", "")) == sum(sizes.values())
        monkeypatch.setenv("HF_TOKEN", WRITES)
        push(lora, *words, to=f"ann/real{len(words)}")
        real = {name: len(raw) for name, raw in held(server, f"ann/real{len(words)}").items()}
        readme = len(f"ann/real{len(words)}") - len("ann/mine")
        sizes["README.md"] += readme * held(server, f"ann/real{len(words)}")["README.md"].count(b"ann/real")
        assert sizes == real
        server.asked.clear(), server.repos.clear()


def test_a_dry_run_takes_the_base_from_where_the_run_had_it(server, refused, tmp_path):
    backbone = load_backbone({"name": "tiny_llama", "dtype": "float32"}, None)
    backbone.model.save_pretrained(tmp_path / "base")
    backbone.tokenizer.save_pretrained(tmp_path / "base")
    words = ["model=hf:someone/base", "model.dtype=float32", f"path={tmp_path / 'base'}", *LORA[1:]]
    folder, _ = write_run(tmp_path / "run", *words)
    assert main(["push", str(folder), "--to", "ann/mine", "--dry-run"]) == 0
    shutil.move(tmp_path / "base", tmp_path / "moved")
    said = refused(folder, "--dry-run")
    assert "push: a dry run reads the base where the run had it, got" in said
    assert "which is gone; give path=<folder>" in said
    assert main(["push", str(folder), "--to", "ann/mine", "--dry-run", f"path={tmp_path / 'moved'}"]) == 0
    assert server.asked == []


def test_a_push_replaces_its_kind_and_leaves_the_rest(server, push, refused, lora, tmp_path):
    push(lora)
    repo = server.repos["ann/mine"]
    repo.commit("main", {**held(server), "figure.png": b"mine"}, "by hand")
    mora, _ = write_run(tmp_path / "mora", "model=tiny_llama", "method=mora", "r=2", "placement=qv")
    push(mora)
    assert held(server).keys() == OURS | {"figure.png"}  # PEFT would load the former run's
    said = refused(lora, "--format", "merged")
    assert "a repository holds one model, got ann/mine with adapter/adapter.safetensors for a push of a merged" in said
    server.repos["ann/other"] = other = Repo(private=True)
    other.commit("main", {"pytorch_model.bin": b"x"}, "by hand")
    assert "got ann/other with pytorch_model.bin for a push of an adapter" in refused(lora, to="ann/other")


def test_the_same_push_again_commits_nothing(server, push, lora):
    place, _ = push(lora)
    assert push(lora)[0] == place
    assert len(server.repos["ann/mine"].messages) == 1


@pytest.mark.parametrize(
    ("to", "token", "said"),
    [
        (
            "mine",
            WRITES,
            "push: a repository on the Hub is <user>/<name> in letters, digits, '-', '_' and '.', got mine",
        ),
        ("ann/a/b", WRITES, "push: a repository on the Hub is <user>/<name>"),
        ("ann/-x", WRITES, "push: a repository on the Hub is <user>/<name>"),
        ("hf:ann/x", WRITES, "push: --to is <user>/<name>, got --to hf:ann/x"),
        ("ann/x@v1", WRITES, "push: --to is <user>/<name>, got --to ann/x@v1; a branch is given with --revision"),
        (
            "ann/x",
            None,
            "push: a token that may write is needed, got none; set HF_TOKEN, or log in with `hf auth login`",
        ),
        ("ann/x", "hf_wrong", "push: the token must be a valid one, got 401 from http://127.0.0.1"),
        ("ann/x", READS, "push: the token must be allowed to write to the repository, got 403 for ann/x"),
        ("bob/x", WRITES, "push: the token must be allowed to write to the repository, got 403 for bob/x"),
        ("ann/public", WRITES, "push: the repository must be private as asked for, got ann/public, which is public"),
    ],
)
def test_a_place_that_will_not_do(server, refused, lora, monkeypatch, to, token, said):
    """Said before any weight is loaded."""
    server.repos["ann/public"] = Repo(private=False)
    monkeypatch.setattr("highrank.train.saved.build_model", None)
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    assert said in refused(lora, to=to)
    assert server.repos.keys() == {"ann/public"}
    assert held(server, "ann/public") == {}


def test_a_private_repository_is_not_made_public(server, push, refused, lora):
    push(lora)
    said = refused(lora, "--public")
    assert "must be public as asked for, got ann/mine, which is private; leave --public out" in said


def test_without_a_network(server, refused, lora, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = refused(lora)
    assert "push: the Hub must answer, got no answer (HF_HUB_OFFLINE is set); --dry-run shows" in said
    assert server.asked == []


def test_an_interrupted_upload_goes_on(server, push, refused, tmp_path):
    folder, _ = write_run(tmp_path / "run", "model=tiny_llama", "method=full")
    lost = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    server.refused = {"POST .*/commit/": 400}
    said = refused(folder)
    assert "push: the upload must come to its end, got BadRequestError" in said
    assert "give the same command again, what has arrived is not sent twice" in said
    assert held(server) == {}
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == lost
    server.refused = {"PUT": 403}  # what has arrived is there
    push(folder)
    assert held(server).keys() == OURS


def test_a_file_that_does_not_arrive(server, refused, lora):
    server.refused = {"PUT": 400}
    assert "push: the upload must come to its end, got BadRequestError" in refused(lora)
    assert held(server) == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: shutil.rmtree(run / "adapter"), "a run directory holds adapter/adapter.json"),
        (lambda run: (run / "adapter" / "adapter.safetensors").unlink(), "a saved adapter has adapter.safetensors"),
        (lambda run: (run / "adapter" / "adapter.safetensors").write_bytes(b"x"), "is damaged"),
        (lambda run: (run / "results.json").write_text("{"), "results.json is damaged"),
        (lambda run: (run / "config.yaml").write_text("method: {"), "config.yaml is damaged"),
        (lambda run: going(run), "an adapter is used when its training is over, got status=running at step 2 of 9"),
    ],
)
def test_a_run_that_will_not_do(server, refused, lora, tmp_path, change, said):
    run = shutil.copytree(lora, tmp_path / "run")
    change(run)
    assert said in refused(run)
    assert (server.asked, server.repos) == ([], {})


def going(run):
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps(results | {"status": "running", "steps": 2, "steps_planned": 9}))


def test_a_run_on_a_quantised_base_says_into_which_it_is_merged(server, refused, lora, tmp_path):
    """Said before a weight is quantised, which needs the extra."""
    directory = RunDirectory(compose_run([*LORA, *SMALL, "model.quantize=int8", f"run_dir={tmp_path / 'run'}"]))
    directory.open()
    shutil.copytree(lora / "adapter", directory.path / "adapter")
    directory.write(status="done", model={"name": "tiny_llama", "kind": "random", "location": "", "sha": "seed 0"})
    said = refused(directory.path, "--format", "merged")
    assert "a run on a quantised base says into which base it is merged, got model.quantize=int8; add model" in said
    assert (server.asked, server.repos) == ([], {})


def test_a_run_on_merged_weights_is_pushed_merged(server, push, refused, lora, tmp_path):
    folder, _ = write_run(tmp_path / "run", "model=tiny_llama", "method=lora", "r=2", "placement=qv")
    quick = ["model=tiny_llama", "method=hira", "r=2", *SMALL, "max_steps=1", "eval_before=false"]
    assert main(["run", *quick, f"start_from={folder}", f"run_dir={tmp_path / 'next'}"]) == 0
    said = refused(tmp_path / "next")
    assert "push: an adapter's base must be a model with a name, got a run on another run's merged weights" in said
    push(tmp_path / "next", "--format", "merged")
    assert str(tmp_path).encode() not in held(server)["README.md"]


def test_a_run_starts_from_one_on_the_hub_and_names_its_commit(server, push, lora, tmp_path, capsys):
    place, _ = push(lora)
    quick = [*LORA, *SMALL, "task.n_train=6", "max_steps=1", "eval_before=false"]
    assert main(["run", *quick, "start_from=hf:ann/mine", f"run_dir={tmp_path / 'next'}"]) == 0
    results = json.loads((tmp_path / "next" / "results.json").read_text())
    assert (results["start"]["run"], results["start"]["as"]) == (place, "adapter")
    assert read_run(tmp_path / "next").core.start_from == place
    local = compose_run([*quick, f"start_from={lora}"])
    assert local.hash == results["config_hash"]  # the same run, wherever it lies
    status = main(["run", *quick, "start_from=hf:ann/none", f"run_dir={tmp_path / 'none'}"])
    said = capsys.readouterr().err
    assert status == 2
    assert "start_from: a repository must be there, and public or one that your token reads" in said


def test_commands_take_a_run_on_the_hub(server, push, lora, tmp_path, capsys):
    place, _ = push(lora)
    assert main(["eval", "hf:ann/mine"]) == 0
    assert json.loads(capsys.readouterr().out) == evaluate_runs([lora])[str(lora)]
    for command in ("merge", "export --format peft", "export --format lora --rank 2"):
        out = tmp_path / command.replace(" ", "_")
        assert main([*command.split(), place, "--out", str(out)]) == 0, command
        assert (out / "README.md").is_file()
    terms = [f"{place}=0.5", f"{lora}=0.5"]
    assert main(["combine", *terms, "--how", "linear", "--out", str(tmp_path / "combined")]) == 0
    capsys.readouterr()
    assert main(["show", place, "--against", str(lora)]) == 0


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("hf:ann/none", "a repository must be there, and public or one that your token reads"),
        ("hf:ann/model", "the repository must hold config.yaml, results.json, adapter/adapter.json"),
        ("hf:ann/model@v9", "the repository must have the revision, got hf:ann/model@v9"),
        ("hf:model", "a repository on the Hub is <user>/<name>"),
    ],
)
def test_a_place_that_cannot_be_read(server, capsys, place, said):
    server.repos["ann/model"] = repo = Repo(private=False)
    repo.commit("main", {"model.safetensors": b"x", "config.yaml": b"x"}, "by hand")
    assert main(["eval", place]) == 2
    assert f"error: eval: {said}" in capsys.readouterr().err


def test_a_private_run_needs_a_token_that_reads_it(server, push, capsys, lora, monkeypatch):
    push(lora)
    monkeypatch.setenv("HF_TOKEN", READS)
    assert highrank.load("hf:ann/mine").adapters is not None
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(lora.parent / "empty"))
    for token in ("", "hf_wrong"):
        monkeypatch.setenv("HF_TOKEN", token)
        assert main(["eval", "hf:ann/mine"]) == 2
        assert "(HF_TOKEN, `hf auth login`), got hf:ann/mine" in capsys.readouterr().err
