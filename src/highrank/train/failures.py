"""Failures of a run: written down in its folder, and told to a person with what to do."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

from highrank.base.errors import UserError, described, refused_by_disk
from highrank.config.run_config import Run
from highrank.train.divergence import Diverged
from highrank.train.memory import DoesNotFit, out_of_memory
from highrank.train.results import RunDirectory
from highrank.train.stopping import Interrupted


@contextmanager
def failures_written(run: Run, directory: RunDirectory) -> Iterator[None]:
    """Writes down what ends the run within it, before other processes can learn of it.

    Raises:
        UserError: if memory ran out or the disk refused, with what to do.
    """
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        memory = out_of_memory(error)
        parts = next_parts(run, directory) if memory else None
        status = "oom" if memory or isinstance(error, DoesNotFit) else "failed"
        if isinstance(error, Diverged):
            status = "diverged"
        said = str(error) if status == "diverged" else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError, UserError):
            directory.fail(status, said, **({"parts": parts} if parts else {}))
        told = explanation(error, run, directory, status, parts)
        if told is None:
            raise
        raise UserError(told) from error


def next_parts(run: Run, directory: RunDirectory) -> int | None:
    """Returns in how many parts a batch that did not fit is computed next time, if the run may cut it."""
    parts = 2 * int(directory.results.get("parts", 1))
    return parts if run.core.auto_microbatch and parts <= run.core.batch_size else None


def explanation(error: Exception, run: Run, directory: RunDirectory, status: str, parts: int | None) -> str | None:
    """Returns what a person can do about an error, or None if only its traceback tells."""
    if refused_by_disk(error):
        return (
            f"run: its files must be writable, got {described(error)}; make room, then give the same command again: "
            "it goes on from the last checkpoint"
        )
    if out_of_memory(error):
        advice = "halve batch_size and double accumulate, or set checkpoint_activations=true or auto_microbatch=true"
        if parts:
            advice = f"give the same command again: a batch is then computed in {parts} parts"
        return (
            f"run: a step must fit into memory, got {described(error)} with batch_size={run.core.batch_size}; {advice}"
        )
    if status == "failed" and directory.opened and directory.results["status"] == "oom":
        return f"run: another of its processes ran out of memory, got {directory.results['error']}"
    return None
