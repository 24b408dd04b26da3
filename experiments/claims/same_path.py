"""Whether HyperAdapt and HiRA of rank 2 learn the same, started in the same point and given the same batches.

    python experiments/claims/same_path.py model=minilm_l6 task=glue/stsb batch_size=16

W' = W ⊙ (a bᵀ) is HiRA with A = [a, -1] and B = [bᵀ; 1ᵀ]. "held": the second column of A and row of B stay as they are.
"all": both columns and rows train. "own start": A = 0, B random. A classifier's head has HyperAdapt's rate in every arm. In
float64, AdamW without decay. Distance: ‖ΔW - ΔW_HyperAdapt‖ / ‖ΔW_HyperAdapt‖ over all weights;
medians over seeds.
"""

from collections.abc import Sequence
from statistics import median

import torch
from common import Subject, arguments, report, subject, words_of
from torch import Tensor


def start_as_hyperadapt(at: Subject) -> None:
    """Sets A = [1, -1] and B = [1; 1], where HyperAdapt begins."""
    with torch.no_grad():
        for adapter in at.adapters.by_view.values():
            adapter.A.copy_(torch.tensor([1.0, -1.0]).expand_as(adapter.A))
            adapter.B.fill_(1.0)


def hold_second(at: Subject) -> None:
    for adapter in at.adapters.by_view.values():
        adapter.A.grad[:, 1] = 0
        adapter.B.grad[1] = 0


def updates(at: Subject) -> Tensor:
    """Returns ΔW of all weights, in one vector."""
    with torch.no_grad():
        pairs = [(at.adapters.by_view[v.name], at.adapters.base_weight(v)) for v in at.adapters.views]
        return torch.cat([(adapter.effective_weight(W) - W).flatten() for adapter, W in pairs])


ARMS = {  # method, its rate over HyperAdapt's, whether it begins where HyperAdapt does, and holds the second factors
    "HyperAdapt": ("hyperadapt", 1, False, False),
    "HiRA r=2, held": ("hira", 1, True, True),
    "HiRA r=2, all": ("hira", 1, True, False),
    "HiRA r=2, all, half the rate": ("hira", 0.5, True, False),
    "HiRA r=2, own start": ("hira", 1, False, False),
}


def main(words: Sequence[str] | None = None) -> None:
    args = arguments(__doc__, steps=20, seeds=3, lr=3e-3).parse_intermixed_args(words)
    given = words_of(
        args.words, model="minilm_l6", task="glue/stsb", protocol="clean", placement="all", model__dtype="float32"
    )
    marks = sorted({1, 2, args.steps // 4, args.steps} - {0})
    results: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    for seed in range(args.seeds):
        path: dict[int, Tensor] = {}
        for arm, (method, factor, shared, held) in ARMS.items():
            fields = ["r=2"] if method == "hira" else []
            with subject([*given, f"method={method}", *fields, f"seed={seed}"], args.steps) as at:
                at.adapters.model.double()
                if shared:
                    start_as_hyperadapt(at)
                distances, losses = {}, []
                hold = (lambda at=at: hold_second(at)) if held else (lambda: None)
                for step, loss in enumerate(at.train(args.steps, factor * args.lr, args.lr, hold), 1):
                    losses.append(loss)
                    if step in marks:
                        dW = updates(at)
                        path.setdefault(step, dW)
                        distances[step] = float((dW - path[step]).norm() / path[step].norm())
                trained = at.adapters.num_trainable() // (2 if held else 1)
                results[arm].append({"distance": distances, "losses": losses, "trained": trained})
    columns = ["arm", "trained", *(f"distance, step {mark}" for mark in marks), "loss, last step"]
    rows = [
        [
            arm,
            f"{found[0]['trained']:,}",
            *(f"{median(run['distance'][mark] for run in found):.2g}" for mark in marks),
            f"{median(run['losses'][-1] for run in found):.4f}",
        ]
        for arm, found in results.items()
    ]
    report(args, columns, rows, results)


if __name__ == "__main__":
    main()
