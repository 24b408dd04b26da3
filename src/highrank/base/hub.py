"""Checks whether the Hugging Face Hub answers, before its client tries again and again."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

WAIT_S = 3
"""How long the Hub may take to answer anything; `HF_HUB_ETAG_TIMEOUT`, if set, says otherwise."""

ASKED_AGAIN_S = 30
"""After how many seconds an endpoint that did not answer is asked again."""


@contextmanager
def hub() -> Iterator[str | None]:
    """Yields why the Hub cannot be asked, or None; where it cannot, its clients read their caches alone within."""
    from huggingface_hub import constants

    reason, before = unreachable(), constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or reason is not None
    try:
        yield reason
    finally:
        constants.HF_HUB_OFFLINE = before


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
