"""Many adapters on one base model, of which at most one acts at a time; nothing is read twice.

    base = AdapterSwitch(backbone.model, backbone.tokenizer)
    base.load("a", run_a); base.load("b", run_b)
    base.use("a"); base.merge(); base.use("b"); base.use(None)
    base.compare("a", "b", texts)

Whatever was done, `use(None)` leaves the base as it was, bit for bit.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from highrank.base.allocator import keep_freed_memory
from highrank.base.errors import UserError, suggest
from highrank.base.files import digest
from highrank.config.run_config import Run
from highrank.config.words import key_of
from highrank.data.batches import EvalData, hold_out
from highrank.data.encoding import give_tokens
from highrank.data.task import Task, reading
from highrank.interop.hub_model import compare, logits
from highrank.model.adapters import Adapters, attach
from highrank.model.backbones import Backbone, head_modules
from highrank.model.language import context_length
from highrank.train.build import adapted_views, base_run
from highrank.train.devices import quiet
from highrank.train.evaluation import evaluate
from highrank.train.module import FineTuner
from highrank.train.saved import check_base, load_base, load_run, read_run
from highrank.train.trainer import make_evaluator


class AdapterSwitch:
    """One base model and the adapters loaded beside it, by name."""

    def __init__(self, model: Any, tokenizer: Any = None, base_run: str | None = None):
        self.model, self.tokenizer, self.base_run = model, tokenizer, base_run
        """`base_run`: which run's merged weights the model has, as `Adapters.base_run`."""
        self.adapters: dict[str, Adapters] = {}
        self.active: str | None = None
        self._heads: dict[str | None, dict[str, Tensor]] = {None: self._head()}

    def load(self, name: str, folder: Path | str, run: Run | None = None) -> Adapters:
        """Loads the adapter of a run directory under a name of its own; it does not act before `use(name)`.

        Raises:
            UserError: for a name that is taken, or an adapter of another model; the base is then as before.
        """
        run = run or read_run(folder)
        adapters = self.add(name, run)
        try:
            with self._only(name):
                adapters.load(Path(folder) / "adapter")
                self._heads[name] = self._head()
        except UserError:
            self.remove(name)
            raise
        return adapters

    def add(self, name: str, run: Run) -> Adapters:
        """Makes a run's adapter as it is before training, under a name of its own."""
        if name in self.adapters:
            raise UserError(f"adapters: a name is given once, got {name!r} again; remove it first")
        if not run.method.family.keeps_base:
            raise UserError(f"adapters: {run.method.name} trains the base itself and cannot share it, got {name!r}")
        with self._only(None):
            views, heads = adapted_views(run, self.model), self._head_names()
            adapters = attach(
                self.model, views, run.method, run.method_cfg, run.core.seed, heads, self.tokenizer, self.base_run
            )
            self.model.eval()
            self.adapters[name], self._heads[name] = adapters, self._head()
            adapters.unload()
        return adapters

    def remove(self, name: str) -> None:
        """Forgets an adapter; the base computes alone if it was the active one."""
        self._known(name)
        if self.active == name:
            self.use(None)
        del self.adapters[name], self._heads[name]

    def use(self, name: str | None) -> None:
        """Lets one adapter act, unmerged, or with None the base alone.

        Raises:
            UserError: for an unknown name, with the nearest ones.
        """
        if name is not None:
            self._known(name)
        if self.active is not None:
            if self.merged:
                self.unmerge()
            self._heads[self.active] = self._head()
            self.adapters[self.active].unload()
        self.active = name
        if name is not None:
            self.adapters[name].plug()
        self._set_head(self._heads[name])

    @property
    def merged(self) -> bool:
        return self.active is not None and self.adapters[self.active].merged

    def merge(self) -> None:
        """Writes the active adapter into the base; `unmerge`, or using another one, takes it out again, bit for bit."""
        if self.active is None:
            raise UserError("merge: an adapter must be in use, got none; use(<name>) first")
        self.adapters[self.active].merge()

    def unmerge(self) -> None:
        """Undoes `merge`."""
        if self.active is None:
            raise UserError("unmerge: an adapter must be in use, got none; use(<name>) first")
        self.adapters[self.active].unmerge()

    def save(self, name: str, folder: Path | str) -> Path:
        """Saves any of the adapters, whichever is in use."""
        self._known(name)
        with self._only(name):
            return self.adapters[name].save(folder)

    def compare(self, first: str | None, second: str | None, texts: Sequence[Any]) -> dict[str, float]:
        """Returns max_logit_difference and argmax_agreement of two adapters (None: the base) on encoded texts."""

        pair = []
        for name in (first, second):
            with self._only(name):
                pair.append(logits(self.model, texts))
        return compare(*pair)

    @contextmanager
    def _only(self, name: str | None) -> Iterator[None]:
        """Within it one adapter acts, unmerged; behind it, what acted before."""
        before, merged = self.active, self.merged
        self.use(name)
        try:
            yield
        finally:
            self.use(before)
            if merged:
                self.merge()

    def _known(self, name: str) -> None:
        if name not in self.adapters:
            raise UserError(f"adapters: unknown name, got {name!r}{suggest(name, self.adapters) or '; none is loaded'}")

    def _head_names(self) -> list[str]:
        return head_modules(self.model)

    def _head(self) -> dict[str, Tensor]:
        """Returns a copy of what trains outside the adapters: a classifier's head."""
        heads = {name: self.model.get_submodule(name) for name in self._head_names()}
        return {f"{n}.{key}": p.detach().clone() for n, head in heads.items() for key, p in head.named_parameters()}

    @torch.no_grad()
    def _set_head(self, values: Mapping[str, Tensor]) -> None:
        named = dict(self.model.named_parameters())
        for name, value in values.items():
            named[name].copy_(value)


def evaluate_runs(folders: Sequence[Path | str], words: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluates finished runs with their saved adapters; returns the metrics by run directory.

    Leaks are counted against what each run was trained on, whatever the task; where that is gone, they are None.

    Raises:
        UserError: as `on_shared_bases`; for a test set that is gone.
    """
    tasks = {folder: read_run(folder, words).make_task() for folder in dict.fromkeys(map(Path, folders))}

    def read_tests(folder: Path) -> None:
        with reading(tasks[folder]):
            tasks[folder].test()

    by_run = {}
    for folder, run, backbone, adapters in on_shared_bases(folders, words, needed=read_tests):
        task = tasks[folder]
        positions = context_length(backbone.model, backbone.tokenizer) - adapters.num_positions
        give_tokens(task, run.protocol, backbone.tokenizer)
        known = trained_on(folder, words, backbone.tokenizer)
        data = EvalData(task, run.protocol, backbone.tokenizer, known, positions=positions)
        data.check_lengths()
        module = FineTuner(adapters, task, backbone.tokenizer, run.core, 1, run.protocol)
        keep_freed_memory()
        with quiet():
            trainer = make_evaluator(run)
            by_run[str(folder)], _ = evaluate(trainer, module, data, run.core.eval_batch_size, lambda name, rows: None)
    return by_run


def trained_on(folder: Path, words: Sequence[str], tokenizer: Any) -> list[Any] | None:
    """Returns the examples that a run was trained on: from where they were or, if they were moved, from where `words`
    say that the task's data lies; None, and a line that says so, where they are gone."""
    run, moved = read_run(folder), [word for word in words if key_of(word).startswith("task.")]
    places = [run, read_run(folder, moved)] if moved and not any(key_of(word) == "task" for word in words) else [run]
    gone = []
    for place in places:
        task = place.make_task()
        give_tokens(task, run.protocol, tokenizer)
        try:
            with reading(task):
                records = hold_out(task.train(), run.protocol)[0]
        except UserError as error:
            gone.append(str(error))
            continue
        if gone:
            print(f"{folder}: leaks are counted against {place.task_cfg}, for {gone[0]}", file=sys.stderr)
        return records
    print(f"{folder}: leaked is null, for its training data is gone: {gone[0]}", file=sys.stderr)
    return None


def on_shared_bases(
    folders: Sequence[Path | str], words: Sequence[str] = (), needed: Callable[[Path], Any] = lambda folder: None
) -> Iterator[tuple[Path, Run, Backbone, Adapters]]:
    """Yields each run with its adapter acting; a base that several runs have is read once.

    `words` give the task, the protocol or the base's folder anew; `needed` reads what a run needs beside its folder.

    Raises:
        UserError: for a folder without a trained run, or words that do not fit one, before any weight loads.
    """
    groups: dict[str, list[tuple[Path, Run, Task]]] = {}
    for folder in dict.fromkeys(map(Path, folders)):
        run = read_run(folder, words)
        task = run.make_task()
        _check_kind(folder, task)
        needed(folder)
        base_folder = None if run.method.family.keeps_base else str(folder)
        base = digest([run.model, run.core.path, task.kind, task.num_labels, base_folder, base_run(run)])
        groups.setdefault(base, []).append((folder, run, task))
    for members in groups.values():
        folder, run, task = members[0]
        if not run.method.family.keeps_base:
            yield folder, *load_run(folder, words)
            continue
        backbone = load_base(run, task)
        switch = AdapterSwitch(backbone.model, backbone.tokenizer, base_run(run))
        for folder, run, _ in members:
            check_base(folder, backbone)
            adapters = switch.load(str(folder), folder, run)
            switch.use(str(folder))
            yield folder, run, backbone, adapters
            switch.remove(str(folder))


def _check_kind(folder: Path, task: Task) -> None:
    trained = read_run(folder)
    was = trained.make_task()
    if (task.kind, task.num_labels) != (was.kind, was.num_labels):
        raise UserError(
            f"eval: the task must be of the kind trained on, got task={task.name} ({task.kind}, {task.num_labels} "
            f"labels) for an adapter of {was.name} ({was.kind}, {was.num_labels} labels)"
        )
