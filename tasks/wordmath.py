"""wordmath: generated arithmetic word problems with a short worked answer, the default task.

Source: none but this file; every problem is drawn from a seed. Licence: the project's own.
One record: "Ben has 4 boxes with 6 shells in each and 5 loose shells. How many shells does Ben have in all? Show each
step, then end with "The answer is" and the number." -> "4 * 6 = 24. 24 + 5 = 29. The answer is 29."
Metric: exact-answer accuracy in percent, higher is better. Decoding is the protocol's.

There are 13 families of problems with one or two operations. The split of a problem is decided by a hash of its whole
computation ("4*6=24;24+5=29", operands of + and * sorted), so a computation, and with it a question, lives in exactly
one of train, validation and test, whatever the seed or the size asked for. Single steps are shared on purpose: 4*6 may
occur in training and inside a longer test problem. Only `Random.random()` and sha256 are used, whose results are the
same on every machine and Python version.
"""

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from highrank.plugin import Example, Task, UserError, register_task

SPLITS = ("train", "validation", "test")
REQUEST = ' Show each step, then end with "The answer is" and the number.'

_GIRLS = ("Ana", "Mia", "Lucy", "Emma", "Nora", "Rosa", "Ella", "Kate", "Sara", "Julia", "Alice", "Maria")
_BOYS = ("Tom", "Ben", "Sam", "Leo", "Jack", "Omar", "Paul", "Adam", "Luke", "David", "Peter", "Mark")
# Every count of things is at least 2, so only plurals are needed for counted nouns.
_THINGS = (
    "apples",
    "marbles",
    "stickers",
    "pencils",
    "coins",
    "cards",
    "shells",
    "buttons",
    "oranges",
    "beads",
    "stamps",
    "cookies",
    "stones",
    "candies",
    "peaches",
    "crayons",
)
_BOXES = (("box", "boxes"), ("bag", "bags"), ("basket", "baskets"), ("tin", "tins"), ("tray", "trays"))
_GOODS = (
    ("book", "books"),
    ("pen", "pens"),
    ("toy", "toys"),
    ("ticket", "tickets"),
    ("cake", "cakes"),
    ("plant", "plants"),
    ("cup", "cups"),
    ("brush", "brushes"),
)


class _Draw:
    """Random choices built on Random.random() alone."""

    def __init__(self, seed_text):
        digest = hashlib.sha256(seed_text.encode("utf-8")).digest()
        self._rng = random.Random(int.from_bytes(digest[:8], "big"))

    def int(self, low, high):
        """An integer from low to high, both included."""
        return low + int(self._rng.random() * (high - low + 1))

    def one(self, items):
        return items[self.int(0, len(items) - 1)]

    def shuffled(self, items):
        items = list(items)
        for i in range(len(items) - 1, 0, -1):
            j = self.int(0, i)
            items[i], items[j] = items[j], items[i]
        return items

    def person(self):
        """(name, subject pronoun)"""
        return (self.one(_GIRLS), "She") if self.int(0, 1) else (self.one(_BOYS), "He")

    def two_names(self):
        first, second = self.shuffled(_GIRLS + _BOYS)[:2]
        return first, second


def _apply(x, op, y):
    if op == "+":
        return x + y
    if op == "-":
        return x - y
    if op == "*":
        return x * y
    assert op == "/"
    assert x % y == 0
    return x // y


# --- families: each returns (question, [(x, op, y), ...]) ------------------------


def _add(d):
    a, b = d.int(3, 20), d.int(3, 20)
    p, q = d.two_names()
    t = d.one(_THINGS)
    question = d.one(
        (
            f"{p} has {a} {t} and {q} has {b} {t}. How many {t} do they have together?",
            f"{p} collected {a} {t} on Monday and {b} {t} on Tuesday. How many {t} did {p} collect in all?",
            f"{p} had {a} {t}. Then {q} gave {p} {b} more. How many {t} does {p} have now?",
        )
    )
    return question, [(a, "+", b)]


def _sub(d):
    a = d.int(5, 20)
    b = d.int(2, a - 2)
    p, q = d.two_names()
    t = d.one(_THINGS)
    question = d.one(
        (
            f"{p} had {a} {t} and gave {b} of them to {q}. How many {t} does {p} have left?",
            f"There were {a} {t} on the table. {p} took {b} of them. How many {t} are still on the table?",
            f"{p} had {a} {t} but lost {b} of them. How many {t} remain?",
        )
    )
    return question, [(a, "-", b)]


def _compare(d):
    b = d.int(2, 10)
    a = b + d.int(2, 10)
    p, q = d.two_names()
    t = d.one(_THINGS)
    question = d.one(
        (
            f"{p} has {a} {t} and {q} has {b} {t}. How many more {t} does {p} have than {q}?",
            f"{p} found {a} {t}. {q} found {b} {t}. How many more {t} did {p} find than {q}?",
            f"{p} wants {a} {t} but has only {b} {t}. How many more {t} does {p} need?",
        )
    )
    return question, [(a, "-", b)]


def _mul(d):
    a, b = d.int(2, 9), d.int(2, 10)
    p, _ = d.two_names()
    t = d.one(_THINGS)
    box, boxes = d.one(_BOXES)
    question = d.one(
        (
            f"{p} has {a} {boxes} with {b} {t} in each {box}. How many {t} does {p} have?",
            f"Each {box} holds {b} {t}. How many {t} are there in {a} {boxes}?",
            f"{p} reads {b} pages every day. How many pages does {p} read in {a} days?",
        )
    )
    return question, [(a, "*", b)]


def _div(d):
    a, b = d.int(2, 9), d.int(2, 10)
    p, _ = d.two_names()
    t = d.one(_THINGS)
    box, boxes = d.one(_BOXES)
    question = d.one(
        (
            f"{p} shares {a * b} {t} equally among {a} friends. How many {t} does each friend get?",
            f"{p} packs {a * b} {t} into {boxes} of {a}. How many {boxes} does {p} fill?",
            f"{a * b} {t} are split equally between {a} {boxes}. How many {t} are in each {box}?",
        )
    )
    return question, [(a * b, "/", a)]


def _mul_add(d):
    a, b, c = d.int(2, 6), d.int(2, 10), d.int(2, 10)
    p, she = d.person()
    t = d.one(_THINGS)
    _, boxes = d.one(_BOXES)
    question = d.one(
        (
            f"{p} has {a} {boxes} with {b} {t} in each and {c} loose {t}. How many {t} does {p} have in all?",
            f"{p} buys {a} {boxes} of {b} {t}. {she} already had {c} {t}. How many {t} does {p} have now?",
            f"{p} earns ${b} an hour and works {a} hours. {she} also gets a tip of ${c}. How many dollars does {p} get?",
        )
    )
    return question, [(a, "*", b), (a * b, "+", c)]


def _mul_sub(d):
    a, b = d.int(2, 6), d.int(3, 10)
    c = d.int(2, min(10, a * b - 2))
    p, she = d.person()
    t = d.one(_THINGS)
    _, boxes = d.one(_BOXES)
    question = d.one(
        (
            f"{p} has {a} {boxes} with {b} {t} in each. {she} gives away {c} {t}. How many {t} are left?",
            f"{p} picks {b} {t} a day for {a} days and then sells {c} of them. How many {t} does {p} still have?",
            f"A room has {a} rows of {b} seats. {c} seats are taken. How many seats are free?",
        )
    )
    return question, [(a, "*", b), (a * b, "-", c)]


def _change(d):
    a, b = d.int(2, 6), d.int(2, 8)
    c = d.one([note for note in (20, 50) if note > a * b + 1])
    p, she = d.person()
    good, goods = d.one(_GOODS)
    question = d.one(
        (
            f"{p} buys {a} {goods} at ${b} each and pays with ${c}. How many dollars of change does {p} get?",
            f"A {good} costs ${b}. {p} has ${c} and buys {a} {goods}. How many dollars does {p} have left?",
            f"{p} had ${c}. {she} bought {a} {goods} for ${b} each. How much money, in dollars, is left?",
        )
    )
    return question, [(a, "*", b), (c, "-", a * b)]


def _add_sub(d):
    a, b = d.int(3, 15), d.int(2, 10)
    c = d.int(2, min(10, a + b - 2))
    p, she = d.person()
    t = d.one(_THINGS)
    question = d.one(
        (
            f"{p} had {a} {t}. {she} found {b} more and then gave away {c}. How many {t} does {p} have now?",
            f"A shop had {a} {t} and got {b} more. Then {c} were sold. How many {t} are left in the shop?",
            f"A bus had {a} people on it. {b} people got on and {c} got off. How many people are on the bus?",
        )
    )
    return question, [(a, "+", b), (a + b, "-", c)]


def _sub_add(d):
    a = d.int(6, 20)
    b, c = d.int(2, min(10, a - 2)), d.int(2, 10)
    p, she = d.person()
    t = d.one(_THINGS)
    question = d.one(
        (
            f"{p} had {a} {t}. {she} lost {b} of them and later bought {c} more. How many {t} does {p} have now?",
            f"{p} had ${a}. {she} spent ${b} and then earned ${c}. How many dollars does {p} have now?",
            f"A jar held {a} {t}. {p} took out {b} and put in {c} new ones. How many {t} are in the jar?",
        )
    )
    return question, [(a, "-", b), (a - b, "+", c)]


def _more_total(d):
    a, b = d.int(3, 15), d.int(2, 10)
    p, q = d.two_names()
    t = d.one(_THINGS)
    question = d.one(
        (
            f"{p} has {a} {t}. {q} has {b} more {t} than {p}. How many {t} do they have together?",
            f"{p} made {a} {t} on Friday and {b} more than that on Saturday. How many {t} did {p} make in all?",
            f"{p} found {a} {t} and {q} found {b} more than {p}. How many {t} did they find in total?",
        )
    )
    return question, [(a, "+", b), (a, "+", a + b)]


def _times_total(d):
    a, b = d.int(2, 10), d.int(2, 5)
    p, q = d.two_names()
    t = d.one(_THINGS)
    question = d.one(
        (
            f"{p} has {a} {t}. {q} has {b} times as many. How many {t} do they have together?",
            f"{p} sold {a} {t} in May and {b} times as many in June. How many {t} did {p} sell in all?",
            f"{p} owns {a} {t}. {q} owns {b} times as many {t} as {p}. How many {t} are there altogether?",
        )
    )
    return question, [(b, "*", a), (a, "+", a * b)]


def _sub_div(d):
    a, b, c = d.int(2, 6), d.int(2, 8), d.int(2, 9)
    total = a * b + c
    p, she = d.person()
    t = d.one(_THINGS)
    box, boxes = d.one(_BOXES)
    question = d.one(
        (
            f"{p} has {total} {t}. {she} keeps {c} and shares the rest equally among {a} friends. How many {t} does each friend get?",
            f"{p} had {total} {t} and lost {c}. {she} put the rest equally into {a} {boxes}. How many {t} are in each {box}?",
            f"{p} baked {total} rolls and ate {c}. The rest went into {boxes} of {a}. How many {boxes} were filled?",
        )
    )
    return question, [(total, "-", c), (a * b, "/", a)]


FAMILIES = (
    _add,
    _sub,
    _compare,
    _mul,
    _div,
    _mul_add,
    _mul_sub,
    _change,
    _add_sub,
    _sub_add,
    _more_total,
    _times_total,
    _sub_div,
)


# --- splits -----------------------------------------------------------------------

_STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)\.")


def computation(output):
    """The whole computation of a worked answer, in a canonical form."""
    steps = []
    for x, op, y, z in _STEP.findall(output):
        if op in "+*" and int(x) > int(y):
            x, y = y, x
        steps.append(f"{x}{op}{y}={z}")
    return ";".join(steps)


def split_of(output):
    """The only split this worked answer may occur in: 70 % train, 15 % val, 15 % test."""
    digest = hashlib.sha256(computation(output).encode("ascii")).digest()
    bucket = int.from_bytes(digest[:4], "big") % 100
    return "train" if bucket < 70 else "validation" if bucket < 85 else "test"


def generate(split: str, n: int, seed: int) -> list[Example]:
    """Returns n distinct problems of one split; a shorter list is a prefix of a longer one.

    Raises:
        UserError: if the split does not hold n distinct problems.
    """
    draw = _Draw(f"wordmath/{split}/{seed}")
    examples: list[Example] = []
    questions: set[str] = set()
    computations: set[str] = set()
    while len(examples) < n:
        for family in draw.shuffled(FAMILIES):
            for attempt in range(2000):
                question, steps = family(draw)
                answer = _apply(*steps[-1])
                output = " ".join(f"{x} {op} {y} = {_apply(x, op, y)}." for x, op, y in steps)
                output += f" The answer is {answer}."
                if split_of(output) != split or question in questions:
                    continue
                key = computation(output)
                if key in computations and attempt < 100:  # new numbers while there are any
                    continue
                break
            else:
                raise UserError(f"wordmath: the {split} split holds fewer distinct problems, got n={n}")
            questions.add(question)
            computations.add(key)
            examples.append(Example(f"{split}-{seed}-{len(examples)}", question + REQUEST, output, str(answer)))
    return examples[:n]


@dataclass(frozen=True, kw_only=True)
class WordMathConfig:
    n_train: int = 512
    """Training problems."""
    n_test: int = 200
    """Held-out problems."""
    data_seed: int = 0
    """Seed of the problems; the run's seed only orders them."""

    def __post_init__(self) -> None:
        for key in ("n_train", "n_test"):
            if getattr(self, key) < 1:
                raise UserError(f"wordmath: {key} must be >= 1, got {key}={getattr(self, key)}")


@register_task(config=WordMathConfig)
class WordMath(Task):
    kind = "generate"
    family = "math"
    version = 2
    max_new_tokens = 32

    def train(self) -> Sequence[Example]:
        return generate("train", self.cfg.n_train, self.cfg.data_seed)

    def test(self) -> Mapping[str, Sequence[Example]]:
        return {"wordmath": generate("test", self.cfg.n_test, self.cfg.data_seed)}

    def sources(self) -> list[dict[str, Any]]:
        sets = {"wordmath/train": self.train(), **{f"{name}/test": rows for name, rows in self.test().items()}}
        return [{"name": name, "rows": len(rows), "sha256": _fingerprint(rows)} for name, rows in sets.items()]


def _fingerprint(rows: Sequence[Example]) -> str:
    lines = (json.dumps([row.instruction, row.output, row.answer]) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
