"""`UserError`, the error that a person sees as one message, and helpers that word such messages."""

import difflib
import errno
import re
from collections.abc import Iterable

DISK = (
    *(errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EIO, errno.EISDIR),
    *(errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS),
)
"""Numbers of errors that no program can mend: no room, no right, or something else in a file's place."""


class UserError(ValueError):
    """Bad input. The command line prints the message alone and exits with its status."""

    exit_status = 2


def refused_by_disk(error: Exception) -> bool:
    """Whether a file could not be read or written for one of the reasons in `DISK`."""
    if isinstance(error, OSError):
        return error.errno in DISK
    said = re.search(r"\(os error (\d+)\)", str(error))  # by safetensors and tokenizers, which have errors of their own
    return said is not None and int(said[1]) in DISK


def described(error: Exception) -> str:
    """Returns the kind of an error and its first line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns `; did you mean 'hira'?` for a near miss, or the whole list when nothing is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if near:
        return "; did you mean " + " or ".join(repr(n) for n in near) + "?"
    return "; it is one of: " + ", ".join(known) if known else ""
