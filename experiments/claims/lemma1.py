"""Which weights' updates reach Lemma 1's bound, min(2 rank(W), n, k), in runs that `highrank analyze` has measured.

    python experiments/claims/lemma1.py RUN RUN        # runs of HyperAdapt

Ranks are numerical, #{σ > max(n, k) ε σ₁} with ε of float32.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from common import arguments, report

from highrank.base.errors import UserError


def main(words: Sequence[str] | None = None) -> None:
    args = arguments(__doc__).parse_intermixed_args(words)
    by_part: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for folder in args.words:
        file = Path(folder) / "analysis" / "statistics.json"
        if not file.is_file():
            raise UserError(f"lemma1: a run must have been analysed, got no {file}; first: highrank analyze {folder}")
        for view in json.loads(file.read_text())["views"]:
            bound = min(2 * view["base_rank"], view["out_features"], view["in_features"])
            by_part[view["part"]].append((view["base_rank"], bound, view["rank"]))
    rows = []
    for part, found in by_part.items():
        spans = [" to ".join(str(n) for n in sorted({min(ns), max(ns)})) for ns in zip(*found, strict=True)]
        reached = sum(rank == bound for _, bound, rank in found)
        rows.append([part, *spans, f"{reached} of {len(found)}"])
    args.words = [Path(folder).name for folder in args.words]
    report(args, ["part", "rank of W", "bound", "rank of ΔW", "at the bound"], rows, by_part)


if __name__ == "__main__":
    main()
