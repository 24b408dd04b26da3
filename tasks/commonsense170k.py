"""commonsense170k: eight commonsense question sets, trained on together and tested on apart.

`task=commonsense170k` trains on the union of all eight; `task=commonsense170k/boolq` and so on on one of them. Either is
tested on all eight, or on `task.sets=[boolq,piqa]`.

Source: LLM-Adapters (Hu et al. 2023, arXiv 2304.01933; github.com/AGI-Edgerunners/LLM-Adapters): `commonsense_170k.json`,
and `<set>/train.json`, `<set>/test.json` with instruction, input, output, answer; or the original sets on the Hub, which
are put into the same words. Each set has its own licence.
Sizes, train / test: boolq 9,427 / 3,270, piqa 16,113 / 1,838, siqa 33,410 / 1,954, hellaswag 39,905 / 10,042, winogrande
63,238 / 1,267, arc_e 2,251 / 2,376, arc_c 1,119 / 1,172, obqa 4,957 / 500; train together 170,420. WinoGrande's 63,238
is the sum of its five training sizes and the debiased set, so most of its questions occur several times.
One record (boolq): "Please answer the following question with true or false, question: do iran and afghanistan speak the
same language?\\n\\nAnswer format: true/false" -> "the correct answer is true".
Metric: accuracy in percent per set, and the unweighted mean of the eight. Published means for Llama-3-8B: HiRA r=32
86.72 (ICLR 2025, Table 1), HyperAdapt 81.3 (arXiv 2509.18629). HiRA's Table 11 prints 1,830 for piqa's 1,838.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from highrank.plugin import DataConfig, Example, FileTask, Source, as_text, one_of, register_task, text_of

GET = "the files are in github.com/AGI-Edgerunners/LLM-Adapters under dataset/ and ft-training_set/"
TOTAL = 170_420


@dataclass(frozen=True)
class Member:
    train: int
    test: int
    folder: str
    word: str
    """What its answers are called: answer1, answer2, ...; none for true and false."""
    num_words: int
    """Answers that a scorer looks for."""
    hub: str
    test_split: str
    train_hub: str | None = None
    """Where the training split is, if elsewhere."""


MEMBERS = {
    "boolq": Member(9_427, 3_270, "boolq", "", 2, "google/boolq", "validation"),
    "piqa": Member(16_113, 1_838, "piqa", "solution", 2, "ybisk/piqa@refs/convert/parquet", "validation"),
    "siqa": Member(33_410, 1_954, "social_i_qa", "answer", 5, "allenai/social_i_qa@refs/convert/parquet", "validation"),
    "hellaswag": Member(39_905, 10_042, "hellaswag", "ending", 4, "Rowan/hellaswag", "validation"),
    "winogrande": Member(
        63_238,
        1_267,
        "winogrande",
        "option",
        2,
        "allenai/winogrande:winogrande_xl",
        "validation",
        "allenai/winogrande:" + "+".join(f"winogrande_{size}" for size in ("xs", "s", "m", "l", "xl", "debiased")),
    ),
    "arc_e": Member(2_251, 2_376, "ARC-Easy", "answer", 5, "allenai/ai2_arc:ARC-Easy", "test"),
    "arc_c": Member(1_119, 1_172, "ARC-Challenge", "answer", 5, "allenai/ai2_arc:ARC-Challenge", "test"),
    "obqa": Member(4_957, 500, "openbookqa", "answer", 5, "allenai/openbookqa", "test"),
}


def words(part: str) -> tuple[str, ...]:
    """Returns the answers of a set, as scorers look for them."""
    member = MEMBERS[part]
    return tuple(f"{member.word}{i + 1}" for i in range(member.num_words)) if member.word else ("true", "false")


@dataclass(frozen=True, kw_only=True)
class CommonsenseConfig(DataConfig):
    member: str | None = None
    """Train on this set alone; default: on all eight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.member is not None:
            one_of("task commonsense170k", "member", self.member, list(MEMBERS))


@register_task(config=CommonsenseConfig)
class Commonsense(FileTask):
    kind = "generate"
    family = "commonsense"
    version = 1
    folders = ("", "dataset", "ft-training_set", "commonsense")
    max_new_tokens = 32
    examples = ({"member": None}, {"member": "siqa"})

    def train_parts(self) -> Mapping[str, Source]:
        if self.cfg.member is None:
            merged = Source(("commonsense_170k.json", "commonsense_170k.parquet"), GET, TOTAL)
            if self.has_file(merged):
                return {"commonsense170k": merged}
        chosen = MEMBERS if self.cfg.member is None else [self.cfg.member]
        return {part: self._source(part, "train") for part in chosen}

    def test_parts(self) -> Mapping[str, Source]:
        return {part: self._source(part, "test") for part in MEMBERS}

    def _source(self, part: str, split: str) -> Source:
        member = MEMBERS[part]
        names = ["train", "train_xl"] if split == "train" and part == "winogrande" else [split]
        return Source(
            paths=tuple(f"{member.folder}/{name}.{kind}" for name in names for kind in ("json", "parquet")),
            get=GET,
            rows=member.train if split == "train" else member.test,
            hub=(split == "train" and member.train_hub) or member.hub,
            split="train" if split == "train" else member.test_split,
        )

    def record(self, row: Any, part: str, record_id: str) -> Example:
        if "instruction" not in row:
            row = in_words(row, part)
        instruction, answer = text_of(row, "instruction"), text_of(row, "answer")
        options = instruction.rpartition("Answer format: ")[2].strip().split("/")
        if answer not in options:
            raise ValueError(f"answer must be one of {', '.join(options)}, got answer={answer!r}")
        # The merged file does not say which set a row is from, and needs not: it is trained on only.
        choices = words(part) if part in MEMBERS else tuple(options)
        return Example(
            record_id,
            instruction,
            text_of(row, "output"),
            answer,
            text_of(row, "input", ""),
            choices,
            tuple(f"the correct answer is {option}" for option in choices if option in options),
        )


def in_words(row: Mapping[str, Any], part: str) -> dict[str, str]:
    """Returns a row of an original set as instruction, output and answer, in LLM-Adapters' words.

    Raises:
        KeyError: for a field that the set's original format lacks.
        ValueError: if the row has no answer, as in a public test split.
    """
    lead = "Please choose the correct answer to the question"
    if part == "boolq":
        answer = text_of(row, "answer")
        text = f"Please answer the following question with true or false, question: {text_of(row, 'question')}?"
        return _made(text, ["true", "false"], answer)
    if part == "piqa":
        text = f"Please choose the correct solution to the question: {text_of(row, 'goal')}\n\n"
        text += f"Solution1: {text_of(row, 'sol1')}\n\nSolution2: {text_of(row, 'sol2')}"
        return _made(text, _named("solution", 2), _at("solution", 2, int(row["label"]) + 1))
    if part == "siqa":
        texts = [text_of(row, f"answer{letter}") for letter in "ABC"]
        question = f"{lead}: {text_of(row, 'context')} {text_of(row, 'question')}\n\n{_listed('Answer', texts)}"
        return _made(question, _named("answer", 3), _at("answer", 3, int(row["label"])))
    if part == "hellaswag":
        lead = "Please choose the correct ending to complete the given sentence"
        question = (
            f"{lead}: {text_of(row, 'activity_label')}: {text_of(row, 'ctx')}\n\n{_listed('Ending', row['endings'])}"
        )
        return _made(question, _named("ending", 4), _at("ending", 4, int(row["label"]) + 1))
    if part == "winogrande":
        lead = "Please choose the correct answer to fill in the blank to complete the given sentence"
        question = f"{lead}: {text_of(row, 'sentence')}\n\n{_listed('Option', [text_of(row, 'option1'), text_of(row, 'option2')])}"
        return _made(question, _named("option", 2), _at("option", 2, int(row["answer"])), gap=" ")
    stem = text_of(row, "question_stem" if part == "obqa" else "question")
    labels, texts = list(row["choices"]["label"]), list(row["choices"]["text"])
    place = labels.index(row["answerKey"]) + 1
    return _made(
        f"{lead}: {stem}\n\n{_listed('Answer', texts)}", _named("answer", len(texts)), _at("answer", len(texts), place)
    )


def _listed(word: str, texts: list[str]) -> str:
    return " ".join(f"{word}{i}: {as_text(text, word)}" for i, text in enumerate(texts, start=1))


def _named(word: str, n: int) -> list[str]:
    return [f"{word}{i}" for i in range(1, n + 1)]


def _at(word: str, n: int, place: int) -> str:
    if not 1 <= place <= n:
        raise ValueError(f"the answer must be one of {n} choices, got the one at place {place}")
    return f"{word}{place}"


def _made(question: str, answers: list[str], answer: str, gap: str = "\n\n") -> dict[str, str]:
    instruction = f"{question}{gap}Answer format: {'/'.join(answers)}"
    return {"instruction": instruction, "output": f"the correct answer is {answer}", "answer": answer}
