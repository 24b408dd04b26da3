"""What came out of every table and figure of the two papers at small scale, read from the folders' own numbers.

    python experiments/findings.py        # writes the tables of experiments/README.md anew

An experiment's claim is one or several differences between arms. A difference agrees where it has the paper's sign and the
arms' 95 % intervals, over seeds and examples, lie apart; it disagrees where they lie apart the other way round; else nothing
can be told. A claim agrees or disagrees if none of its differences says otherwise, and agrees in part if some do. What was
measured once has no interval, and the row says so.
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

from highrank.report.tables import DASH

HERE = Path(__file__).parent
START, END = "<!-- from the results: python experiments/findings.py -->", "<!-- end -->"
YES, NO, PART, UNKNOWN, ABSENT = "yes", "no", "in part", "cannot tell", "not run"


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


def within(points: float, low: Arm, high: Arm) -> str:
    """Says whether the first arm is less than so many points below the second, wherever in their intervals both are."""
    if high.high - low.low < points:
        return YES
    return NO if high.low - low.high > points else UNKNOWN


def together(verdicts: Sequence[str]) -> str:
    """Returns the verdict over a claim's differences."""
    if YES in verdicts:
        return YES if set(verdicts) == {YES} else PART
    return NO if NO in verdicts else UNKNOWN


def ordered(column: str, *arms: tuple[str, Mapping[str, str]]) -> Callable[[Path], Found]:
    """Returns the judge of "each arm is better than the next one", read from scores.csv; arms are (name, its key cells)."""

    def judge(folder: Path) -> Found:
        read = [score(folder, name, column, cells) for name, cells in arms]
        return ", ".join(map(str, read)), together([above(a, b) for a, b in itertools.pairwise(read)])

    return judge


def best(column: str, *arms: tuple[str, Mapping[str, str]]) -> Callable[[Path], Found]:
    """Returns the judge of "the first arm is better than each other one"."""

    def judge(folder: Path) -> Found:
        first, *others = (score(folder, name, column, cells) for name, cells in arms)
        return ", ".join(map(str, [first, *others])), together([above(first, other) for other in others])

    return judge


def near(points: float, column: str, *arms: tuple[str, Mapping[str, str]]) -> Callable[[Path], Found]:
    """Returns the judge of "the first arm is less than so many points below each other one"."""

    def judge(folder: Path) -> Found:
        first, *others = (score(folder, name, column, cells) for name, cells in arms)
        return ", ".join(map(str, [first, *others])), together([within(points, first, other) for other in others])

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
            r = row.get("r", DASH)
            key = row["method"] if r == DASH else f"{row['method']} r={r}"
            found[key] = {
                column: float(re.sub("[^0-9.e-]", "", row[column].split(" ")[0].replace("\u2212", "-")))
                for column in columns
            }
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
    return f"held-out loss {hira}, {lora}; rates were not searched, so that the order says nothing", UNKNOWN


def _table12(folder: Path) -> Found:
    time, memory = "time of 10 steps, s", "peak memory of the process, GiB"
    hira, lora = (printed(folder, time, memory)[arm] for arm in ("hira r=32", "lora r=32"))
    ratios = [hira[column] / lora[column] for column in (time, memory)]
    verdict = together([YES if ratio < 1 else NO for ratio in ratios])
    return f"{ratios[0]:.2f} times LoRA's time, {ratios[1]:.2f} times its memory; bf16 on a CPU, measured once", verdict


def _ranks(folder: Path) -> Found:
    ranks = {arm: row["rank"] for arm, row in printed(folder, "rank").items()}
    hira = [rank for arm, rank in ranks.items() if arm.startswith("hira")]
    lora = {float(arm.split("=")[1]): rank for arm, rank in ranks.items() if arm.startswith("lora")}
    verdict = together(
        [YES if min(hira) > 0.99 * ranks["full"] else NO, *(YES if abs(x - r) < 0.5 else NO for r, x in lora.items())]
    )
    text = f"rank of HiRA's update {min(hira):.0f} to {max(hira):.0f}, LoRA's {', '.join(f'{x:.0f}' for x in lora.values())}"
    return f"{text}, full fine-tuning's {ranks['full']:.0f}, MoRA's r=2 {ranks['mora r=2']:.0f}; one seed", verdict


def _directions(folder: Path) -> Found:
    measures = ("σ > 0.005", "effective rank", "energy")
    found = printed(folder, *measures)
    hira, lora, full = (found[arm] for arm in ("hira r=32", "lora r=32", "full"))
    verdict = together([YES if abs(hira[m] - full[m]) < abs(lora[m] - full[m]) else NO for m in measures])
    text = "; ".join(f"{m}: HiRA {hira[m]:g}, LoRA {lora[m]:g}, full {full[m]:g}" for m in measures)
    return f"{text}; r=32, one seed", verdict


def _normalised(folder: Path) -> Found:
    column = "σ ≥ 0.01, over rank(W0)"
    ranks = {arm: row[column] for arm, row in printed(folder, column).items()}
    ours, lora, full = ranks["hyperadapt"], ranks["lora r=32"], ranks["full"]
    verdict = YES if ours > 0.9 and lora < 0.5 else NO
    return (
        f"normalised rank: HyperAdapt {ours:.2f}, LoRA r=32 {lora:.2f}, full fine-tuning {full:.2f}; one seed",
        verdict,
    )


def _rates(folder: Path) -> Found:
    rates = ("0.0003", "0.001", "0.003", "0.01")
    *flat, higher = (score(folder, f"at {rate}", f"lr={rate}", {"method": "hyperadapt"}) for rate in rates)
    return ", ".join(map(str, [*flat, higher])), together([above(arm, higher) for arm in flat])


def _r(r: int) -> tuple[str, dict[str, str]]:
    return f"r={r}", {"r": str(r)}


def _method(method: str) -> tuple[str, dict[str, str]]:
    return method, {"method": method}


HIRA = (
    Row(
        "Table 1: commonsense",
        "table1_commonsense170k",
        "HiRA answers more than LoRA",
        best("average", _method("hira"), _method("lora")),
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
        best(
            "stsb",
            ("W0", {"R": "w0"}),
            ("the paper's", {"R": "random_uniform"}),
            ("of W0's size", {"R": "random_scaled"}),
        ),
    ),
    Row(
        "Table 5: placement",
        "table5_placement",
        "all weights beat the feed-forward ones, these beat attention's",
        ordered("stsb", *((name, {"placement": name}) for name in ("fc_qkv", "fc", "qv"))),
    ),
    Row(
        "Table 6: HiLoRA",
        "table6_hilora",
        "a mixture is better than LoRA and no worse than HiRA",
        best(
            "stsb",
            *(
                (name, {"r1": r1, "r2": r2})
                for name, r1, r2 in (("half each", "8", "8"), ("LoRA", "0", "16"), ("HiRA", "16", "0"))
            ),
        ),
    ),
    Row(
        "Table 9, Figure 2: LoRA's rank",
        "table9_fig2_lora_rank",
        "a higher rank does not help LoRA",
        near(2, "stsb", _r(16), _r(64)),
    ),
    Row("Table 12: cost", "table12_cost", "HiRA takes less time and memory than LoRA", _table12),
    Row(
        "Table 13: rank of R",
        "table13_rank",
        "an R of low rank is worse than W0",
        best("stsb", ("W0", {"R": "w0"}), ("rank 3", {"R_rank": "3"})),
    ),
    Row(
        "Table 14: smoothed R",
        "table14_smooth",
        "a smoothed W0 is worse than W0",
        best("stsb", ("W0", {"R": "w0"}), ("smoothed", {"R": "w0_smooth"})),
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
        "HiRA's update is nearer to full fine-tuning's than LoRA's is",
        _directions,
    ),
    Row("Figure 6: accuracy against r", "fig6_rank", "HiRA gains from r", best("stsb", _r(16), _r(1))),
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
        "HyperAdapt is less than two points below LoRA and full fine-tuning",
        near(2, "average", *map(_method, ("hyperadapt", "lora", "full"))),
    ),
    Row(
        "Arithmetic table",
        "math10k",
        "HyperAdapt is level with LoRA, within two points",
        near(2, "wordmath", *map(_method, ("hyperadapt", "lora"))),
    ),
    Row(
        "Commonsense table",
        "commonsense170k",
        "LoRA is ahead of HyperAdapt",
        lambda folder: best("average", _method("lora"), _method("hyperadapt"))(
            HERE / "hira" / "table1_commonsense170k"
        ),
    ),
    Row(
        "Figures 3, 4: directions of the update",
        "fig3_fig4_spectra",
        "HyperAdapt moves nearly all directions, LoRA few",
        _normalised,
    ),
    Row("Figure 5: learning rate", "fig5_lr_sensitivity", "HyperAdapt is best from 3e-4 to 3e-3", _rates),
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
    return f"\n\n### HiRA (ICLR 2025)\n\n{hira}\n\n### HyperAdapt (arXiv 2509.18629)\n\n{hyperadapt}\n\n"


def main() -> None:
    file = HERE / "README.md"
    before, start, rest = file.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        sys.exit(f"error: findings: the tables stand between {START} and {END}, got {file} without them")
    file.write_text(before + start + tables() + end + after, encoding="utf-8")


if __name__ == "__main__":
    main()
