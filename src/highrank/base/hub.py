"""The Hugging Face Hub: whether it answers, before its client tries again and again, and what is read from it by hf:user/name."""

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from highrank.base.console import megabytes, say
from highrank.base.errors import UserError, described

PREFIX = "hf:"
"""How a place begins that is a repository on the Hub: hf:user/name, hf:user/name@revision."""
RUN_FILES = ("config.yaml", "results.json", "adapter/adapter.json", "adapter/adapter.safetensors")
"""What a repository with a run holds, as a run directory does; `highrank push` writes it."""

WAIT_S = 3
"""How long the Hub may take to answer anything; `HF_HUB_ETAG_TIMEOUT`, if set, says otherwise."""

ASKED_AGAIN_S = 30
"""After how many seconds an endpoint that did not answer is asked again."""


@contextmanager
def hub() -> Iterator[str | None]:
    """Yields why the Hub cannot be asked, or None; where it cannot, its clients read their caches alone within."""
    reason = unreachable()
    with caches_alone(reason is not None):
        yield reason


@contextmanager
def caches_alone(so: bool) -> Iterator[None]:
    """Within it the Hub's clients ask nobody, if so, and read their caches."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or so
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def on_hub(place: Path | str) -> bool:
    """Whether a place is a repository on the Hub, and no folder."""
    return str(place).startswith(PREFIX)


def repository(part: str, place: Path | str) -> tuple[str, str | None]:
    """Returns the repository and the revision, if it names one, of hf:user/name@revision; `part` asks.

    Raises:
        UserError: if no repository can be called so.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repo, _, revision = str(place).removeprefix(PREFIX).partition("@")
    try:
        validate_repo_id(repo)
        if "/" not in repo:
            raise HFValidationError("it has no user")
    except HFValidationError as error:
        raise UserError(
            f"{part}: a repository on the Hub is <user>/<name> in letters, digits, '-', '_' and '.', got {place}"
        ) from error
    return repo, revision or None


def fetched(part: str, place: Path | str) -> Path:
    """Returns the folder of a run: a folder itself; of hf:user/name@revision its copy in the cache, fetched as far as it lacks.

    What a branch holds is asked of the Hub or, where that does not answer, of the cache; a commit is read from the cache first.

    Raises:
        UserError: if there is no such repository or revision, the token may not read it, nobody answers and the cache lacks it, or
            it holds no run.
    """
    if not on_hub(place):
        return Path(place)
    from huggingface_hub import HfApi, snapshot_download

    repo, revision = repository(part, place)
    if re.fullmatch(r"[0-9a-f]{40}", revision or "") and (cached := _cached(repo, revision)):
        return cached
    with hub() as reason:
        try:
            if reason is None:
                found = HfApi().model_info(repo, revision=revision, files_metadata=True)
                if not _cached(repo, found.sha):
                    size = sum(file.size or 0 for file in found.siblings or [] if file.rfilename in RUN_FILES)
                    say(f"fetching {place} from the Hub: {megabytes(size)}")
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(RUN_FILES)))
        except Exception as error:  # the hub client raises its own, httpx's and OS errors; each means "not from here"
            raise UserError(f"{part}: {_unread(error, reason)}, got {place}") from error
    if lacking := [name for name in RUN_FILES if not (folder / name).is_file()]:
        raise UserError(
            f"{part}: the repository must hold {', '.join(RUN_FILES)}, as `highrank push` writes them, got {place} without "
            f"{', '.join(lacking)}"
        )
    return folder


def _cached(repo: str, revision: str | None) -> Path | None:
    """Returns the folder of a commit in the cache, if it has a whole run."""
    from huggingface_hub import try_to_load_from_cache

    paths = {name: try_to_load_from_cache(repo, name, revision=revision) for name in RUN_FILES}
    whole = all(isinstance(path, str) for path in paths.values())
    return Path(str(paths["config.yaml"])).parent if whole else None


def _unread(error: Exception, reason: str | None) -> str:
    """Returns what a repository that could not be read must be."""
    from huggingface_hub import errors

    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository must have the revision"
    if isinstance(error, errors.GatedRepoError | errors.RepositoryNotFoundError):
        return "a repository must be there, and public or one that your token reads (HF_TOKEN, `hf auth login`)"
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return "the token must be a valid one that reads the repository (HF_TOKEN, `hf auth login`)"
    return f"a repository must be in the cache or on a Hub that answers ({reason or described(error)})"


def pinned(place: Path | str, folder: Path) -> str:
    """Returns a place on the Hub with the commit of its copy in the cache as the revision."""
    return f"{str(place).partition('@')[0]}@{folder.name}"


def unreachable() -> str | None:
    """Returns why the Hub cannot be asked; None if its endpoint answers, whatever it says.

    The request goes through the hub client's own session, so proxies and certificates are those of a download. It has
    a thread of its own, because looking up a host's name cannot be given a time limit.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    endpoint, (asked, reason) = constants.ENDPOINT, _last.get(constants.ENDPOINT, (-ASKED_AGAIN_S, None))
    if reason is None or time.monotonic() - asked >= ASKED_AGAIN_S:
        reason = _asked(endpoint)
        _last[endpoint] = time.monotonic(), reason
    return reason


_last: dict[str, tuple[float, str | None]] = {}
"""When each endpoint was asked last, and why it could not be: a task of many tables asks for each of them."""


def _asked(endpoint: str) -> str | None:
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    wait = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else WAIT_S
    reasons: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=wait, follow_redirects=False)
            reasons.append(None)
        except Exception as error:  # httpx's own, and what sockets raise
            reasons.append(f"{type(error).__name__} from {endpoint}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(wait)
    late = f"no answer from {endpoint} within {wait} s, HF_HUB_ETAG_TIMEOUT=<seconds> waits longer"
    return reasons[0] if reasons else late
