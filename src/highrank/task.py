"""The contract of a task: data, and how a model's output is scored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal


@dataclass(frozen=True)
class Example:
    """One instruction with its worked target and its answer, for tasks that generate text."""

    id: str
    instruction: str
    output: str
    """What the model learns to write."""
    answer: str
    """What scoring compares with."""


@dataclass(frozen=True)
class LabelledText:
    """One text, or pair of texts, with a class index or a real-valued label."""

    id: str
    text: str
    label: float
    text_pair: str | None = None


Record = Example | LabelledText


class Task:
    """One data set family with its scorer; subclasses live in `tasks/` under `@register_task`."""

    name: ClassVar[str]
    config: ClassVar[type]
    kind: ClassVar[Literal["generate", "classify", "regress"]]
    version: ClassVar[int]
    """Raised whenever the data, the prompt or the scoring change."""
    metric: ClassVar[str]
    """Name of the headline metric, in percent, higher is better."""
    num_labels: int = 1
    """Classes to tell apart, for kind "classify"."""
    max_new_tokens: int = 64
    """Longest output in tokens, for kind "generate"."""

    def __init__(self, cfg: Any, seed: int):
        self.cfg, self.seed = cfg, seed

    def train(self) -> Sequence[Any]:
        """Returns the training examples."""
        raise NotImplementedError

    def test(self) -> Mapping[str, Sequence[Any]]:
        """Returns the held-out sets by name."""
        raise NotImplementedError

    def sources(self) -> list[dict[str, Any]]:
        """Returns, per file or generator read: name, sha256 and rows."""
        raise NotImplementedError

    def extract(self, text: str) -> str | None:
        """Returns the answer in a generated text, or None if there is none. A pure function."""
        raise NotImplementedError

    def is_correct(self, answer: str | None, example: Any) -> bool:
        """Returns whether an extracted answer counts as right."""
        raise NotImplementedError
