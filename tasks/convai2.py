"""convai2: replies in a dialogue, given the speaker's persona.

Source: ConvAI2 (Dinan et al. 2019, arXiv 1902.00098), self-original personas without candidates, as ParlAI
(github.com/facebookresearch/ParlAI) releases them. Train: 17,878 dialogues, 131,438 replies; the test set of papers is the
public validation set: 1,000 dialogues, 7,801 replies.
Files: `train_self_original_no_cands.txt`, `valid_self_original_no_cands.txt`, numbered lines, a dialogue from each 1:
"1 your persona: i read twenty books a year.", then "9 hello what are doing today ?<tab>i am good ."
One record: "P: i read twenty books a year . [SEP] Q: hello what are doing today ?" -> "i am good ." The prefixes (P persona,
Q partner, R own earlier turns), the separator and the spaces around . , ? are those of HiRA's repository, which does not
say how it joins them: here by " [SEP] " throughout.
Test replies to one context that follow each other become one example with several references.
Metrics, in percent: BLEU (corpus, up to 4-grams), ROUGE-L, METEOR, BERTScore P/R/F1, token F1, distinct-1/2; `average` is
the mean of BLEU, the three BERTScores, METEOR and ROUGE-L, as in HiRA's Table 2 (Llama-3-8B, HiRA r=32: 47.80).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from highrank.plugin import DataConfig, Example, FileTask, Source, UserError, path_field, register_task, shown

GET = "the files are in ParlAI's ConvAI2 download, parl.ai/downloads/convai2"


@dataclass(frozen=True, kw_only=True)
class ConvAI2Config(DataConfig):
    bert: str | None = path_field(None)
    """Folder of the model for BERTScore, e.g. roberta-large; without one the three BERTScores are not computed."""


@register_task(config=ConvAI2Config)
class ConvAI2(FileTask):
    kind = "generate"
    family = "dialogue"
    version = 1
    metrics = ("dialogue",)
    max_new_tokens = 32

    @property
    def metric(self) -> str:
        return "bleu"

    def train_parts(self) -> Mapping[str, Source]:
        return {"train": Source(("train_self_original_no_cands.txt",), GET, 131_438)}

    def test_parts(self) -> Mapping[str, Source]:
        return {"convai2": Source(("valid_self_original_no_cands.txt",), GET, 7_801)}

    def records(self, rows: Sequence[str], part: str) -> list[Any]:
        examples: list[Any] = []
        context: list[str] = []
        for i, line in enumerate(rows, start=1):
            number, _, text = line.partition(" ")
            if not number.isdigit():
                raise ValueError(f"a line must start with its number, got {line[:40]!r} in row {i}")
            if number == "1":
                context = []
            if text.startswith("your persona: "):
                context.append("P: " + spaced(text.removeprefix("your persona: ")))
                continue
            turns = text.split("\t")
            if len(turns) < 2:
                raise ValueError(f"a turn must be an utterance, a tab and a reply, got {text[:40]!r} in row {i}")
            said, reply = spaced(turns[0]), spaced(turns[1])
            context.append(f"Q: {said}")
            examples.append(Example(f"{part}-{i}", " [SEP] ".join(context), reply, reply))
            context.append(f"R: {reply}")
        return examples

    def test(self) -> Mapping[str, Sequence[Any]]:
        bert = self.cfg.bert
        if bert is not None and not (Path(bert) / "config.json").is_file():
            raise UserError(
                f"task convai2: bert is a model folder with config.json, got bert={shown(bert)}; give a local copy of "
                "roberta-large, or leave it out"
            )
        return {name: merged(examples) for name, examples in super().test().items()}


def spaced(text: str) -> str:
    """Returns a text with one space around each . , and ?"""
    return " ".join(re.sub(r"([.,?])", r" \1 ", text).split())


def merged(examples: Sequence[Example]) -> list[Example]:
    """Returns the examples with neighbours of one context made into one, whose references are their replies."""
    groups = [list(group) for _, group in groupby(examples, key=lambda e: e.instruction)]
    return [replace(group[0], references=tuple(e.output for e in group)) for group in groups]
