"""Statistics of an analysed run: per weight, means over parts and layers, the errors of theorem 1."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from highrank.analysis import statistics
from highrank.analysis.spectra import Spectra
from highrank.analysis.statistics import Values
from highrank.base.saved import read_results
from highrank.config.run_config import Run

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""r at which the two errors of HiRA's theorem 1 are tabulated."""
MEANS = {
    "rank": "rank",
    "normalized_rank": "norm. rank",
    "normalized_rank_relative": "relative",
    "count_above": "σ>.005",
    "energy": "energy",
    "effective_rank": "eff. rank",
    "largest": "σ₁",
    "error": "error",
}
"""Statistics that are averaged over weights, with their column heads."""


@dataclass(frozen=True)
class Analysis:
    """One analysed run."""

    folder: Path
    run: Run
    spectra: Spectra
    rows: list[dict[str, Any]]
    """One per adapted weight, by layer and part: where it is, and its statistics."""

    def values(self, kind: str, row: dict[str, Any]) -> Values:
        """Returns the singular values of one weight: of `delta`, `base` or `ratio`."""
        return self.spectra.values[f"{kind}/{row['name']}"]

    @property
    def base(self) -> tuple[Any, ...]:
        """What two runs share whose updates can be compared."""
        model = read_results(self.folder)["model"]
        return (model["name"] if model["kind"] == "random" else "", model["sha"], self.run.model["shuffled"])

    @property
    def summary(self) -> dict[str, Any]:
        """What statistics.json holds."""
        content = {
            "key": self.spectra.key,
            "method": {"name": self.run.method.name, **asdict(self.run.method_cfg)},
            "thresholds": {
                "normalized_rank": statistics.NORMALIZED_RANK_THRESHOLD,
                "count_above": statistics.COUNT_THRESHOLD,
                "rank": "max(n, k) eps(fp32) sigma_1",
            },
            "mean": means(self.rows),
            "parts": by(self.rows, "part"),
            "layers": by(self.rows, "layer"),
            "views": self.rows,
        }
        return content if self.run.method.family.keeps_base else {**content, "expressive": expressive(self)}


def describe(view: dict[str, Any], spectra: Spectra) -> dict[str, Any]:
    """Returns the statistics of one adapted weight, whose view is given as in adapter.json."""
    name, shape = view["name"], (view["out_features"], view["in_features"])
    delta, base = spectra.values[f"delta/{name}"], spectra.values[f"base/{name}"]
    base_rank = statistics.numerical_rank(base, shape)
    row = {
        **{key: view[key] for key in ("name", "part", "layer", "out_features", "in_features")},
        "rank": statistics.numerical_rank(delta, shape),
        "normalized_rank": statistics.normalized_rank(delta, base_rank),
        "normalized_rank_relative": statistics.normalized_rank(delta, base_rank, relative=True),
        "count_above": statistics.count_above(delta),
        "energy": statistics.energy(delta),
        "effective_rank": statistics.effective_rank(delta),
        "largest": float(delta[0]),
        "error": spectra.notes[f"delta/{name}"]["error"],
        "base_rank": base_rank,
        "base_largest": float(base[0]),
        "base_effective_rank": statistics.effective_rank(base),
    }
    if f"ratio/{name}" in spectra.values:
        quotient, notes = spectra.values[f"ratio/{name}"], spectra.notes[f"ratio/{name}"]
        row |= {
            "ratio_rank": statistics.numerical_rank(quotient, shape),
            "ratio_effective_rank": statistics.effective_rank(quotient),
            "ratio_error": notes["error"],
            "masked": int(notes["masked"]),
            "left_out": notes["left_out"],
        }
    return row


def means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns the mean of every statistic over weights, and their number; of `error` the largest."""
    averages = {key: sum(row[key] for row in rows) / len(rows) for key in (*MEANS, "base_rank")}
    return {**averages, "error": max(row["error"] for row in rows), "weights": len(rows)}


def by(rows: Sequence[dict[str, Any]], key: str) -> dict[str, dict[str, float]]:
    """Returns the means over the weights of each part, or layer."""
    groups = dict.fromkeys(row[key] for row in rows)
    return {str(group): means([row for row in rows if row[key] == group]) for group in groups}


def errors_at(full: Analysis, row: dict[str, Any], r: int) -> tuple[float, float]:
    """Returns HiRA's bound and LoRA's error at rank r for one weight of a full fine-tuning run (HiRA, theorem 1)."""
    bound = statistics.expressive_bound(full.values("ratio", row), full.values("base", row), r, row["left_out"])
    return bound, statistics.low_rank_error(full.values("delta", row), r)


def expressive(full: Analysis) -> list[dict[str, float]]:
    """Returns, per r, the means over weights of HiRA's bound and LoRA's error, and the share of weights with the former
    below the latter."""
    limit = min(min(row["out_features"], row["in_features"]) for row in full.rows)
    rows = []
    for r in (r for r in RANKS if r < limit):
        pairs = [errors_at(full, row, r) for row in full.rows]
        rows.append(
            {
                "r": r,
                "hira_bound": sum(bound for bound, _ in pairs) / len(pairs),
                "lora_error": sum(error for _, error in pairs) / len(pairs),
                "share_below": sum(bound < error for bound, error in pairs) / len(pairs),
            }
        )
    return rows
