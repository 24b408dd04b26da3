"""ruler: generated long texts that hide what is asked for: does an adapter still find it, and beyond the lengths it saw?

Source: none but this file; every example is drawn from a seed. Licence: the project's own. The kinds are those of RULER
(Hsieh et al. 2024, arXiv 2404.06654) in words of our own: the numbers do not compare with RULER's.

    single         one hidden sentence: "The code of amber is 48213."      which code?        one number
    multikey       several keys, each with its code                        the code of one    one number
    multivalue     one key with several codes                              all its codes      numbers
    variables      "Let brook = 48213." "Let cedar = brook." ...           which names hold a number?    names
    common_words   a list of words, a few of them three times as often     the most common    words
    two_hop        "Mia works with Tom." "Tom lives in Oslo."              where does Mia's colleague live?    a town

One record: the text, then the question, then how to answer; the answer alone is learned and asked for.
Metric: accuracy in percent, which is exact match: of several answers all, none else, in any order. Decoding is the protocol's.

A length is in tokens of the run's tokenizer: the prompt in the protocol's template with room for the longest answer takes
at most so many, and but for one sentence so many. Before the tokenizer is there (in a plan) it is four characters per token.
An example's question, answers and order follow from its seed, kind, length and number; the tokenizer decides only how much
filling stands between them. Training and test codes differ in parity, and no example occurs twice.
"""

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from highrank.plugin import Example, Task, UserError, one_of, register_task

KINDS = ("single", "multikey", "multivalue", "variables", "common_words", "two_hop")
KEYS = (
    *("amber", "birch", "copper", "dune", "ember", "fern", "granite", "harbor", "iris", "jade", "kelp", "linen"),
    *("maple", "north", "olive", "pearl", "quartz", "reed", "silver", "tulip", "umber", "velvet", "willow", "zinc"),
)
NAMES = (
    *("Ana", "Ben", "Carl", "Dora", "Emma", "Finn", "Gina", "Hugo", "Ida", "Jack", "Kate", "Leo"),
    *("Mia", "Nora", "Omar", "Paul", "Rosa", "Sam", "Tom", "Uma", "Vera", "Will", "Yara", "Zoe"),
)
TOWNS = ("Athens", "Berlin", "Cairo", "Delhi", "Geneva", "Lima", "Madrid", "Oslo", "Paris", "Rome", "Tokyo", "Vienna")
WORDS = (
    *("apple", "bread", "chair", "door", "engine", "flower", "glass", "hammer", "island", "jacket", "kettle", "lamp"),
    *("mirror", "needle", "ocean", "paper", "queen", "river", "stone", "table", "uncle", "valley", "window", "yard"),
    *("basket", "candle", "desert", "eagle", "forest", "garden", "hotel", "insect", "jungle", "kitchen", "ladder"),
    *("market", "nephew", "orange", "pencil", "rabbit", "saddle", "ticket", "uniform", "violin", "wagon", "zebra"),
)
FILLING = (
    *("The road was quiet that day.", "A light rain fell in the evening.", "The shop opens at nine."),
    *("Someone had left the gate open.", "The soup was still warm.", "Two boats lay at the pier."),
    *("The clock on the wall was slow.", "A dog barked and then stopped.", "The letter came a week late."),
    *("There was snow on the hills.", "The old bridge is closed.", "Nobody knew the tune.", "The tea had gone cold."),
    *("A train passed behind the houses.", "The field was ploughed in spring.", "The lights went out at ten."),
)
CODES, VALUES, HOPS, COMMON = 4, 3, 3, 3
"""Keys with a code, codes of one key, names that follow a first one, words that are common."""


@dataclass(frozen=True)
class Hidden:
    """What an example hides and asks for."""

    sentences: Sequence[str]
    """In the order in which they stand in the text."""
    question: str
    answers: tuple[str, ...]


def code(draw: random.Random, split: str) -> str:
    """Returns a number of five digits: odd in training, even in tests."""
    return str(2 * draw.randrange(5_000, 50_000) + (split == "train"))


def _codes(draw: random.Random, split: str, num_keys: int, num_values: int) -> Hidden:
    keys = draw.sample(KEYS, num_keys)
    asked = draw.choice(keys)
    values: set[str] = set()
    while len(values) < num_keys + num_values - 1:
        values.add(code(draw, split))
    drawn = draw.sample(sorted(values), len(values))
    owners = [*(key for key in keys if key != asked), *[asked] * num_values]
    pairs = list(zip(owners, drawn, strict=True))
    answers = tuple(value for key, value in pairs if key == asked)
    draw.shuffle(pairs)
    many = "What are all codes" if num_values > 1 else "What is the code"
    return Hidden([f"The code of {key} is {value}." for key, value in pairs], f"{many} of {asked}?", answers)


def _variables(draw: random.Random, split: str) -> Hidden:
    names = draw.sample(KEYS, 2 * (HOPS + 1))
    chains = names[: HOPS + 1], names[HOPS + 1 :]
    first = code(draw, split)
    second = code(draw, split)
    while second == first:
        second = code(draw, split)
    lines = [
        [f"Let {chain[0]} = {value}.", *(f"Let {new} = {old}." for old, new in itertools.pairwise(chain))]
        for chain, value in zip(chains, (first, second), strict=True)
    ]
    order = draw.sample([0, 1] * (HOPS + 1), 2 * (HOPS + 1))  # each chain in its order, one among the other
    return Hidden([lines[i].pop(0) for i in order], f"Which names have the value {first}?", tuple(chains[0]))


def _two_hop(draw: random.Random, split: str) -> Hidden:
    people, towns = draw.sample(NAMES, 2 * CODES), draw.sample(TOWNS, CODES)
    pairs = list(zip(people[:CODES], people[CODES:], towns, strict=True))
    asked, _, town = pairs[0]
    sentences = [s for a, b, place in pairs for s in (f"{a} works with {b}.", f"{b} lives in {place}.")]
    question = f"In which town does the colleague of {asked} live?"
    return Hidden(draw.sample(sentences, len(sentences)), question, (town,))


HIDE: dict[str, Callable[[random.Random, str], Hidden]] = {
    "single": lambda draw, split: _codes(draw, split, 1, 1),
    "multikey": lambda draw, split: _codes(draw, split, CODES, 1),
    "multivalue": lambda draw, split: _codes(draw, split, 1, VALUES),
    "variables": _variables,
    "two_hop": _two_hop,
}


def text_in(hidden: Hidden, seed: str) -> Callable[[int], str]:
    """Returns the function from a number of filling sentences to the text; a hidden sentence keeps its share of the way."""
    draw = random.Random(f"{seed}/text")
    places = sorted(draw.random() for _ in hidden.sentences)
    start = draw.randrange(len(FILLING))

    def text(n: int) -> str:
        sentences = [FILLING[(start + i) % len(FILLING)] for i in range(n)]
        for place, sentence in reversed(list(zip(places, hidden.sentences, strict=True))):
            sentences.insert(int(place * (n + 1)), sentence)
        return " ".join(sentences)

    return text


def common_words(seed: str) -> tuple[Callable[[int], str], tuple[str, ...]]:
    """Returns the function from a number of uncommon words to the list of words, and the common ones, each at least three
    times as often as any other."""
    draw = random.Random(f"{seed}/words")
    words = draw.sample(WORDS, len(WORDS))
    common, rare = words[:COMMON], words[COMMON:]

    def text(n: int) -> str:
        each = -(-n // len(rare))  # of an uncommon word, at most
        listed = [rare[i % len(rare)] for i in range(n)] + common * (3 * max(1, each))
        random.Random(f"{seed}/order").shuffle(listed)
        return " ".join(listed)

    return text, tuple(common)


FORM = "\n\n{question} Answer with {what} alone{several}."


def parts(kind: str, split: str, seed: str) -> tuple[Callable[[int], str], str, tuple[str, ...]]:
    """Returns an example's text by how much filling it has, what follows the text, and the answers."""
    if kind == "common_words":
        text, answers = common_words(seed)
        question = f"Which are the {COMMON} most common words in the list?"
    else:
        hidden = HIDE[kind](random.Random(f"{seed}/hidden"), split)
        text, question, answers = text_in(hidden, seed), hidden.question, hidden.answers
    what = {"variables": "the names", "common_words": "the words", "two_hop": "the town"}.get(
        kind, "the number" if len(answers) == 1 else "the numbers"
    )
    several = ", separated by commas" if len(answers) > 1 else ""
    return text, FORM.format(question=question, what=what, several=several), answers


@dataclass(frozen=True, kw_only=True)
class RulerConfig:
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    """Which kinds of examples: single, multikey, multivalue, variables, common_words, two_hop."""
    train_lengths: list[int] = field(default_factory=lambda: [512])
    """Lengths trained on, tokens; each kind at each of them equally often."""
    test_lengths: list[int] = field(default_factory=lambda: [512, 1024, 2048, 4096])
    """Lengths tested, tokens: a test set per kind and length."""
    n_train: int = 240
    """Training examples, of all kinds and lengths together."""
    n_test: int = 20
    """Examples of each test set."""
    data_seed: int = 0
    """Seed of the examples; the run's seed only orders them."""

    def __post_init__(self) -> None:
        for key in ("n_train", "n_test"):
            if getattr(self, key) < 1:
                raise UserError(f"ruler: {key} must be >= 1, got {key}={getattr(self, key)}")
        for name in self.kinds:
            one_of("ruler", "kinds", name, KINDS)
        for key in ("kinds", "train_lengths", "test_lengths"):
            values = getattr(self, key)
            if not values or len(set(values)) < len(values):
                raise UserError(f"ruler: {key} must name one or more, each once, got {key}={values}")
        for key in ("train_lengths", "test_lengths"):
            if min(getattr(self, key)) < 1:
                raise UserError(f"ruler: {key} are in tokens, got {key}={getattr(self, key)}")


@register_task(config=RulerConfig)
class Ruler(Task):
    kind = "generate"
    family = "long_context"
    version = 1
    max_new_tokens = 48
    examples = ({"train_lengths": [600], "test_lengths": [600, 900], "n_train": 6, "n_test": 1},)

    def __init__(self, cfg: Any, seed: int):
        super().__init__(cfg, seed)
        self._made: dict[Any, list[Example]] = {}

    @property
    def longest(self) -> int:  # type: ignore[override]  # a property where a task has an attribute
        return max(*self.cfg.train_lengths, *self.cfg.test_lengths)

    def group(self, name: str) -> str:
        return name.rpartition("_")[2]

    def train(self) -> Sequence[Example]:
        cells = [(kind, length) for length in self.cfg.train_lengths for kind in self.cfg.kinds]
        return self._cached("train", cells, [cells[i % len(cells)] for i in range(self.cfg.n_train)])

    def test(self) -> Mapping[str, Sequence[Example]]:
        return {
            f"{kind}_{length}": self._cached("test", (kind, length), [(kind, length)] * self.cfg.n_test)
            for length in self.cfg.test_lengths
            for kind in self.cfg.kinds
        }

    def _cached(self, split: str, cell: Any, cells: list[tuple[str, int]]) -> list[Example]:
        key = (split, str(cell), self.tokens)
        if key not in self._made:
            self._made[key] = [self._example(split, kind, length, i) for i, (kind, length) in enumerate(cells, 1)]
        return self._made[key]

    def _example(self, split: str, kind: str, length: int, number: int) -> Example:
        """Returns an example as long as its length lets it be.

        Raises:
            UserError: if nothing but what is hidden is too long.
        """
        name = f"{split}-{kind}-{length}-{self.cfg.data_seed}-{number}"
        text, ending, answers = parts(kind, split, f"ruler/{name}")

        def with_filling(n: int) -> Example:
            return Example(name, text(n) + ending, ", ".join(answers), ", ".join(answers), answers=answers)

        def size(n: int) -> int:
            example = with_filling(n)
            if self.tokens is None:
                return len(example.instruction) // 4 + self.max_new_tokens
            return self.tokens(example)

        if (least := size(0)) > length:
            raise UserError(
                f"ruler: a length must hold what is hidden, its question and the answer, got {least} tokens for kind "
                f"{kind} with length={length}; raise task.train_lengths or task.test_lengths"
            )
        cycle = len(FILLING) if kind != "common_words" else len(WORDS) - COMMON
        one, two = size(cycle), size(2 * cycle)
        n = max(0, cycle + (length - one) * cycle // (two - one))
        while size(n) > length:
            n -= 1
        while size(n + 1) <= length:
            n += 1
        return with_filling(n)

    def sources(self) -> list[dict[str, Any]]:
        sets = {"train": self.train(), **self.test()}
        return [{"name": f"ruler/{name}", "rows": len(rows), "sha256": _sha256(rows)} for name, rows in sets.items()]


def _sha256(rows: Sequence[Example]) -> str:
    lines = (json.dumps([row.instruction, row.output]) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
