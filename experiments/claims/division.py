"""How many entries of W differ after W' is divided by what W was multiplied with, for trained runs and each dtype.

    python experiments/claims/division.py RUN RUN        # finished runs of HyperAdapt, or of HiRA with R = W0

W' = W ⊙ F, with F = a bᵀ or 1 + A B in float32. W' is what `merge` writes: computed in float32, rounded to the base's dtype. The
division is in float32, its result is rounded to the dtype. "steps": by how many neighbouring numbers of the dtype an entry is
off, at most.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from common import arguments, report
from torch import Tensor

from highrank.base.errors import UserError
from highrank.train.saved import load_run

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def order(x: Tensor) -> Tensor:
    """Returns the place of each number among all numbers of its dtype."""
    bits = x.contiguous().view(BITS[x.dtype]).long()
    return torch.where(bits < 0, torch.iinfo(BITS[x.dtype]).min - bits, bits)


@torch.no_grad()
def measure(folder: Path, dtype: str) -> dict[str, float]:
    run, _, adapters = load_run(folder, [f"model.dtype={dtype}"])
    if run.method.name != "hyperadapt" and not (run.method.name == "hira" and run.method_cfg.R == "w0"):
        raise UserError(f"division: W' is W times something for hyperadapt and hira R=w0, got {run.method_cfg}")
    entries = differ = off = lost = 0
    smallest, before = float("inf"), 0
    for view in adapters.views:
        adapter, W = adapters.by_view[view.name], adapters.base_weight(view).detach()
        factor = adapter.effective_weight(torch.ones_like(W, dtype=torch.float32))
        merged = adapter.effective_weight(W.float()).to(W.dtype)
        again = (merged.float() / factor).to(W.dtype)
        entries += W.numel()
        differ += int((again != W).sum())
        lost += int((~again.isfinite()).sum())
        off = max(off, int((order(again) - order(W)).abs().max()))
        smallest = min(smallest, float(factor.abs().min()))
        before += int((merged == W).sum())
    return {
        "method": run.method.name,
        "dtype": dtype,
        "entries": entries,
        "differ": differ,
        "steps": off,
        "not finite": lost,
        "smallest factor": smallest,
        "left by merging": before,
    }


def main(words: Sequence[str] | None = None) -> None:
    parser: argparse.ArgumentParser = arguments(__doc__)
    parser.add_argument("--dtypes", default="float32,bfloat16,float16")
    args = parser.parse_intermixed_args(words)
    results = [measure(Path(folder), dtype) for folder in args.words for dtype in args.dtypes.split(",")]
    rows = [
        [
            found["method"],
            found["dtype"],
            f"{100 * found['differ'] / found['entries']:.2f} %",
            found["steps"],
            found["not finite"],
            f"{found['smallest factor']:.3g}",
            f"{100 * found['left by merging'] / found['entries']:.1f} %",
        ]
        for found in results
    ]
    columns = ["method", "dtype", "differ", "steps", "not finite", "smallest |F|", "W' = W already"]
    args.words = [Path(folder).name for folder in args.words]
    report(args, columns, rows, results)


if __name__ == "__main__":
    main()
