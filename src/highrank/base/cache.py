"""What was computed before, kept in the user's cache under a hash of all that it depends on, with a checksum of its own.

A file is its content, followed by the sha256 of that.
"""

import hashlib
from contextlib import suppress
from pathlib import Path

from highrank.base.console import say
from highrank.base.files import write_atomic

DIGEST_BYTES = hashlib.sha256().digest_size


def cached(file: Path, otherwise: str) -> bytes | None:
    """Returns a file's content; None if there is none, or if it is damaged: then it is said what happens `otherwise`."""
    if not file.is_file():
        return None
    stored = file.read_bytes()
    content, checksum = stored[:-DIGEST_BYTES], stored[-DIGEST_BYTES:]
    if hashlib.sha256(content).digest() == checksum:
        return content
    say(f"the cached {file} is damaged; {otherwise}")
    return None


def keep(file: Path, content: bytes) -> None:
    """Writes a file that `cached` reads. A cache that cannot be written costs time alone."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, content + hashlib.sha256(content).digest())
