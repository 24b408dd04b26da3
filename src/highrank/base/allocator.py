"""Process-wide memory settings: glibc keeps freed blocks, and garbage collection pauses while modules load."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 2**31 - 1


def keep_freed_memory() -> None:
    """Tells glibc to keep freed blocks instead of giving them back to the system.

    By default every tensor above 32 MiB, and many below, is made of fresh pages that the kernel must map and clear at
    first touch: on a CPU that is a tenth of a training step, and more of an evaluation. Elsewhere than on Linux with
    glibc this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


@contextmanager
def not_collecting() -> Iterator[None]:
    """Switches Python's garbage collector off: importing PyTorch and Transformers makes millions of objects that all
    stay, and looking through them again and again is a fifth of a dry run."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
