"""jsonl: your own instruction data, one example per line.

`task=jsonl task.train=my_train.jsonl task.test=my_test.jsonl`; json, tsv and parquet will do as well, plain or `.gz`.
Paths are relative to the working directory. Fields: instruction, output, and if there are any input, answer, id; other
names through `task.fields={instruction: question, output: reply}`. Without an answer the output is the answer.
One record: {"instruction": "Name the capital of France.", "output": "Paris"}.
Conversations: messages, a list of {role, content} that ends with the assistant's turn, in the tokenizer's chat template with
the loss on what the assistant says. prompt and completion: as instruction and output where they are texts, a conversation
with the loss on the completion where they are lists of messages.
Metric: accuracy in percent. With `task.choices=[yes,no]` the answer is one of these, else it is a number if the gold
answer is one, else the whole text, compared without case.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from highrank.plugin import (
    DataConfig,
    Example,
    FileTask,
    Source,
    UserError,
    as_text,
    messages_of,
    path_field,
    register_task,
    shown,
    text_of,
)

FIELDS = ("instruction", "input", "output", "answer", "id", "messages", "prompt", "completion")


@dataclass(frozen=True, kw_only=True)
class JsonlConfig(DataConfig):
    train: str = path_field("")
    """File to train on."""
    test: str = path_field("")
    """File to test on."""
    fields: dict[str, str] = field(default_factory=dict)
    """What the file calls a field, where it differs."""
    choices: list[Any] = field(default_factory=list)
    """The answers to choose from, if every question has the same, as the file writes them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            object.__setattr__(self, "choices", [as_text(choice, "choices") for choice in self.choices])
        except ValueError as error:
            raise UserError(f"task jsonl: {error}") from error
        for name in self.fields:
            if name not in FIELDS:
                raise UserError(f"task jsonl: a field is one of {', '.join(FIELDS)}, got fields.{name}")


@register_task(config=JsonlConfig)
class Jsonl(FileTask):
    kind = "generate"
    family = "instruction"
    version = 2
    max_new_tokens = 256
    num_train = None

    @property
    def _root(self) -> Path:  # type: ignore[override]  # a property where a task has an attribute
        return Path("/")

    def train_parts(self) -> Mapping[str, Source]:
        return {"train": self._source(self.cfg.train)}

    def test_parts(self) -> Mapping[str, Source]:
        return {"test": self._source(self.cfg.test)}

    def _source(self, file: str) -> Source:
        return Source((str(Path(file).resolve().relative_to("/")),), "see tasks/jsonl.py for the format")

    def load(self, source: Source, part: str) -> list[Any]:
        file = getattr(self.cfg, part)
        if not Path(file).is_file():
            raise UserError(f"task jsonl: {part} must be an existing file, got task.{part}={shown(file)!r}")
        return super().load(source, part)

    def sources(self) -> list[dict[str, Any]]:
        return [{**source, "name": f"/{source['name']}"} for source in super().sources()]

    def record(self, row: Any, part: str, record_id: str) -> Example:
        names = {name: self.cfg.fields.get(name, name) for name in FIELDS}
        messages: tuple[tuple[str, str], ...] = ()
        read = 0
        if row.get(names["messages"]) is not None:
            messages, output = _conversation(names["messages"], messages_of(row[names["messages"]], names["messages"]))
        elif names["instruction"] in row or names["prompt"] not in row:
            instruction, output = (text_of(row, names[name]) for name in ("instruction", "output"))
        elif isinstance(row[names["prompt"]], list):
            before, behind = (messages_of(row[names[name]], names[name]) for name in ("prompt", "completion"))
            messages, output = _conversation(names["completion"], (*before, *behind))
            read = len(before)
        else:
            instruction, output = (text_of(row, names[name]) for name in ("prompt", "completion"))
        if messages:
            instruction = "\n".join(content for _, content in messages)
        given = {name: text_of(row, names[name], "") for name in ("input", "answer", "id")}
        if messages and given["input"]:
            raise ValueError(f"{names['input']} goes into a message, got {names['input']}={given['input'][:80]!r}")
        answer = given["answer"] or output
        choices = tuple(self.cfg.choices)
        if choices and answer not in choices:
            raise ValueError(f"answer must be one of {', '.join(choices)}, got answer={answer!r}")
        example = Example(given["id"] or record_id, instruction, output, answer, given["input"], choices, choices)
        return replace(example, messages=messages, given=read)


def _conversation(name: str, turns: tuple[tuple[str, str], ...]) -> tuple[tuple[tuple[str, str], ...], str]:
    """Returns the turns before the answer, and the answer."""
    if turns[0][0] == "assistant" or turns[-1][0] != "assistant" or len(turns) < 2:
        roles = ", ".join(role for role, _ in turns)
        raise ValueError(f"{name} must begin with another's turn and end with the assistant's, got {roles}")
    return turns[:-1], turns[-1][1]
