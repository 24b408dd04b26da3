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

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
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
    folders = ("", "convai2")
    max_new_tokens = 32

    @property
    def metric(self) -> str:
        return "bleu"

    def measure(self, name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        texts = [row.get("text", row["output"]).strip() for row in rows]
        golds = [row["gold"] if isinstance(row["gold"], list) else [row["gold"]] for row in rows]
        return dialogue_metrics(texts, golds, self.cfg.bert)

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


def dialogue_metrics(
    outputs: Sequence[str], references: Sequence[Sequence[str]], bert: str | None = None
) -> dict[str, float]:
    """Returns BLEU, ROUGE-L, token F1, distinct-1/2 and, where their models are at hand, METEOR and BERTScore.

    With all of them `average` is the mean of BLEU, BERTScore F1, R and P, METEOR and ROUGE-L, HiRA's Table 2: BERTScore
    counts three times in it. What cannot be computed is named in a warning. `bert` is a model folder.
    """
    from torchmetrics.functional.text import sacre_bleu_score

    scores = {
        "bleu": 100 * float(sacre_bleu_score(outputs, references, tokenize="13a")),
        "rouge_l": 100 * _mean([_rouge_l(o, r) for o, r in zip(outputs, references, strict=True)]),
        "token_f1": 100 * _mean([max(_f1(o, r) for r in refs) for o, refs in zip(outputs, references, strict=True)]),
        "distinct_1": 100 * distinct(outputs, 1),
        "distinct_2": 100 * distinct(outputs, 2),
        **_meteor(outputs, references),
        **_bert(outputs, references, bert),
    }
    averaged = ("bleu", "bert_f1", "bert_recall", "bert_precision", "meteor", "rouge_l")
    return scores | ({"average": _mean([scores[key] for key in averaged])} if scores.keys() >= {*averaged} else {})


def distinct(texts: Sequence[str], n: int) -> float:
    """Returns the share of different n-grams among all of the texts' n-grams."""
    grams = list(chain.from_iterable(zip(*(text.split()[i:] for i in range(n)), strict=False) for text in texts))
    return len(set(grams)) / len(grams) if grams else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _f1(output: str, reference: str) -> float:
    """Harmonic mean of the shares of shared words."""
    said, wanted = output.lower().split(), reference.lower().split()
    shared = sum(min(said.count(word), wanted.count(word)) for word in set(said))
    return 2 * shared / (len(said) + len(wanted)) if shared else 0.0


def _rouge_l(output: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 of the nearest reference."""
    from torchmetrics.functional.text import rouge_score

    scores = [rouge_score(output, reference, rouge_keys="rougeL")["rougeL_fmeasure"] for reference in references]
    return max(float(score) for score in scores)


def _meteor(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    try:
        from nltk import word_tokenize
        from nltk.translate.meteor_score import meteor_score

        pairs = zip(outputs, references, strict=True)
        scores = [meteor_score([word_tokenize(r) for r in refs], word_tokenize(output)) for output, refs in pairs]
    except (ImportError, LookupError) as error:
        warnings.warn(
            f"METEOR is not computed ({type(error).__name__}): it needs `pip install highrank[dialogue]` and NLTK's data "
            "`python -m nltk.downloader wordnet punkt_tab`",
            stacklevel=3,
        )
        return {}
    return {"meteor": 100 * _mean(scores)}


def _bert(outputs: Sequence[str], references: Sequence[Sequence[str]], folder: str | None) -> dict[str, float]:
    """BERTScore against the reference with the highest F1."""
    import torch
    from torchmetrics.functional.text import bert_score

    if folder is None:
        warnings.warn("BERTScore is not computed: give a model folder, task.bert=<roberta-large>", stacklevel=3)
        return {}
    pairs = [(place, output, r) for place, output in enumerate(outputs) for r in references[place]]
    layers = json.loads((Path(folder) / "config.json").read_text())["num_hidden_layers"]
    scores = bert_score(
        [o or "." for _, o, _ in pairs],  # an empty output has no token to compare
        [r for _, _, r in pairs],
        model_name_or_path=folder,
        num_layers=17 if layers == 24 else None,  # the layer that BERTScore takes of roberta-large
    )
    precision, recall, f1 = (torch.as_tensor(scores[key]).reshape(-1) for key in ("precision", "recall", "f1"))
    best: dict[int, int] = {}
    for i, (place, _, _) in enumerate(pairs):
        if place not in best or f1[i] > f1[best[place]]:
            best[place] = i
    rows = torch.tensor([best[place] for place in range(len(outputs))])
    values = {"bert_precision": precision, "bert_recall": recall, "bert_f1": f1}
    return {name: 100 * float(value[rows].mean()) for name, value in values.items()}
