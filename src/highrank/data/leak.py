"""The leak audit: which test questions occur in the training data."""

import re
import warnings
from collections.abc import Sequence
from typing import Any


def normalise(text: str) -> str:
    """Returns a text's words and numbers in lower case: spacing, punctuation and case do not make a new question.

    A comma inside a number does: of SingleEq's 508 questions 416 occur in MAWPS, 436 if "3,884" is taken as "3884".
    """
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def questions(records: Sequence[Any]) -> set[str]:
    """Returns the normalised questions of some examples."""
    return {normalise(record.question) for record in records}


def found(records: Sequence[Any], known: set[str]) -> list[bool]:
    """Returns per example whether its question is among the known ones."""
    return [normalise(record.question) in known for record in records]


def warn_if_trained_on(name: str, leaked: Sequence[bool | None]) -> None:
    """Warns if the whole test set was in the training data: then it is the training data."""
    if leaked and all(leaked):
        warnings.warn(
            f"leak audit: all {len(leaked)} questions of {name} occur in the training data; was a test file given as "
            "training data?",
            stacklevel=2,
        )
