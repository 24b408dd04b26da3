"""The papers' own numbers, in percent as printed, by table, and which runs they can be compared with.

HiRA: Huang et al., ICLR 2025. HyperAdapt: Gurung and Campbell, arXiv 2509.18629. PEFT: huggingface/peft's MetaMathQA
benchmark. Rows that a paper copied from elsewhere say so in their label.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from highrank.report.runs import flat


@dataclass(frozen=True, kw_only=True)
class Published:
    """One printed row."""

    source: str
    model: str
    task: str
    method: str
    label: str
    """The row's name as printed."""
    variant: Mapping[str, Any] = field(default_factory=dict)
    """Keys, as on the command line, that a run must have to be the same arm."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """The headline metric per test set."""
    sd: Mapping[str, float] = field(default_factory=dict)
    average: float | None = None
    percent: float | None = None
    """Trainable parameters, in percent."""
    measures: Mapping[str, float] = field(default_factory=dict)
    """Further measures of a single test set."""
    memory_gb: float | None = None
    time_s: int | None = None

    def same_arm(self, config: Mapping[str, Any], free: Sequence[str] = ()) -> bool:
        """Whether a resolved config has this row's method and variant, the `free` keys aside, on any model and task."""
        keys = flat(config)
        fixed = {key: value for key, value in self.variant.items() if key not in free}
        return keys.get("method") == self.method and all(keys.get(key) == value for key, value in fixed.items())

    def matches(self, config: Mapping[str, Any]) -> bool:
        """Whether a resolved config is this row's experiment: model, task, method and variant."""
        keys = flat(config)
        return (keys.get("model"), keys.get("task")) == (self.model, self.task) and self.same_arm(config)


HIRA, HYPERADAPT = "HiRA (ICLR 2025)", "HyperAdapt (arXiv 2509.18629)"
HIRA_SETS = ("boolq", "piqa", "siqa", "arc_c", "arc_e", "obqa", "hellaswag", "winogrande")
HYPERADAPT_SETS = ("arc_c", "arc_e", "winogrande", "siqa", "obqa", "boolq", "piqa", "hellaswag")
MATH_SETS = ("addsub", "singleeq", "gsm8k", "aqua", "multiarith", "svamp")
GLUE_SETS = ("sst2", "mrpc", "cola", "qnli", "rte", "stsb")
DIALOGUE = ("bleu", "bert_f1", "bert_recall", "bert_precision", "meteor", "rouge_l", "average")

# How the papers' row names read as methods and keys.
FC_QKV: dict[str, Any] = {"placement": "fc_qkv"}
ALL: dict[str, Any] = {"placement": "all"}
NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "Prompt Tuning": ("prompt_tuning", {}),
    "P-Tuning": ("p_tuning", {}),
    "LoRA (r = 32)": ("lora", {"r": 32, **FC_QKV}),
    "DoRA (r = 32)": ("dora", {"r": 32, **FC_QKV}),
    "MoRA (r = 32)": ("mora", {"r": 32, **FC_QKV}),
    "HiRA (r = 2)": ("hira", {"r": 2, "R": "w0", **FC_QKV}),
    "HiRA (r = 16)": ("hira", {"r": 16, "R": "w0", **FC_QKV}),
    "HiRA (r = 32)": ("hira", {"r": 32, "R": "w0", **FC_QKV}),
    "LoRA r=1": ("lora", {"r": 1, **ALL}),
    "LoRA": ("lora", {"r": 32, **ALL}),
    "DoRA": ("dora", {"r": 32, **ALL}),
    "VeRA": ("vera", ALL),
    "BOFT": ("boft", ALL),
    "HyperAdapt": ("hyperadapt", ALL),
}

TABLE1 = """
llama2_7b | Prompt Tuning | 0.0012 | 55.93 12.35 30.50 6.06 8.63 9.40 6.91 40.57 21.29
llama2_7b | P-Tuning | 0.7428 | 58.75 36.02 0.20 0.17 1.98 0.80 0.01 0.00 12.24
llama2_7b | LoRA (r = 32) | 0.8256 | 69.80 79.90 79.50 64.70 79.80 81.00 83.60 82.60 77.61
llama2_7b | DoRA (r = 32) | 0.8256 | 71.80 83.70 76.00 68.20 83.70 82.40 89.10 82.60 79.69
llama2_7b | MoRA (r = 32) | 0.8241 | 72.17 80.79 79.53 71.42 85.31 81.20 29.09 80.19 72.46
llama2_7b | HiRA (r = 16) | 0.4128 | 69.82 80.20 78.20 71.33 85.90 81.00 86.99 83.43 79.61
llama2_7b | HiRA (r = 32) | 0.8256 | 71.22 83.35 79.53 73.81 86.74 84.60 88.12 83.98 81.42
llama3_8b | Prompt Tuning | 0.0010 | 56.85 45.05 36.13 31.57 32.74 29.20 14.01 50.12 36.96
llama3_8b | P-Tuning | 0.6240 | 59.97 11.64 8.19 7.42 8.63 9.60 1.77 37.65 18.11
llama3_8b | LoRA (r = 32) | 0.7002 | 70.80 85.20 79.90 71.20 84.20 79.00 91.70 84.30 80.79
llama3_8b | DoRA (r = 32) | 0.7002 | 74.60 89.30 79.90 80.40 90.50 85.80 95.50 85.60 85.20
llama3_8b | MoRA (r = 32) | 0.6997 | 74.28 87.43 80.71 79.61 91.16 85.60 43.53 86.74 78.63
llama3_8b | HiRA (r = 16) | 0.3513 | 73.85 89.12 81.06 82.59 93.06 87.40 94.85 86.74 86.08
llama3_8b | HiRA (r = 32) | 0.7002 | 75.40 89.70 81.15 82.90 93.27 88.32 95.36 87.70 86.72
"""

TABLE2 = """
llama2_7b | Prompt Tuning | | 0.04 72.44 77.38 68.23 0.80 0.80 36.62
llama2_7b | P-Tuning | | 0.60 83.29 83.33 83.28 15.11 12.36 46.33
llama2_7b | MoRA (r = 32) | | 1.09 84.09 84.65 83.59 10.97 9.57 45.66
llama2_7b | LoRA (r = 32) | | 1.82 84.41 84.71 84.16 11.38 10.55 46.17
llama2_7b | DoRA (r = 32) | | 1.73 84.18 84.61 83.81 11.25 10.41 46.00
llama2_7b | HiRA (r = 16) | | 2.56 83.97 84.12 83.86 13.35 12.58 46.74
llama2_7b | HiRA (r = 32) | | 2.70 84.86 84.98 84.77 13.56 12.80 47.28
llama3_8b | Prompt Tuning | | 1.45 82.99 82.99 83.05 14.72 13.13 46.39
llama3_8b | P-Tuning | | 1.50 81.52 81.07 82.01 15.49 13.55 45.86
llama3_8b | MoRA (r = 32) | | 1.60 84.22 84.06 84.43 12.37 11.19 46.31
llama3_8b | LoRA (r = 32) | | 2.26 84.32 84.00 84.67 12.51 11.77 46.59
llama3_8b | DoRA (r = 32) | | 2.29 84.32 84.06 84.62 12.63 11.78 46.62
llama3_8b | HiRA (r = 16) | | 3.32 84.84 84.41 85.30 14.93 13.94 47.79
llama3_8b | HiRA (r = 32) | | 3.41 84.81 84.40 85.25 14.87 14.05 47.80
"""

TABLE3 = """
llama2_7b | Prompt Tuning | | 5.91
llama2_7b | P-Tuning | | 1.44
llama2_7b | LoRA (r = 32) | | 15.16
llama2_7b | DoRA (r = 32) | | 14.56
llama2_7b | MoRA (r = 32) | | 15.77
llama2_7b | HiRA (r = 16) | | 46.85
llama2_7b | HiRA (r = 32) | | 46.63
llama3_8b | Prompt Tuning | | 15.62
llama3_8b | P-Tuning | | 2.65
llama3_8b | LoRA (r = 32) | | 65.89
llama3_8b | DoRA (r = 32) | | 66.12
llama3_8b | MoRA (r = 32) | | 67.98
llama3_8b | HiRA (r = 16) | | 67.63
llama3_8b | HiRA (r = 32) | | 70.81
"""

# Ablations on Llama-3-8B: table | row name | method | keys | scores and their average.
ABLATIONS = """
Table 4 | HiRA, random R | hira | r=32 R=random_uniform placement=fc_qkv | 62.17 50.38 33.62 26.62 26.39 26.40 25.06 50.36 37.63
Table 5 | FC | hira | r=32 R=w0 placement=fc | 73.30 89.45 81.17 82.51 92.89 87.60 94.82 86.58 86.04
Table 5 | QV | hira | r=32 R=w0 placement=qv | 73.09 88.85 81.06 80.38 92.68 86.20 94.37 85.87 85.31
Table 5 | QKV | hira | r=32 R=w0 placement=qkv | 72.26 89.23 80.30 80.89 92.97 84.80 94.37 86.19 85.13
Table 5 | QK | hira | r=32 R=w0 placement=qk | 71.38 87.49 78.92 80.80 91.29 83.00 93.68 84.37 83.86
Table 5 | V | hira | r=32 R=w0 placement=v | 67.46 87.60 79.48 79.01 91.20 82.20 92.91 83.58 82.93
Table 5 | Q | hira | r=32 R=w0 placement=q | 68.59 86.51 77.64 79.61 90.99 81.20 92.68 81.93 82.39
Table 5 | K | hira | r=32 R=w0 placement=k | 68.20 86.07 77.74 80.03 90.82 80.00 92.29 81.37 82.07
Table 6 | HiLoRA (r1 = 2, r2 = 30) | hilora | r1=2 r2=30 placement=fc_qkv | 73.76 84.98 80.60 74.57 88.38 84.60 88.68 86.27 82.73
Table 6 | HiLoRA (r1 = 4, r2 = 28) | hilora | r1=4 r2=28 placement=fc_qkv | 74.22 90.26 82.80 82.25 93.48 89.80 96.13 88.48 87.18
Table 6 | HiLoRA (r1 = 8, r2 = 24) | hilora | r1=8 r2=24 placement=fc_qkv | 73.52 89.77 82.65 83.36 93.81 89.60 96.04 89.03 87.22
Table 6 | HiLoRA (r1 = 16, r2 = 16) | hilora | r1=16 r2=16 placement=fc_qkv | 74.77 89.88 81.73 83.28 92.93 88.20 95.52 88.08 86.80
Table 6 | HiLoRA (r1 = 20, r2 = 12) | hilora | r1=20 r2=12 placement=fc_qkv | 75.84 90.42 82.14 84.22 93.73 87.80 96.45 89.27 87.48
Table 6 | HiLoRA (r1 = 24, r2 = 8) | hilora | r1=24 r2=8 placement=fc_qkv | 74.89 89.61 81.68 82.85 92.93 86.20 95.68 89.34 86.65
Table 6 | HiLoRA (r1 = 28, r2 = 4) | hilora | r1=28 r2=4 placement=fc_qkv | 73.64 88.96 81.06 83.11 93.14 87.80 95.51 88.71 86.49
Table 6 | HiLoRA (r1 = 30, r2 = 2) | hilora | r1=30 r2=2 placement=fc_qkv | 73.46 89.50 83.06 82.34 93.10 89.00 95.86 88.87 86.90
Table 13 | R = W0[:32] | hira | r=32 R=w0_trunc R_rank=32 placement=fc_qkv | 73.67 88.63 80.04 80.97 93.18 86.00 94.31 86.58 85.42
Table 13 | R = W0[:128] | hira | r=32 R=w0_trunc R_rank=128 placement=fc_qkv | 74.16 89.23 82.04 80.89 93.10 87.20 95.11 87.45 86.15
Table 13 | R = W0[:512] | hira | r=32 R=w0_trunc R_rank=512 placement=fc_qkv | 74.34 89.88 81.99 82.25 93.86 88.20 95.38 87.61 86.69
Table 14 | R = W0 smoothed | hira | r=32 R=w0_smooth placement=fc_qkv | 72.02 83.84 79.84 81.23 90.24 85.60 92.07 84.85 83.71
"""

# Figure 9, Llama-3-8B: trained on | LoRA | HiRA.
TRANSFER = """
boolq | 71.4 0.2 0.0 0.0 0.0 0.0 0.1 0.0 | 70.2 77.0 42.1 36.6 38.7 30.6 13.9 44.6
piqa | 61.9 87.2 10.3 16.6 23.9 20.4 12.1 51.6 | 55.4 86.8 64.4 70.1 83.4 67.4 53.7 54.2
siqa | 66.5 74.3 72.4 71.0 85.6 70.2 10.6 55.3 | 46.7 80.4 80.5 76.7 89.8 76.6 28.9 58.4
arc_c | 56.1 72.7 63.8 73.8 86.0 73.0 34.1 38.8 | 55.1 79.5 66.9 76.0 89.2 74.0 30.9 59.1
arc_e | 63.5 78.6 67.0 74.5 89.6 71.2 35.9 43.9 | 40.8 80.5 64.2 74.9 90.4 70.2 26.8 58.6
obqa | 58.5 74.9 66.8 76.9 87.0 85.6 33.8 63.9 | 42.8 76.9 65.3 75.9 87.3 82.4 19.1 57.4
hellaswag | 0.0 0.0 1.3 1.2 0.8 0.2 90.0 0.0 | 63.2 79.7 60.8 66.0 84.9 62.6 93.7 53.0
winogrande | 62.1 65.3 43.5 57.6 70.2 53.0 17.6 80.2 | 51.0 76.4 65.0 74.6 86.3 71.4 22.9 87.1
"""

ARITHMETIC = """
llama3_8b | LoRA r=1 | 0.03 | 70.1 87.6 55.3 37.4 86.5 58.9 66.0
llama3_8b | LoRA | 1.03 | 89.6 95.9 64.4 40.9 94.2 74.9 76.7
llama3_8b | DoRA | 1.05 | 90.1 95.9 64.3 41.3 93.2 77.4 77.0
llama3_8b | VeRA | 0.02 | 73.7 85.6 55.0 41.3 85.0 59.5 66.7
llama3_8b | BOFT | 0.08 | 71.7 85.0 54.4 43.3 87.3 62.1 67.3
llama3_8b | HyperAdapt | 0.03 | 86.3 96.7 61.9 44.1 94.2 69.8 75.5
qwen2.5_7b | LoRA r=1 | 0.03 | 93.4 98.4 82.6 63.4 97.5 86.5 87.0
qwen2.5_7b | LoRA | 1.05 | 92.7 98.2 79.8 70.1 98.2 83.6 87.1
qwen2.5_7b | DoRA | 1.07 | 90.9 98.6 79.7 67.7 98.7 83.4 86.5
qwen2.5_7b | VeRA | 0.02 | 94.2 98.6 82.3 66.9 98.7 88.1 88.1
qwen2.5_7b | BOFT | 0.08 | 91.4 98.0 80.4 66.1 98.5 86.0 86.8
qwen2.5_7b | HyperAdapt | 0.03 | 92.7 98.6 79.9 68.1 98.8 83.4 86.9
phi4 | LoRA r=1 | 0.02 | 93.7 98.0 86.8 68.5 98.3 87.7 88.8
phi4 | LoRA | 0.75 | 95.2 99.0 87.5 69.3 98.7 89.9 89.9
phi4 | DoRA | 0.77 | 95.2 99.2 87.0 69.7 98.5 89.9 89.9
phi4 | VeRA | 0.02 | 93.4 96.6 84.7 73.2 95.8 87.9 88.6
phi4 | HyperAdapt | 0.02 | 93.9 99.0 86.5 66.9 98.3 89.4 89.0
"""

COMMONSENSE = """
llama3_8b | LoRA r=1 | 0.03 | 76.5 89.7 77.4 75.2 78.8 60.8 84.9 89.9 79.1
llama3_8b | LoRA | 1.03 | 79.4 90.3 83.0 79.8 86.0 72.5 87.9 95.5 84.3
llama3_8b | DoRA | 1.05 | 79.6 90.8 83.8 80.1 84.2 73.2 87.9 95.5 84.4
llama3_8b | VeRA | 0.02 | 74.4 89.0 74.0 73.3 78.8 61.6 84.0 84.5 77.5
llama3_8b | HyperAdapt | 0.03 | 78.2 89.3 79.4 76.4 80.6 67.9 86.3 92.4 81.3
qwen2.5_7b | LoRA r=1 | 0.03 | 88.1 95.8 76.0 78.9 87.4 70.1 88.0 92.8 84.6
qwen2.5_7b | LoRA | 1.05 | 88.6 95.8 83.5 80.2 89.2 72.7 89.8 94.9 86.8
qwen2.5_7b | DoRA | 1.07 | 88.5 95.9 82.4 79.8 89.6 72.8 89.6 94.6 86.7
qwen2.5_7b | VeRA | 0.02 | 88.0 95.4 74.8 78.6 87.8 69.2 88.4 92.6 84.3
qwen2.5_7b | HyperAdapt | 0.03 | 88.3 95.3 80.1 78.8 90.4 68.6 88.7 93.7 85.5
phi4 | LoRA r=1 | 0.02 | 92.8 97.9 83.5 79.6 91.6 73.4 90.5 94.0 87.9
phi4 | LoRA | 0.75 | 93.5 98.0 87.5 81.9 93.8 74.6 92.6 95.1 89.6
phi4 | DoRA | 0.77 | 93.9 98.2 87.3 82.0 94.8 75.1 92.4 89.9 89.2
phi4 | VeRA | 0.02 | 92.6 97.8 58.4 79.3 90.8 69.9 83.6 93.6 83.2
phi4 | HyperAdapt | 0.02 | 93.3 97.7 83.1 81.0 91.2 69.7 92.6 94.5 87.9
"""

# GLUE, RoBERTa-large: row name | method | keys | score or score±sd per set, and their average.
GLUE = """
Full FT (copied) | full | | 96.4 90.9 68.0 94.7 86.6 92.4 88.2
LoRA (copied) | lora | r=8 placement=qv | 96.2±0.5 90.2±1.0 68.2±1.9 94.8±0.3 85.2±1.1 92.3±0.5 87.8
HyperAdapt | hyperadapt | placement=qkvo | 96.2±0.4 89.8±0.7 65.3±0.7 94.0±0.3 81.6±0.8 91.5±0.3 86.4
"""

# PEFT's MetaMathQA benchmark, Llama-3.2-3B, tested on GSM8K (method_comparison/MetaMathQA/results): method | keys | score. (IA)³
# scales the inputs of feed-forward weights there, not their outputs.
PEFT = """
hira | r=32 placement=qv | 51.3
lora | r=64 alpha=64 scaling=rs placement=qv | 51.3
shira | r=32 placement=qv | 51.0
miss | r=64 type=bat placement=qv | 50.4
gralora | r=32 alpha=64 K=2 placement=qv | 49.5
oft | block_size=0 block_num=32 placement=qv | 49.1
c3a | block_size=64 placement=qv | 48.8
miss | r=64 type=plain placement=qv | 48.7
lora | r=32 placement=qv | 47.8
randlora | r=32 alpha=640 placement=qv | 47.8
lora | r=64 placement=qv | 47.4
full | | 47.2
dora | r=32 placement=qv | 46.9
delora | r=32 placement=qv | 46.8
lokr | r=32 alpha=64 factor=4 placement=qv | 46.6
ia3 | placement=all | 45.5
loha | r=32 alpha=64 placement=qv | 39.3
miss | r=64 type=mini mini_r=64 placement=qv | 38.0
prompt_tuning | | 39.1
vera | r=256 placement=qv | 35.4
p_tuning | | 35.0
boft | placement=qv | 34.3
prefix | | 14.7
fourierft | n_frequency=5000 placement=qv | 9.6
layernorm | | 0.0
"""


def _cells(text: str) -> Iterator[list[str]]:
    for line in text.strip().splitlines():
        yield [cell.strip() for cell in line.split("|")]


def _keys(text: str) -> dict[str, Any]:
    pairs = (word.split("=") for word in text.split())
    return {key: int(value) if value.isdigit() else value for key, value in pairs}


def _table(source: str, task: str, sets: Sequence[str], text: str) -> Iterator[Published]:
    for model, label, percent, printed in _cells(text):
        method, variant = NAMES[label]
        if label == "VeRA":
            variant = {**variant, "r": 2048 if model == "phi4" else 1024}
        values = [float(word) for word in printed.split()]
        yield Published(
            source=source,
            model=model,
            task=task,
            method=method,
            label=label,
            variant=variant,
            scores=dict(zip(sets, values, strict=False)),
            average=values[len(sets)] if len(values) > len(sets) else None,
            percent=float(percent) if percent else None,
        )


def _dialogue() -> Iterator[Published]:
    for model, label, _, printed in _cells(TABLE2):
        method, variant = NAMES[label]
        measures = dict(zip(DIALOGUE, map(float, printed.split()), strict=True))
        yield Published(
            source=f"{HIRA}, Table 2",
            model=model,
            task="convai2",
            method=method,
            label=label,
            variant=variant,
            scores={"convai2": measures["bleu"]},
            measures=measures,
        )


def _ablations() -> Iterator[Published]:
    for table, label, method, keys, printed in _cells(ABLATIONS):
        *scores, average = map(float, printed.split())
        yield Published(
            source=f"{HIRA}, {table}",
            model="llama3_8b",
            task="commonsense170k",
            method=method,
            label=label,
            variant=_keys(keys),
            scores=dict(zip(HIRA_SETS, scores, strict=True)),
            average=average,
        )


def _figures() -> Iterator[Published]:
    llama: dict[str, Any] = {"model": "llama3_8b", "task": "commonsense170k"}
    method, variant = NAMES["HiRA (r = 2)"]
    yield Published(
        source=f"{HIRA}, Figure 6", **llama, method=method, label="HiRA (r = 2)", variant=variant, average=83.16
    )
    for method, label, memory, time in (("lora", "LoRA", 65.48, 54_056), ("hira", "HiRA", 61.49, 50_972)):
        variant = NAMES[f"{label} (r = 32)"][1]
        yield Published(
            source=f"{HIRA}, Table 12",
            **llama,
            method=method,
            label=label,
            variant=variant,
            memory_gb=memory,
            time_s=time,
        )
    for trained, *rows in _cells(TRANSFER):
        for method, printed in zip(("lora", "hira"), rows, strict=True):
            scores = dict(zip(HIRA_SETS, map(float, printed.split()), strict=True))
            task = f"commonsense170k/{trained}"
            yield Published(
                source=f"{HIRA}, Figure 9", model="llama3_8b", task=task, method=method, label=trained, scores=scores
            )


def _glue() -> Iterator[Published]:
    for label, method, keys, printed in _cells(GLUE):
        for name, word in zip(GLUE_SETS, printed.split(), strict=False):
            value, _, sd = word.partition("±")
            yield Published(
                source=f"{HYPERADAPT}, GLUE table",
                model="roberta_large",
                task=f"glue/{name}",
                method=method,
                label=label,
                variant=_keys(keys),
                scores={name: float(value)},
                sd={name: float(sd)} if sd else {},
            )


def _peft() -> Iterator[Published]:
    for method, keys, value in _cells(PEFT):
        yield Published(
            source="PEFT, MetaMathQA benchmark",
            model="llama3.2_3b",
            task="metamath",
            method=method,
            label=method,
            variant=_keys(keys),
            scores={"gsm8k": float(value)},
        )


ROWS: tuple[Published, ...] = (
    *_table(f"{HIRA}, Table 1", "commonsense170k", HIRA_SETS, TABLE1),
    *_dialogue(),
    *_table(f"{HIRA}, Table 3", "metamath", ("gsm8k",), TABLE3),
    *_ablations(),
    *_figures(),
    *_table(f"{HYPERADAPT}, arithmetic table", "math10k", MATH_SETS, ARITHMETIC),
    *_table(f"{HYPERADAPT}, commonsense table", "commonsense170k", HYPERADAPT_SETS, COMMONSENSE),
    *_glue(),
    *_peft(),
)


def beside(config: Mapping[str, Any]) -> list[Published]:
    """Returns the printed rows of a run's own experiment."""
    return [row for row in ROWS if row.matches(config)]


def elsewhere(config: Mapping[str, Any], swept: Sequence[str] = ()) -> list[Published]:
    """Returns the printed rows of a run's method and variant on another model or task: for the pattern alone.

    Where r is not swept it may be another one: what is compared then is something else.
    """
    free = () if "r" in swept else ("r",)
    return [row for row in ROWS if row.average is not None and row.same_arm(config, free) and not row.matches(config)]
