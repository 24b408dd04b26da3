"""What we use of Lightning beyond its documented calls; tests/model/test_internals.py names the hook that moved."""

from typing import Any

import lightning


def leave_signals_alone(trainer: lightning.Trainer) -> None:
    """Keeps Lightning's own handlers out: that of SIGTERM would stop between two micro-batches, unsaved."""
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]  # on purpose


def count_logged_steps(trainer: lightning.Trainer) -> None:
    """Lets the loggers' step be that of the optimizer, of which Lightning may be one ahead after a resume."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def before_this_batch(checkpoint: dict[str, Any]) -> int:
    """Lets a checkpoint taken at the start of a batch be from before it; returns the batch's place in its epoch.

    The batch at hand has not been trained on, and evaluations are no part of the loops that are kept.
    """
    loops = checkpoint["loops"] = {"fit_loop": checkpoint["loops"]["fit_loop"]}
    progress = loops["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        counts.update(dict.fromkeys(("ready", "started", "processed"), counts["completed"]))
    progress["is_last_batch"] = False
    return int(progress["current"]["completed"])
