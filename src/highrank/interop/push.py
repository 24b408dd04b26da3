"""`highrank push`: a run's adapter, or its merged model, as a repository on the Hugging Face Hub.

An adapter's repository is a run directory again, so that whatever takes RUN takes hf:user/name@revision:

    config.yaml, results.json       what was trained, how, and what came out
    adapter/                        the run's own, byte for byte
    adapter_config.json, adapter_model.safetensors      the same for Hugging Face PEFT, where it has the method
    README.md                       the model card

That of a merged model is the folder that `highrank merge` writes. Neither holds checkpoints, events, predictions, data, or where
anything lies on this machine. A push is one commit: it is there whole or not at all.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from omegaconf import OmegaConf

from highrank.base.console import megabytes, say
from highrank.base.errors import UserError, described
from highrank.base.files import write_atomic
from highrank.base.hub import PREFIX, RUN_FILES, caches_alone, on_hub, repository, unreachable
from highrank.base.saved import read_results
from highrank.config.run_config import Run, RunConfig, as_given, config_hash
from highrank.config.words import spelled
from highrank.interop import hub_model, peft
from highrank.interop.card import model_card
from highrank.model import adapter_folder
from highrank.model.weights import NOT_DECISIVE
from highrank.train.saved import check_plain, read_run

KEPT = (
    *("status", "config_hash", "seed", "protocol", "params", "metrics", "steps", "steps_planned", "stopped"),
    *("model", "data", "start", "imported", "versions"),
)
"""Keys of results.json that are pushed; the others are about the machine and the way there."""
WEIGHTS = {
    False: ("adapter/adapter.safetensors", peft.WEIGHTS, peft.CONFIG),
    True: ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
}
"""Names of the weights that a push brings, by whether it is a merged model, with what says how to read them."""
FOREIGN = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5")


@dataclasses.dataclass(frozen=True)
class Destination:
    """Where a run is pushed to: user/name, whether everybody may see it, a branch, the commit's message."""

    repo: str
    public: bool = False
    revision: str | None = None
    message: str | None = None

    def __post_init__(self) -> None:
        _, revision = repository("push", self.repo)
        if on_hub(self.repo) or revision:
            raise UserError(f"push: --to is <user>/<name>, got --to {self.repo}; a branch is given with --revision")

    def __str__(self) -> str:
        branch = f", branch {self.revision}" if self.revision else ""
        return f"{self.repo} ({'public' if self.public else 'private'}{branch})"


def push_run(
    folder: Path | str,
    to: Destination,
    words: Sequence[str] = (),
    dry_run: bool = False,
    *,
    merged: bool = False,
    dtype: str | None = None,
    accept: bool = False,
) -> str:
    """Pushes a run's adapter, or its merged model in `dtype`; returns hf:user/name@commit, of a dry run the files with their bytes.

    `words` give the base anew, as for a merge, whose `accept` takes a loss of fidelity. A dry run asks no network, and so takes
    the base from where the run had it.

    Raises:
        UserError: for a run that has no whole adapter, or cannot be merged; without a token, or one that may not; for a repository
            that is seen by others than asked for, or holds another kind of model; if the upload is interrupted.
    """
    folder = Path(folder)
    run = read_run(folder)
    adapter_folder.read(folder / "adapter", run.method.name)
    if merged:
        hub_model.check_mergeable(folder, dtype, words)
    else:
        check_plain("push", run, folder)
        _say_what_is_whole(run, folder)
    api = HfApi()
    there = [] if dry_run else _opened(api, to, merged)
    if dry_run and (merged or run.method.peft is not None):
        words = [*words, *_base_here(folder, words)]
    with tempfile.TemporaryDirectory() as scratch, caches_alone(dry_run):
        staged = _staged(run, folder, Path(scratch) / "run")
        if merged:
            files = _merged_files(staged, folder, Path(scratch) / "model", words, dtype, accept)
        else:
            files = _adapter_files(staged, folder, words)
        use = _use(to, merged, peft.CONFIG in files)
        write_atomic(files["README.md"], files["README.md"].read_bytes() + use.encode())
        if dry_run:
            return _listed(to, files)
        return _sent(api, to, files, [name for name in there if _is(name, WEIGHTS[merged])])


def _say_what_is_whole(run: Run, folder: Path) -> None:
    if not run.method.family.keeps_base:
        size = megabytes((folder / "adapter" / "adapter.safetensors").stat().st_size)
        say(
            f"push: {run.method.name} trains the model's own weights, and its adapter is all of them ({size}), for HighRank "
            "alone; --format merged pushes a model that any program loads"
        )


def _base_here(folder: Path, words: Sequence[str]) -> list[str]:
    """Returns the words that take the base from the folder in which the run found it; none where they give one."""
    source = read_results(folder)["model"]
    if source["kind"] == "random" or any(word.startswith("path=") for word in words):
        return []
    if not Path(source["location"]).is_dir():
        raise UserError(
            f"push: a dry run reads the base where the run had it, got {source['location']}, which is gone; give path=<folder>"
        )
    return [f"path={spelled(source['location'])}"]


def _staged(run: Run, folder: Path, staged: Path) -> Path:
    """Writes config, results and the adapter's card of a run without what is this machine's, as a run directory."""
    (staged / "adapter").mkdir(parents=True)
    config = portable_config(run)
    results = portable_results(read_results(folder), config)
    write_atomic(staged / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)).encode())
    write_atomic(staged / "results.json", json.dumps(results, indent=1).encode())
    write_atomic(staged / "adapter" / "adapter.json", (folder / "adapter" / "adapter.json").read_bytes())
    return staged


def portable_config(run: Run) -> dict[str, Any]:
    """Returns a run's config with paths as they were typed, of absolute ones the last name; no folder of the base where it has
    a name on the Hub."""
    config = {**as_given(run.resolved), "output": RunConfig.output, "run_dir": None}
    config = _without_folders(RunConfig, config)
    config["task"] = _without_folders(run.task.config, config["task"])
    config["trainer"] = {key: _name(value) for key, value in config["trainer"].items()}
    if run.also:
        tasks = {name: other.task.config for name, other in run.also.items()}
        config["eval_also"] = {
            name: _without_folders(tasks[name], given) for name, given in config["eval_also"].items()
        }
    if "/" in (run.model.get("hub") or ""):
        config["path"] = None
    return config


def portable_results(results: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is pushed of a run's results, for its portable config."""
    kept = {key: results[key] for key in KEPT if key in results} | {"config_hash": config_hash(config)}
    kept["model"] = {**kept["model"], "location": kept["model"]["name"]}
    kept["data"] = [{**row, "name": _name(row["name"])} for row in kept.get("data", [])]
    kept["versions"] = {k: v for k, v in kept.get("versions", {}).items() if k not in ("platform", "device")}
    for key, place in (("start", "run"), ("imported", "folder")):
        if key in kept:
            kept[key] = {**kept[key], place: _name(kept[key][place])}
    return kept


def _without_folders(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    paths = [field.name for field in dataclasses.fields(cls) if field.metadata.get("path")]
    return {key: _name(value) if key in paths else value for key, value in values.items()}


def _name(value: Any) -> Any:
    """Returns the last name of an absolute path; anything else as it is."""
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def _adapter_files(staged: Path, folder: Path, words: Sequence[str]) -> dict[str, Path]:
    """Returns the files of an adapter's repository by their names there."""
    files = {name: staged / name for name in (*RUN_FILES, "README.md")}
    files["adapter/adapter.safetensors"] = folder / "adapter" / "adapter.safetensors"
    run, library = read_run(staged), "highrank"
    why = peft.beyond_peft(read_run(folder, words)) if run.method.peft else f"PEFT has no type for {run.method.name}"
    if why:
        say(f"push: HighRank alone will load it: {why}")
    else:
        config, tensors = peft.adapter_of(folder, words)
        base = run.model.get("hub") or read_results(staged)["model"]["name"]
        peft.write_adapter(staged, {**config, "base_model_name_or_path": base}, tensors)
        files |= {name: staged / name for name in (peft.CONFIG, peft.WEIGHTS)}
        library = "peft"
    write_atomic(staged / "README.md", model_card(run, staged, library).encode())
    return files


def _merged_files(
    staged: Path, folder: Path, out: Path, words: Sequence[str], dtype: str | None, accept: bool
) -> dict[str, Path]:
    """Returns the files of a merged model's repository by their names there."""
    hub_model.merge_run(folder, out, dtype, accept, words)
    fidelity = json.loads((out / "fidelity.json").read_bytes())
    facts = {"dtype": fidelity["dtype"], "fidelity": hub_model.listed(fidelity)}
    write_atomic(out / "README.md", model_card(read_run(staged), staged, "transformers", facts).encode())
    for file in out.glob("*config.json"):
        settings = json.loads(file.read_bytes())
        kept = {key: value for key, value in settings.items() if key not in NOT_DECISIVE or _name(value) == value}
        if kept != settings:
            write_atomic(file, json.dumps(kept, indent=2).encode())
    return {str(file.relative_to(out)): file for file in sorted(out.rglob("*")) if file.is_file()}


def _use(to: Destination, merged: bool, by_peft: bool) -> str:
    """Returns the part of the card that says how to load what is pushed."""
    place = f"{to.repo}@{to.revision}" if to.revision else to.repo
    if merged:
        return f"\n## Load it\n\ntransformers, and what is built on it, loads it by its name; HighRank with `model={PREFIX}{place}`.\n"
    revision = f', revision="{to.revision}"' if to.revision else ""
    theirs = f'model = peft.PeftModel.from_pretrained(base, "{to.repo}"{revision})\n' if by_peft else ""
    return (
        f'\n## Load it\n\n```python\nmodel, tokenizer, adapters = highrank.load("{PREFIX}{place}")\n{theirs}```\n\n'
        f"```bash\nhighrank eval {PREFIX}{place}\n```\n"
    )


def _listed(to: Destination, files: Mapping[str, Path]) -> str:
    sizes = {name: file.stat().st_size for name, file in sorted(files.items())}
    rows = [f"{size:>15,}  {name}" for name, size in sizes.items()]
    return "\n".join([*rows, f"{sum(sizes.values()):>15,}  bytes for {to}; nothing was pushed"])


def _opened(api: HfApi, to: Destination, merged: bool) -> list[str]:
    """Makes the repository and the branch where they are not there yet; returns the names of the files that they hold.

    Raises:
        UserError: without a token, or one that may not; for a repository that is seen by others than asked for, or that holds
            another kind of model.
    """
    if reason := unreachable():
        raise UserError(f"push: the Hub must answer, got no answer ({reason}); --dry-run shows what would be pushed")
    if get_token() is None:
        raise UserError(
            "push: a token that may write is needed, got none; set HF_TOKEN, or log in with `hf auth login`"
        )
    with _asking(to):
        try:
            found = api.model_info(to.repo)
        except RepositoryNotFoundError:
            found = None
            api.create_repo(to.repo, private=not to.public)
            say(f"made the repository {to}")
    if found and bool(found.private) is to.public:
        is_, fix = ("private", "leave --public out") if found.private else ("public", "add --public")
        raise UserError(
            f"push: the repository must be {'public' if to.public else 'private'} as asked for, got {to.repo}, which is {is_}; "
            f"{fix}, change it in its settings, or choose another --to"
        )
    if to.revision:
        with _asking(to):
            api.create_branch(to.repo, branch=to.revision, exist_ok=True)
            found = api.model_info(to.repo, revision=to.revision)
    names = [file.rfilename for file in found.siblings or []] if found else []
    foreign = [name for name in names if _is(name, FOREIGN) and not _is(name, WEIGHTS[merged])]
    if foreign:
        raise UserError(
            f"push: a repository holds one model, got {to.repo} with {foreign[0]} for a push of "
            f"{'a merged model' if merged else 'an adapter'}; choose another --to or --revision"
        )
    return names


def _is(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _sent(api: HfApi, to: Destination, files: Mapping[str, Path], replaced: Sequence[str]) -> str:
    """Uploads files in one commit, which takes off those of `replaced` that are not among them; returns the commit's place."""
    size = sum(file.stat().st_size for file in files.values())
    say(f"pushing {len(files)} files, {megabytes(size)}, to {to}")
    with _asking(to):
        done = api.create_commit(
            to.repo,
            [
                *(CommitOperationDelete(name) for name in replaced if name not in files),
                *(CommitOperationAdd(name, str(file)) for name, file in files.items()),
            ],
            commit_message=to.message or "Push by HighRank",
            revision=to.revision,
        )
    say(f"{api.endpoint}/{to.repo}/tree/{done.oid}")
    return f"{PREFIX}{to.repo}@{done.oid}"


@contextmanager
def _asking(to: Destination) -> Iterator[None]:
    """Turns what goes wrong between the Hub and its client into one line."""
    try:
        yield
    except Exception as error:  # the hub client raises its own, httpx's and OS errors, and a RuntimeError around them
        raise UserError(f"push: {_refused(error, to)}") from error


def _refused(error: Exception, to: Destination) -> str:
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    status = answer.response.status_code if answer else None
    if status == 401:
        return (
            f"the token must be a valid one, got 401 from {constants.ENDPOINT} for {to.repo}; set HF_TOKEN to one that may "
            "write, or log in with `hf auth login`"
        )
    if status == 403:
        return (
            f"the token must be allowed to write to the repository, got 403 for {to.repo}; use one with write access, or "
            "--to <your user>/<name>"
        )
    got = described(causes[-1] if answer is None else answer)
    return (
        f"the upload must come to its end, got {got} for {to.repo}; the run and the repository are as they were: give the "
        "same command again, what has arrived is not sent twice"
    )
