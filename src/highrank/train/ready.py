"""What the runs of a sweep share, loaded once for all of them: the task's rows, the model, the tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from highrank.base.console import say
from highrank.base.files import digest, shown
from highrank.config.run_config import Run
from highrank.data.batches import encode_records, hold_out
from highrank.data.encoding import Encoded, give_tokens, within
from highrank.data.protocol import Protocol
from highrank.data.task import Task
from highrank.model.backbones import Backbone, on_cpu
from highrank.model.language import context_length
from highrank.train.build import load_plain
from highrank.train.devices import num_processes

Stamp = tuple[str, int, int, int]
"""A file's name, size, time of change and inode."""


def shared_by(run: Run) -> str | None:
    """Returns a hash of all that decides what a run can share with others, or None for one that loads everything itself.

    Runs of one hash have the same model, in the same number type and with the same new head, the same rows and the same
    protocol. What is loaded for them is handed on by a fork of the process that holds it, and neither a GPU's state nor the
    other processes of a run outlive that; merged weights are another run's.
    """
    if run.core.start_as == "merged" or not on_cpu(run.trainer.get("accelerator", "auto")):
        return None
    if num_processes(run.trainer) > 1:
        return None
    resolved = run.resolved
    return digest([resolved[key] for key in ("model", "path", "task", "protocol", "seed")])


@dataclass(frozen=True)
class Ready:
    """What `shared_by` says that runs share. It is for one run in each process: that changes the model in place."""

    task: Task
    backbone: Backbone
    stamps: Sequence[Stamp]
    protocol: Protocol
    encoded: Sequence[Encoded | None]

    def base(self) -> Backbone | None:
        """Returns the model, or None if one of its files is no longer what was loaded."""
        if _stamps(self.backbone) == self.stamps:
            return self.backbone
        say(
            f"warning: a file of the model changed since the sweep loaded it, so that it is loaded again: "
            f"{shown(self.backbone.source.location)}"
        )
        return None

    def tokens(self, backbone: Backbone, protocol: Protocol) -> Sequence[Encoded | None] | None:
        """Returns the training records' tokens in a run with this model and protocol, or None if they are others."""
        return self.encoded if backbone is self.backbone and protocol == self.protocol else None


def load_shared(run: Run) -> Ready:
    """Returns what the runs with this one's `shared_by` share.

    Raises:
        UserError: if it cannot be loaded.
    """
    task = run.make_task()
    backbone = load_plain(run, task)
    stamps = _stamps(backbone)
    give_tokens(task, run.protocol, backbone.tokenizer)
    protocol = within(run.protocol, context_length(backbone.model, backbone.tokenizer))
    records, _ = hold_out(task.train(), protocol)
    task.test()
    encoded = encode_records(records, protocol, backbone.tokenizer)
    task.tokens = None  # as each run's plan finds it
    return Ready(task, backbone, stamps, protocol, encoded)


def _stamps(backbone: Backbone) -> list[Stamp]:
    if backbone.source.kind == "random":
        return []
    files = ((file.name, file.stat()) for file in sorted(Path(backbone.source.location).iterdir()) if file.is_file())
    return [(name, status.st_size, status.st_mtime_ns, status.st_ino) for name, status in files]
