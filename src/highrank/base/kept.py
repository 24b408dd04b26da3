"""Files in the cache that hold what was computed once, each with a checksum of its own behind its content."""

import hashlib
from contextlib import suppress
from pathlib import Path

from highrank.base.console import console
from highrank.base.files import write_atomic

DIGEST_BYTES = hashlib.sha256().digest_size


def read_kept(file: Path) -> bytes | None:
    """Returns a file's content, or None if there is none or it is damaged, which is said."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    kept, checksum = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if hashlib.sha256(kept).digest() == checksum:
        return kept
    console.print(f"the cached {file} is damaged; what it held is made again", highlight=False)
    return None


def keep(file: Path, content: bytes) -> None:
    """Writes a file for `read_kept`; a cache that cannot be written costs time alone."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, content + hashlib.sha256(content).digest())
