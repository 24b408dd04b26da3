"""The contract of a task: data, and how a model's output is scored."""

import dataclasses
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

from highrank.base.errors import UserError, suggest
from highrank.base.files import path_field
from highrank.base.shapes import amount, plain, shaped
from highrank.data.sources import MissingData, Source, SourceTable, as_text, data_folder, find, read


@dataclass(frozen=True)
class Example:
    """One instruction with its worked target and its answer, for tasks that generate text."""

    id: str
    instruction: str
    output: str
    """What the model learns to write."""
    answer: str
    """What scoring compares with: one of `choices`, a number, or a text."""
    input: str = ""
    """Context of the instruction, for templates with a place for it."""
    choices: tuple[str, ...] = ()
    """The words that an answer is looked for among."""
    options: tuple[str, ...] = ()
    """The targets that likelihood ranking compares, one per answer in `choices`; fewer if the question has fewer."""
    references: tuple[str, ...] = ()
    """Every accepted output, where there are several."""
    messages: tuple[tuple[str, str], ...] = ()
    """A conversation, as (role, content), that `output` answers as the assistant, in the tokenizer's chat template; then
    `instruction` is what was said in it."""
    answers: tuple[str, ...] = ()
    """All that is asked for, where that is a list: an output is right if it holds these and nothing else, in any order."""
    given: int = 0
    """How many of the messages are only read; the assistant's turns among the others are learned like the answer."""

    @property
    def question(self) -> str:
        return f"{self.instruction} {self.input}"


@dataclass(frozen=True)
class LabelledText:
    """One text, or pair of texts, with a class index or a real-valued label."""

    id: str
    text: str
    label: float
    text_pair: str | None = None

    @property
    def question(self) -> str:
        return f"{self.text} {self.text_pair or ''}"


@dataclass(frozen=True)
class LabelledImage:
    """One image with a class index."""

    id: str
    image: Any
    """The path of a file, read when the image is asked for, or a `PIL.Image.Image`."""
    label: int
    sha256: str
    """Of the file, or of the pixels of an image without one."""

    @property
    def question(self) -> str:
        """By what the same image is known again."""
        return self.sha256


Record = Example | LabelledText | LabelledImage
TEXTS = {"id", "instruction", "output", "answer", "input", "text"}
"""What is a text in every record."""


Kind = Literal["generate", "classify", "regress", "classify_images"]
"""What a model is asked for: to write a text, the class of a text, a number for a text, the class of an image."""
MEASURED = ("accuracy", "matthews", "f1", "pearson", "spearman")
"""Metrics that need no `measure` of the task's own."""


class Task:
    """One data set family with its scorer; subclasses live in `tasks/` under `@register_task`.

    A config with a field `member` lets `task=<name>/<member>` choose one set of the family, which then names the run.
    """

    name: ClassVar[str]
    config: ClassVar[type]
    kind: Kind
    family: ClassVar[str]
    """Under which heading a protocol treats it, e.g. math: the `families` of its YAML."""
    version: ClassVar[int]
    """Raised whenever the data or the scoring change."""
    metrics: tuple[str, ...] = ("accuracy",)
    """What is measured, in percent, higher is better; the first is the headline."""
    num_labels: int = 1
    """Classes to tell apart, for kinds "classify" and "classify_images"."""
    max_new_tokens: int = 64
    """Longest output in tokens where the protocol does not say, for kind "generate"."""
    num_train: int | None = None
    """Training examples, known without the data."""
    longest: int | None = None
    """Most tokens of an example, its prompt with room for an answer, where the task's examples have a length in tokens."""
    tokens: Callable[[Example], int] | None = None
    """How many tokens an example has, prompt and room for an answer, in the run's protocol and tokenizer; None before the
    tokenizer is there, in a plan. For tasks whose examples have a length: `train()` and `test()` go by it."""
    examples: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    """Fields that show what the task can do: the tests run over them, on what rows they have."""

    def __init__(self, cfg: Any, seed: int):
        self.cfg, self.seed = cfg, seed

    @classmethod
    def check_class(cls) -> None:
        """Raises UserError for the first thing of the class that is not what the contract says."""
        if not (inspect.isclass(cls.config) and dataclasses.is_dataclass(cls.config)):
            raise UserError(f"task {cls.name}: its config is a dataclass, got config={cls.config!r}; decorate it")
        for name in ("family", "version", "train", "test", "sources"):
            if not any(name in vars(base) for base in cls.__mro__ if base is not Task):
                raise UserError(f"task {cls.name}: the class must define {name}, got none in {cls.__qualname__}")
        texts = isinstance(cls.family, str) and cls.family
        _need(cls, bool(texts), "family", 'is a text, as "math"')
        _need(cls, isinstance(cls.version, int) and cls.version >= 1, "version", "is a whole number >= 1")
        listed = (
            isinstance(cls.examples, Sequence) and cls.examples and all(isinstance(e, Mapping) for e in cls.examples)
        )
        _need(cls, bool(listed), "examples", "is a tuple of at least one mapping of fields, as ({},)")

    def check(self) -> None:
        """Raises UserError for the first thing of the task, made with its config, that is not what the contract says."""
        kinds = get_args(Kind)
        _need(self, getattr(self, "kind", None) in kinds, "kind", f"is one of {', '.join(kinds)}")
        metrics = self.metrics
        named = isinstance(metrics, tuple) and metrics and all(isinstance(name, str) for name in metrics)
        _need(self, bool(named), "metrics", 'is a tuple of names, as ("accuracy",)')
        own = [name for name in metrics if name not in MEASURED]
        if own and type(self).measure is Task.measure:
            raise UserError(
                f"task {self.name}: unknown metric, got metrics with {own[0]}; define it in `measure`, or take of "
                f"{', '.join(MEASURED)}"
            )
        classes = not self.kind.startswith("classify") or (isinstance(self.num_labels, int) and self.num_labels >= 2)
        _need(self, classes, "num_labels", "is a whole number >= 2 for classes")

    @property
    def metric(self) -> str:
        return self.metrics[0]

    def measure(self, name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Returns the numbers that one of `metrics` stands for, by name, where it is the task's own; `rows` are those of
        the predictions file."""
        raise UserError(f"task {self.name}: unknown metric, got metrics with {name}; define it in `measure`")

    def group(self, name: str) -> str:
        """Returns under which name a test set is averaged with others, "" where only all are averaged."""
        return ""

    @property
    def has_data(self) -> bool:
        """Whether `train()` can be answered from this machine."""
        return True

    def train(self) -> Sequence[Any]:
        """Returns the training examples."""
        raise NotImplementedError

    def test(self) -> Mapping[str, Sequence[Any]]:
        """Returns the held-out sets by name."""
        raise NotImplementedError

    def sources(self) -> list[dict[str, Any]]:
        """Returns, per file or generator read: name, sha256 and rows."""
        raise NotImplementedError


def _need(task: Any, ok: bool, attribute: str, rule: str) -> None:
    if not ok:
        raise UserError(f"task {task.name}: {attribute} {rule}, got {attribute}={getattr(task, attribute, None)!r}")


def sources_of(task: Task) -> list[dict[str, Any]]:
    """Returns what the task says that it read.

    Raises:
        UserError: if that is not what the contract says.
    """
    stated = task.sources()
    try:
        found: list[dict[str, Any]] = shaped(stated, [{"name": str, "rows": amount, "sha256": str, ...: plain}])
    except ValueError as error:
        raise UserError(
            f"task {task.name}: sources() returns a list of mappings with name, rows and sha256, got {error}"
        ) from error
    return found


@contextmanager
def reading(task: Task) -> Iterator[None]:
    """Within it a task's data is read: a file that is not there is a UserError with its name, whatever the task raises."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"task {task.name}: a file must exist, got {error.filename}") from error


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Fields that every task with files has.

    A field that names a file or folder is a `path_field`. Values are checked here; files are looked at when they are read.
    """

    data: str | None = path_field(None)
    """Folder with the files; default: $HIGHRANK_DATA, else the Hugging Face Hub."""
    revision: str | None = None
    """Commit, tag or branch on the Hub."""
    sets: list[str] | None = None
    """Which test sets are evaluated; default: all."""
    n_train: int | None = None
    """Training examples, drawn at random; default: all."""
    n_test: int | None = None
    """Examples per test set, drawn at random; default: all."""
    data_seed: int = 0
    """Seeds what n_train and n_test draw."""
    allow_partial: bool = False
    """Whether missing files, or row counts other than the published ones, are recorded instead of refused."""

    def __post_init__(self) -> None:
        for key in ("n_train", "n_test"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise UserError(f"task: {key} must be >= 1, got {key}={getattr(self, key)}")


def one_of(owner: str, key: str, value: str, known: Sequence[str]) -> None:
    """Raises UserError unless `value` is known."""
    if value not in known:
        raise UserError(f"{owner}: unknown {key}, got {key}={value}{suggest(value, known)}")


class FileTask(Task):
    """A task whose sets are files. A subclass names them; reading, checking, sampling and recording are done here."""

    folders: ClassVar[tuple[str, ...]] = ("",)
    """Folders inside the data folder in which its files may lie, in the order in which they are looked for."""

    def train_parts(self) -> Mapping[str, Source]:
        """Returns the training set's parts by name; each record knows the part that it came from."""
        raise NotImplementedError

    def test_parts(self) -> Mapping[str, Source]:
        """Returns the test sets by name."""
        raise NotImplementedError

    def record(self, row: Any, part: str, record_id: str) -> Record:
        """Returns one example of `part`. A KeyError or ValueError is reported with file, row and field."""
        raise NotImplementedError

    def records(self, rows: Sequence[Any], part: str) -> list[Any]:
        """Returns the examples of one part; override where rows and examples are not one to one."""
        return [self._record(row, part, i) for i, row in enumerate(rows, start=1)]

    def _record(self, row: Any, part: str, i: int) -> Record:
        try:
            example = self.record(row, part, f"{part}-{i}")
            for name in TEXTS & vars(example).keys():
                as_text(getattr(example, name), name)
            return example
        except KeyError as error:
            raise UserError(f"row {i} must have the field {error}, got {', '.join(row)}") from error
        except (ValueError, TypeError) as error:
            raise UserError(f"row {i}: {error}") from error

    @cached_property
    def _root(self) -> Any:
        return data_folder(self.cfg.data)

    @cached_property
    def _read(self) -> dict[Source, tuple[SourceTable, list[Any]]]:
        return {}

    @cached_property
    def _noted(self) -> dict[str, dict[str, Any]]:
        return {}

    def load(self, source: Source, part: str) -> list[Any]:
        """Returns the examples of one source, its count checked and noted; with allow_partial a missing one is empty."""
        key = f"{part}: {source.paths[0]}"
        try:
            table = read(source, self._root, self.cfg.revision, self.folders)
        except MissingData:
            if not self.cfg.allow_partial:
                raise
            self._noted[key] = {"name": source.paths[0], "sha256": None, "rows": 0, "expected": source.rows}
            return []
        try:
            examples = self.records(table.rows, part)
        except ValueError as error:
            raise UserError(f"task {self.name}: {error} in {table.location}; {source.get}") from error
        if not examples:
            raise UserError(
                f"task {self.name}: {part} must hold an example, got none in {table.location}; {source.get}"
            )
        if source.rows is not None and len(examples) != source.rows and not self.cfg.allow_partial:
            raise UserError(
                f"task {self.name}: {part} must have its published {source.rows} rows, got {len(examples)} in "
                f"{table.location}; {source.get}, or go on without: task.allow_partial=true"
            )
        noted = {"name": table.name, "sha256": table.sha256, "rows": len(examples)}
        self._noted[key] = noted | ({} if source.rows in (None, len(examples)) else {"expected": source.rows})
        return self._unique(examples, table)

    def _unique(self, examples: list[Any], table: SourceTable) -> list[Any]:
        seen: set[str] = set()
        for example in examples:
            if example.id in seen:
                raise UserError(f"task {self.name}: ids must be distinct, got {example.id!r} twice in {table.location}")
            seen.add(example.id)
        return examples

    def _sample(self, examples: list[Any], n: int | None, name: str) -> list[Any]:
        if n is None or n >= len(examples):
            return examples
        places = random.Random(f"{self.cfg.data_seed}/{name}").sample(range(len(examples)), n)
        return [examples[i] for i in sorted(places)]

    def wanted(self, example: Any) -> bool:
        """Whether an example of the training files is trained on; override to leave some out."""
        return True

    @cached_property
    def _train(self) -> list[Any]:
        examples = [example for part, source in self.train_parts().items() for example in self.load(source, part)]
        wanted = [example for example in examples if self.wanted(example)]
        if not wanted:
            raise MissingData(f"task {self.name}: a training set is needed, got none of {len(examples)} examples")
        return self._sample(wanted, self.cfg.n_train, "train")

    @cached_property
    def _test(self) -> dict[str, list[Any]]:
        parts = self.test_parts()
        for name in self.cfg.sets or ():
            one_of(f"task {self.name}", "sets", name, list(parts))
        wanted = {name: parts[name] for name in self.cfg.sets or parts}
        loaded = {name: self._sample(self.load(source, name), self.cfg.n_test, name) for name, source in wanted.items()}
        sets = {name: examples for name, examples in loaded.items() if examples}
        if not sets:
            raise MissingData(f"task {self.name}: a test set is needed, got none of {', '.join(wanted)}")
        return sets

    def has_file(self, source: Source) -> bool:
        """Whether the data folder has the file of a source."""
        return self._root is not None and find(source, self._root, self.folders) is not None

    @property
    def has_data(self) -> bool:
        return self._root is not None and all(map(self.has_file, self.train_parts().values()))

    @property
    def published(self) -> int | None:
        """Published number of training examples."""
        parts = self.train_parts().values()
        counts = [source.rows for source in parts if source.rows is not None]
        return sum(counts) if len(counts) == len(parts) else None

    @property
    def num_train(self) -> int | None:  # type: ignore[override]  # a property where a task has an attribute
        known = [n for n in (self.published, self.cfg.n_train) if n is not None]
        return min(known) if known else None

    def train(self) -> Sequence[Any]:
        return self._train

    def test(self) -> Mapping[str, Sequence[Any]]:
        return self._test

    def sources(self) -> list[dict[str, Any]]:
        self.train()
        self.test()
        return list(self._noted.values())


def label_of(value: Any, names: Sequence[str]) -> int:
    """Returns the class index of a label given as a name or an index.

    Raises:
        ValueError: if it is neither.
    """
    text = str(value)
    if text in names:
        return names.index(text)
    if text.isdigit() and int(text) < len(names):
        return int(text)
    raise ValueError(f"label must be one of {', '.join(names)} or an index below {len(names)}, got label={value!r}")
