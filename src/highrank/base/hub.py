"""Whether the Hugging Face Hub can be asked at all, known before its client tries again and again."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

WAIT_S = 3
"""How long the Hub may take to answer anything; `HF_HUB_ETAG_TIMEOUT`, if set, says otherwise."""


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
    from huggingface_hub.utils import get_session

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    wait = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else WAIT_S
    reasons: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=wait, follow_redirects=False)
            reasons.append(None)
        except Exception as error:  # httpx's own, and what sockets raise
            reasons.append(f"{type(error).__name__} from {constants.ENDPOINT}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(wait)
    late = f"no answer from {constants.ENDPOINT} within {wait} s, HF_HUB_ETAG_TIMEOUT=<seconds> waits longer"
    return reasons[0] if reasons else late
