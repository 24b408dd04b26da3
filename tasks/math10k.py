"""math10k: trained on arithmetic word problems with rationales, tested on six sets.

Source: LLM-Adapters (Hu et al. 2023, arXiv 2304.01933; github.com/AGI-Edgerunners/LLM-Adapters): `math_10k.json` (GSM8K
and MAWPS train and 1,000 AQuA problems, rationales written by a language model) or `math_7k`, `math_14k` (without MAWPS),
`math_50k`; tests `<set>/test.json`, all with instruction, input, output, answer. `task.train_set=parts` trains on the
parts with their own rationales instead: GSM8K train, MAWPS train (equations), AQuA train or dev.
Tests: addsub 395, singleeq 508, gsm8k 1,319, aqua 254, multiarith 600, svamp 1,000; mawps 238 if named in `task.sets`.
One record (addsub): "There are 7 crayons in the drawer . Mary took 3 crayons out of the drawer . How many crayons are
there now ? " -> 4.
Metric: accuracy in percent per set, and the unweighted mean. Numbers are compared as numbers; aqua's answer is a letter.
The `output` of the test files is a language model's rationale, often wrong: it is never scored against.
MAWPS holds 327 of addsub's, 416 of singleeq's and 452 of multiarith's questions, so math10k's headline is contaminated:
see each set's `accuracy_clean`, and math_7k. HyperAdapt (arXiv 2509.18629) prints a mean of 75.5 for Llama-3-8B.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from highrank.data.answers import value
from highrank.plugin import DataConfig, Example, FileTask, Source, as_text, load, one_of, register_task, text_of

GET = "the files are in github.com/AGI-Edgerunners/LLM-Adapters under dataset/ and ft-training_set/"
SIZES = {"10k": 9_919, "7k": 6_900, "14k": 14_000, "50k": 50_000}
"""Training rows, about: for a dry run without the data."""
TESTS = {"addsub": 395, "singleeq": 508, "gsm8k": 1_319, "aqua": 254, "multiarith": 600, "svamp": 1_000, "mawps": 238}
FOLDERS = {"addsub": "AddSub", "singleeq": "SingleEq", "aqua": "AQuA", "multiarith": "MultiArith", "svamp": "SVAMP"}
LETTERS = tuple("ABCDE")
LETTER_OPTIONS = tuple(f"The answer is ({letter})." for letter in LETTERS)


@dataclass(frozen=True, kw_only=True)
class MathConfig(DataConfig):
    train_set: str = "10k"
    """10k, 7k, 14k, 50k, or parts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("task math10k", "train_set", self.train_set, [*SIZES, "parts"])


@register_task(config=MathConfig)
class Math10k(FileTask):
    kind = "generate"
    family = "math"
    version = 1
    folders = ("", "dataset", "ft-training_set", "arithmetic")
    max_new_tokens = 256
    examples = ({"train_set": "10k"}, {"train_set": "parts", "sets": ["addsub", "mawps"]})

    def __init__(self, cfg: MathConfig, seed: int):
        super().__init__(cfg, seed)
        self.gsm8k: Any = load("tasks", "gsm8k")(cfg, seed)

    def train_parts(self) -> Mapping[str, Source]:
        if self.cfg.train_set != "parts":
            name = f"math_{self.cfg.train_set}"
            get = f"{GET}, or train on its parts: task.train_set=parts"
            return {name: Source((f"{name}.json", f"{name}.parquet"), get)}
        return {
            "gsm8k-train": self.gsm8k.train_parts()["train"],
            "mawps-train": Source(("mawps/trainset.json",), GET, 1_898),
            "aqua-train": Source(("AQuA/train_1000.jsonl", "AQuA/dev.jsonl"), "github.com/google-deepmind/AQuA", 1_000),
        }

    def test_parts(self) -> Mapping[str, Source]:
        names = [name for name in TESTS if name != "mawps" or name in (self.cfg.sets or ())]
        folders = {name: FOLDERS.get(name, name) for name in names}
        layouts = ("json", "jsonl", "parquet")
        return {n: Source(tuple(f"{f}/test.{kind}" for kind in layouts), GET, TESTS[n]) for n, f in folders.items()}

    @property
    def published(self) -> int | None:
        return SIZES.get(self.cfg.train_set) or super().published

    def record(self, row: Any, part: str, record_id: str) -> Example:
        if part == "mawps-train":
            return _mawps(row, record_id)
        if "question" in row:  # the original layout of GSM8K and AQuA
            return _aqua(row, record_id) if part.startswith("aqua") else self.gsm8k.record(row, part, record_id)
        answer = text_of(row, "answer").strip()
        if part in TESTS and value(answer) is None and not (part == "aqua" and answer in LETTERS):
            raise ValueError(f"answer must be {'A to E' if part == 'aqua' else 'a number'}, got answer={answer!r}")
        choices = LETTERS if answer in LETTERS else ()
        options = LETTER_OPTIONS if choices else ()
        instruction, output = text_of(row, "instruction"), text_of(row, "output")
        return Example(record_id, instruction, output, answer, text_of(row, "input", ""), choices, options)


def _mawps(row: Any, record_id: str) -> Example:
    """One MAWPS problem; its rationale is the equation."""
    answer = text_of(row, "ans").removesuffix(".0").replace(",", "")
    if value(answer) is None:
        raise ValueError(f"ans must be a number, got ans={row['ans']!r}")
    equation = text_of(row, "equation").partition("=")[2]
    return Example(record_id, text_of(row, "original_text"), f"{equation} = {answer}. The answer is {answer}.", answer)


def _aqua(row: Any, record_id: str) -> Example:
    """One AQuA-RAT problem with its own rationale, asked as LLM-Adapters asks it."""
    if row["correct"] not in LETTERS:
        raise ValueError(f"correct must be A to E, got correct={row['correct']!r}")
    choices = " ".join(f"({as_text(option, 'options').replace(')', ') ', 1)}" for option in row["options"])
    question = f"{text_of(row, 'question')} Answer Choices: {choices}"
    output = f"{text_of(row, 'rationale')}\nThe answer is ({row['correct']})."
    return Example(record_id, question, output, row["correct"], "", LETTERS, LETTER_OPTIONS)
