"""Metrics of generated replies against one or several references, in percent."""

import warnings
from collections.abc import Sequence
from itertools import chain

import torch
from torchmetrics.functional.text import bert_score, rouge_score, sacre_bleu_score
from transformers import AutoConfig


def dialogue_metrics(
    outputs: Sequence[str], references: Sequence[Sequence[str]], bert: str | None = None
) -> dict[str, float]:
    """Returns BLEU, ROUGE-L, token F1, distinct-1/2 and, where their models are at hand, METEOR and BERTScore.

    With all of them `average` is the mean of BLEU, BERTScore F1, R and P, METEOR and ROUGE-L, HiRA's Table 2: BERTScore
    counts three times in it. What cannot be computed is named in a warning. `bert` is a model folder.
    """
    found = {
        "bleu": 100 * float(sacre_bleu_score(outputs, references, tokenize="13a")),
        "rouge_l": 100 * _mean([_rouge_l(o, r) for o, r in zip(outputs, references, strict=True)]),
        "token_f1": 100 * _mean([max(_f1(o, r) for r in refs) for o, refs in zip(outputs, references, strict=True)]),
        "distinct_1": 100 * distinct(outputs, 1),
        "distinct_2": 100 * distinct(outputs, 2),
        **_meteor(outputs, references),
        **_bert(outputs, references, bert),
    }
    averaged = ("bleu", "bert_f1", "bert_recall", "bert_precision", "meteor", "rouge_l")
    return found | ({"average": _mean([found[key] for key in averaged])} if found.keys() >= {*averaged} else {})


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
    if folder is None:
        warnings.warn("BERTScore is not computed: give a model folder, task.bert=<roberta-large>", stacklevel=3)
        return {}
    pairs = [(place, output, r) for place, output in enumerate(outputs) for r in references[place]]
    layers = AutoConfig.from_pretrained(folder).num_hidden_layers
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
