"""What came out of every table and figure of the two papers at small scale, read from the folders' own numbers.

    python experiments/findings.py        # writes the tables of experiments/README.md anew

An experiment's claim is a comparison of arms. It agrees where every difference has the paper's sign and the arms' 95 %
intervals, over seeds and examples, lie apart; it disagrees where one lies apart the other way round; else nothing can be
told. A claim that two arms are level can be refuted so, not shown.
"""

import csv
import itertools
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import t

HERE = Path(__file__).parent
START, END = "<!-- from the results: python experiments/findings.py -->\n", "<!-- end -->\n"
YES, NO, PART, UNKNOWN, ABSENT = "yes", "no", "in part", "cannot tell", "not run"
MINUS = "\u2013"


@dataclass(frozen=True)
class Arm:
    """A mean with its 95 % interval."""

    name: str
    mean: float
    low: float
    high: float
    form: str = ".1f"

    def __str__(self) -> str:
        return f"{self.name} {self.mean:{self.form}} [{self.low:{self.form}}, {self.high:{self.form}}]"


Found = tuple[str, str]
"""What came out, and whether it agrees."""


@dataclass(frozen=True)
class Row:
    """One table or figure of a paper."""

    what: str
    folder: str
    says: str
    """What the paper says, as a sentence."""
    found: Callable[[Path], Found]


# --- how a claim is judged --------------------------------------------------------


def above(higher: Arm, lower: Arm, less_is_better: bool = False) -> str:
    """Says whether the first arm is better than the second."""
    if less_is_better:
        higher, lower = lower, higher
    if higher.low > lower.high:
        return YES
    return NO if higher.high < lower.low else UNKNOWN


def level(a: Arm, b: Arm) -> str:
    """Says whether two arms are refuted to be level."""
    return UNKNOWN if above(a, b) == UNKNOWN else NO


def together(verdicts: Sequence[str]) -> str:
    """Returns the verdict over a claim's comparisons."""
    if NO in verdicts:
        return NO if YES not in verdicts else PART
    if UNKNOWN not in verdicts:
        return YES
    return PART if YES in verdicts else UNKNOWN


def ordered(column: str, *arms: tuple[str, Mapping[str, str]]) -> Callable[[Path], Found]:
    """Returns the judge of "each arm is better than the next one", read from scores.csv; arms are (name, its key cells)."""

    def judge(folder: Path) -> Found:
        read = [score(folder, name, column, cells) for name, cells in arms]
        verdict = together([above(a, b) for a, b in itertools.pairwise(read)])
        return ", ".join(map(str, read)), verdict

    return judge


def tied(column: str, *arms: tuple[str, Mapping[str, str]]) -> Callable[[Path], Found]:
    """Returns the judge of "the first arm is level with each other one"."""

    def judge(folder: Path) -> Found:
        first, *others = (score(folder, name, column, cells) for name, cells in arms)
        return ", ".join(map(str, [first, *others])), together([level(first, other) for other in others])

    return judge


def unrun(reason: str) -> Callable[[Path], Found]:
    return lambda folder: (reason, ABSENT)


# --- what is read -----------------------------------------------------------------


def score(folder: Path, name: str, column: str, cells: Mapping[str, str]) -> Arm:
    """Returns an arm of scores.csv, found by its key cells.

    Raises:
        ValueError: unless just one row has them.
    """
    with (folder / "results" / "scores.csv").open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row["row"] == "arm"]
    (row,) = (row for row in rows if all(row[key] == value for key, value in cells.items()))
    mean, low, high = (float(row[f"{column}{part}"]) for part in ("", " low", " high"))
    return Arm(name, mean, low, high)


def printed(folder: Path, *columns: str) -> dict[str, dict[str, float]]:
    """Returns the numbers of the README's table that has these columns, by the row's method and r."""
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    found: dict[str, dict[str, float]] = {}
    heads: list[str] = []
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            heads = []
        elif not heads:
            heads = cells
        elif set(columns) <= set(heads) and not set("".join(cells)) <= set("-: "):
            row = dict(zip(heads, cells, strict=True))
            r = row.get("r", MINUS)
            key = row["method"] if r == MINUS else f"{row['method']} r={r}"
            found[key] = {column: float(re.sub("[^0-9.e-]", "", row[column].split(" ")[0])) for column in columns}
    return found


def _held_out(folder: Path, method: str) -> Arm:
    with (folder / "results" / "table.csv").open(newline="", encoding="utf-8") as lines:
        losses = [float(row["validation/loss"]) for row in csv.DictReader(lines) if row["method"] == method]
    mean = statistics.mean(losses)
    half = float(t.ppf(0.975, len(losses) - 1)) * statistics.stdev(losses) / len(losses) ** 0.5
    return Arm(method, mean, mean - half, mean + half, ".3f")


# --- the papers' tables and figures -----------------------------------------------


def _table3(folder: Path) -> Found:
    hira, lora = (_held_out(folder, method) for method in ("hira", "lora"))
    return f"held-out loss, rates not searched: {hira}, {lora}", above(hira, lora, less_is_better=True)


def _table12(folder: Path) -> Found:
    time = "time of 10 steps, s"
    costs = printed(folder, time)
    ratio = costs["hira r=32"][time] / costs["lora r=32"][time]
    return f"HiRA takes {ratio:.2f} times LoRA's time (bf16 on a CPU, one run each)", YES if ratio < 1 else NO


def _ranks(folder: Path) -> Found:
    ranks = {arm: row["rank"] for arm, row in printed(folder, "rank").items()}
    hira = [rank for arm, rank in ranks.items() if arm.startswith("hira")]
    lora = {float(arm.split("=")[1]): rank for arm, rank in ranks.items() if arm.startswith("lora")}
    full = ranks["full"]
    verdict = YES if min(hira) > 0.99 * full and all(abs(rank - r) < 0.5 for r, rank in lora.items()) else NO
    return (
        f"rank of HiRA's update {min(hira):.0f} to {max(hira):.0f} of 384 at any r, LoRA's {', '.join(f'{x:.0f}' for x in lora.values())}; "
        f"MoRA's {ranks['mora r=2']:.0f} too",
        verdict,
    )


def _directions(folder: Path) -> Found:
    ranks = {arm: row["effective rank"] for arm, row in printed(folder, "effective rank", "energy").items()}
    hira, lora, full = ranks["hira r=32"], ranks["lora r=32"], ranks["full"]
    verdict = YES if abs(hira - full) < abs(lora - full) else NO
    return f"effective rank: HiRA {hira:.0f}, LoRA {lora:.0f}, full fine-tuning {full:.0f}", verdict


def _normalised(folder: Path) -> Found:
    column = "σ ≥ 0.01, over rank(W0)"
    ranks = {arm: row[column] for arm, row in printed(folder, column).items()}
    ours, lora, full = ranks["hyperadapt"], ranks["lora r=32"], ranks["full"]
    verdict = YES if ours > 0.9 and lora < 0.5 else NO
    return f"normalised rank: HyperAdapt {ours:.2f}, LoRA r=32 {lora:.2f}, full fine-tuning {full:.2f}", verdict


def _rates(folder: Path) -> Found:
    rates = ("0.0003", "0.001", "0.003", "0.01", "0.03")
    usable = {}
    for method in ("hyperadapt", "lora"):
        scores = [score(folder, method, f"lr={rate}", {"method": method}).mean for rate in rates]
        usable[method] = [rate for rate, mean in zip(rates, scores, strict=True) if mean > max(scores) / 2]
    text = "; ".join(f"{method} above half its best at {', '.join(at)}" for method, at in usable.items())
    return text, YES if len(usable["hyperadapt"]) > len(usable["lora"]) else NO


def _r(r: int) -> tuple[str, dict[str, str]]:
    return f"r={r}", {"r": str(r)}


def _method(method: str) -> tuple[str, dict[str, str]]:
    return method, {"method": method}


HIRA = (
    Row(
        "Table 1: commonsense",
        "table1_commonsense170k",
        "HiRA answers more than LoRA",
        ordered("average", _method("hira"), _method("lora")),
    ),
    Row(
        "Table 2: dialogue",
        "table2_convai2",
        "HiRA's replies are closest",
        unrun("the training file is in no public place in this layout"),
    ),
    Row("Table 3: GSM8K", "table3_gsm8k", "HiRA is ahead of LoRA", _table3),
    Row(
        "Table 4: random R",
        "table4_random",
        "R = W0 is better than a random R",
        ordered("stsb", ("W0", {"R": "w0"}), ("random", {"R": "random_uniform"})),
    ),
    Row(
        "Table 5: placement",
        "table5_placement",
        "both kinds of weights beat the feed-forward ones, these beat attention",
        ordered("stsb", *((name, {"placement": name}) for name in ("fc_qkv", "fc", "qkv"))),
    ),
    Row(
        "Table 6: HiLoRA",
        "table6_hilora",
        "half HiRA, half LoRA is better than HiRA alone",
        ordered("stsb", ("mixture", {"r1": "8", "r2": "8"}), ("HiRA", {"r1": "16", "r2": "0"})),
    ),
    Row(
        "Table 9, Figure 2: LoRA's rank",
        "table9_fig2_lora_rank",
        "LoRA gains nothing from a high rank",
        ordered("stsb", _r(16), _r(256)),
    ),
    Row("Table 12: cost", "table12_cost", "HiRA is no slower than LoRA", _table12),
    Row(
        "Table 13: rank of R",
        "table13_rank",
        "an R of low rank is worse than W0",
        ordered("stsb", ("W0", {"R": "w0"}), ("rank 3", {"R_rank": "3"})),
    ),
    Row(
        "Table 14: smoothed R",
        "table14_smooth",
        "a smoothed W0 is worse than W0",
        ordered("stsb", ("W0", {"R": "w0"}), ("smoothed", {"R": "w0_smooth"})),
    ),
    Row(
        "Figures 1, 7: rank of the update",
        "fig1_fig7_rank",
        "HiRA's update has full rank at any r, LoRA's has r",
        _ranks,
    ),
    Row(
        "Figures 4, 5, 8, 10, 11: spectra",
        "fig4_fig5_fig8_fig10_fig11_spectra",
        "HiRA's update spreads as full fine-tuning's does",
        _directions,
    ),
    Row("Figure 6: accuracy against r", "fig6_rank", "HiRA gains from r", ordered("stsb", _r(16), _r(1))),
    Row(
        "Figure 9: transfer",
        "fig9_transfer",
        "HiRA is better on the other sets",
        unrun("no model here learns these sets on two cores"),
    ),
)
HYPERADAPT = (
    Row(
        "GLUE table",
        "glue",
        "HyperAdapt is level with LoRA and full fine-tuning",
        tied("average", *map(_method, ("hyperadapt", "lora", "full"))),
    ),
    Row(
        "Arithmetic table",
        "math10k",
        "HyperAdapt is level with LoRA",
        tied("wordmath", *map(_method, ("hyperadapt", "lora"))),
    ),
    Row(
        "Figures 3, 4: directions of the update",
        "fig3_fig4_spectra",
        "HyperAdapt moves nearly all directions, LoRA few",
        _normalised,
    ),
    Row(
        "Figure 5: learning rate",
        "fig5_lr_sensitivity",
        "HyperAdapt trains over a wider range of rates than LoRA",
        _rates,
    ),
)


def table(paper: str, rows: Sequence[Row]) -> Iterator[str]:
    """Yields the lines of a paper's table."""
    yield from ("| what | the paper says | at small scale | agrees |", "| --- | --- | --- | --- |")
    for row in rows:
        found, verdict = row.found(HERE / paper / row.folder)
        yield f"| [{row.what}]({paper}/{row.folder}/README.md) | {row.says} | {found} | {verdict} |"


def tables() -> str:
    """Returns both papers' tables in Markdown."""
    hira, hyperadapt = "\n".join(table("hira", HIRA)), "\n".join(table("hyperadapt", HYPERADAPT))
    return f"\n### HiRA (ICLR 2025)\n\n{hira}\n\n### HyperAdapt (arXiv 2509.18629)\n\n{hyperadapt}\n\n"


def main() -> None:
    file = HERE / "README.md"
    text = file.read_text(encoding="utf-8")
    if START not in text or END not in text:
        sys.exit(
            f"error: findings: the tables stand between {START.strip()} and {END.strip()}, got {file} without them"
        )
    file.write_text(text.split(START)[0] + START + tables() + END + text.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
