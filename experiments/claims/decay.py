"""What weight decay on HyperAdapt's a and b does: towards 0, as AdamW would have it, and towards 1.

    python experiments/claims/decay.py model=minilm_l6 task=glue/stsb batch_size=16

A step moves a and b by lr · decay of the way to 0 or to 1, before AdamW's own step. The head of a classifier never decays. "share
pulled away": 1 - (1 - lr · decay)^(2 steps), what decay towards 0 alone would take off W'. Means over seeds.
"""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import torch
from common import Subject, arguments, report, subject, words_of

ARMS = ((0.0, 0.0), (0.01, 0.0), (0.1, 0.0), (1.0, 0.0), (1.0, 1.0))
"""Decay, and towards what."""


def size_of(at: Subject) -> float:
    """Returns ‖W'‖ / ‖W‖ over all weights."""
    new = old = 0.0
    with torch.no_grad():
        for view in at.adapters.views:
            W = at.adapters.base_weight(view)
            new += float(at.adapters.by_view[view.name].effective_weight(W).square().sum())
            old += float(W.square().sum())
    return (new / old) ** 0.5


def measure(words: Sequence[str], steps: int, lr: float, decay: float, towards: float) -> dict[str, Any]:
    with subject([*words, "method=hyperadapt"], steps) as at:
        vectors = [p for adapter in at.adapters.by_view.values() for p in adapter.parameters()]

        @torch.no_grad()
        def pull() -> None:
            for vector in vectors:
                vector.lerp_(torch.full_like(vector, towards), lr * decay)

        losses = list(at.train(steps, lr, lr, pull))
        return {"held_out": at.held_out_loss(), "size": size_of(at), "losses": losses}


def main(words: Sequence[str] | None = None) -> None:
    args = arguments(__doc__, steps=60, seeds=3, lr=1e-2).parse_intermixed_args(words)
    given = words_of(
        args.words,
        model="minilm_l6",
        task="glue/stsb",
        protocol="clean",
        placement="all",
        model__dtype="float32",
        protocol__num_validation=256,
    )
    results = [
        {
            "decay": decay,
            "towards": towards,
            "runs": [
                measure([*given, f"seed={seed}"], args.steps, args.lr, decay, towards) for seed in range(args.seeds)
            ],
        }
        for decay, towards in ARMS
    ]
    rows = []
    for found in results:
        held, sizes = ([run[key] for run in found["runs"]] for key in ("held_out", "size"))
        spread = f" ± {stdev(held):.3f}" if len(held) > 1 else ""
        pulled = 1 - (1 - args.lr * found["decay"]) ** (2 * args.steps) if not found["towards"] else 0
        towards = f"{found['towards']:g}" if found["decay"] else "–"
        rows.append(
            [f"{found['decay']:g}", towards, f"{pulled:.3f}", f"{mean(sizes):.3f}", f"{mean(held):.3f}{spread}"]
        )
    report(args, ["decay", "towards", "share pulled away", "‖W'‖ / ‖W‖", "held-out loss"], rows, results)


if __name__ == "__main__":
    main()
