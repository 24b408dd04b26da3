"""glue: eight tasks of the GLUE benchmark, `task=glue/cola` and so on.

Source: Wang et al. 2019 (arXiv 1804.07461), gluebenchmark.com or `nyu-mll/glue` on the Hub; each set has its own licence.
Files: `<FOLDER>/train.tsv` and `dev.tsv` of the GLUE download, or parquet with the Hub's fields. The test labels are not
public: the dev set is what papers report.
One record (rte): "Dana Reeve, the widow of the actor Christopher Reeve, has died of lung cancer at age 44, ..." and
"Christopher Reeve had an accident." -> not_entailment.
Metric, in percent: Matthews correlation (cola), Pearson correlation (stsb), accuracy (others), as in HyperAdapt's GLUE
table (arXiv 2509.18629): RoBERTa-large with HyperAdapt SST-2 96.2, MRPC 89.8, CoLA 65.3, QNLI 94.0, RTE 81.6, STS-B 91.5.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from highrank.plugin import DataConfig, FileTask, LabelledText, Source, as_text, label_of, one_of, register_task

ENTAILMENT = ("entailment", "not_entailment")


@dataclass(frozen=True)
class Member:
    folder: str
    train: int
    dev: dict[str, int]
    """Rows per dev file."""
    text: tuple[str, ...]
    """Fields that hold the first text: in GLUE's tsv, on the Hub."""
    pair: tuple[str, ...] = ()
    labels: tuple[str, ...] = ("0", "1")
    """Class names in the order of their index; none for a real-valued label."""
    label: tuple[str, ...] = ("label",)
    metrics: tuple[str, ...] = ("accuracy",)
    columns: tuple[str, ...] = ()
    has_broken_rows: bool = False


MEMBERS = {
    "cola": Member(
        "CoLA",
        8_551,
        {"dev": 1_043},
        ("sentence",),
        metrics=("matthews", "accuracy"),
        columns=("source", "label", "star", "sentence"),
    ),
    "sst2": Member("SST-2", 67_349, {"dev": 872}, ("sentence",)),
    "mrpc": Member(
        "MRPC",
        3_668,
        {"dev": 408},
        ("#1 String", "sentence1"),
        ("#2 String", "sentence2"),
        label=("Quality", "label"),
        metrics=("accuracy", "f1"),
    ),
    "stsb": Member(
        "STS-B",
        5_749,
        {"dev": 1_500},
        ("sentence1",),
        ("sentence2",),
        labels=(),
        label=("score", "label"),
        metrics=("pearson", "spearman"),
    ),
    "qnli": Member("QNLI", 104_743, {"dev": 5_463}, ("question",), ("sentence",), ENTAILMENT),
    "rte": Member("RTE", 2_490, {"dev": 277}, ("sentence1",), ("sentence2",), ENTAILMENT),
    "mnli": Member(
        "MNLI",
        392_702,
        {"dev_matched": 9_815, "dev_mismatched": 9_832},
        ("sentence1", "premise"),
        ("sentence2", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("gold_label", "label"),
    ),
    "qqp": Member(
        "QQP",
        363_846,
        {"dev": 40_430},
        ("question1",),
        ("question2",),
        label=("is_duplicate", "label"),
        metrics=("accuracy", "f1"),
        has_broken_rows=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class GlueConfig(DataConfig):
    member: str = "cola"
    """cola, sst2, mrpc, stsb, qnli, rte, mnli or qqp."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("task glue", "member", self.member, list(MEMBERS))


@register_task(config=GlueConfig)
class Glue(FileTask):
    family = "glue"
    version = 1
    folders = ("", "glue", "glue_data")
    examples = tuple({"member": member} for member in MEMBERS)

    def __init__(self, cfg: GlueConfig, seed: int):
        super().__init__(cfg, seed)
        self.member = MEMBERS[cfg.member]
        self.kind = "classify" if self.member.labels else "regress"
        self.num_labels = max(1, len(self.member.labels))
        self.metrics = self.member.metrics

    def _source(self, file: str, rows: int) -> Source:
        folder = self.member.folder
        return Source(
            paths=(f"{folder}/{file}.tsv", f"{folder}/{file}.parquet"),
            get="GLUE comes from gluebenchmark.com/tasks",
            rows=rows,
            columns=self.member.columns,
            hub=f"nyu-mll/glue:{self.cfg.member}",
            split=file.replace("dev", "validation"),
            has_broken_rows=self.member.has_broken_rows,
        )

    def train_parts(self) -> Mapping[str, Source]:
        return {"train": self._source("train", self.member.train)}

    def test_parts(self) -> Mapping[str, Source]:
        return {file.replace("dev", self.cfg.member): self._source(file, n) for file, n in self.member.dev.items()}

    def record(self, row: Any, part: str, record_id: str) -> LabelledText:
        text, label = as_text(_first(row, self.member.text), "text"), _first(row, self.member.label)
        pair = as_text(_first(row, self.member.pair), "the second text") if self.member.pair else None
        if self.member.labels:
            return LabelledText(record_id, text, label_of(label, self.member.labels), pair)
        score = float(label)
        if not 0 <= score <= 5:
            raise ValueError(f"score must be in [0, 5], got {label}")
        return LabelledText(record_id, text, score, pair)


def _first(row: Mapping[str, Any], fields: tuple[str, ...]) -> Any:
    """Returns the first of the fields that the row has; None if none is asked for."""
    values = [row[field] for field in fields if field in row]
    if fields and not values:
        raise KeyError(" or ".join(fields))
    return values[0] if values else None
