"""Prints to the terminal: single lines, the progress of downloads, or nothing but a command's result."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

console = Console(markup=False, emoji=False)
"""Prints what it is given as it is: `[q,v]` is no markup, `:x:` no picture."""
LOOK_S = 1
"""How often a download is looked at."""


def say(line: str) -> None:
    """Prints one line at once and as it is, however long."""
    console.print(line, highlight=False, soft_wrap=True)


@contextmanager
def silent_unless(speaks: bool) -> Iterator[None]:
    """Within it standard output goes nowhere, unless this is the process that speaks."""
    if speaks:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextmanager
def result_alone() -> Iterator[None]:
    """Within it what is said on the way goes to standard error, so that a command's standard output is its result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextmanager
def arriving(what: str, size: int, arrived: Callable[[], int]) -> Iterator[None]:
    """Within it, prints each tenth of `size` bytes that has arrived; a log can hold that, and it needs no terminal."""
    over = threading.Event()

    def look() -> None:
        said = 0
        while not over.wait(LOOK_S):
            tenth = min(10 * arrived() // max(size, 1), 10)
            if tenth > said:
                said = tenth
                say(f"{what}: {10 * tenth} % of {megabytes(size)}")

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e7 else f"{size / 1e6:,.0f} MB"


def duration(seconds: float) -> str:
    """Returns a time in its two largest units: 1 h 5 min, 1 min 20 s, 4 s."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m} min" if hours else f"{m} min {s} s" if m else f"{s} s"
