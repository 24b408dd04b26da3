"""How alike the first gradients of HiRA are with R = W0 and with other R, and how near its first step is to full fine-tuning's.

    python experiments/claims/gradient.py model=smollm2_135m task=wordmath batch_size=8

At the start A = 0, so W' = W for every R, one batch gives one G = ∂L/∂W, B is the same, and ∂A = (R ⊙ G) Bᵀ differs by R alone.
Rows and columns: the median over weights and seeds of the cosine of ∂A. "with G": of the update that a step of plain gradient
descent makes, R ⊙ (∂A B), with G. "size": ‖∂A‖ over that of R = W0.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from common import arguments, report, subject, words_of
from torch import Tensor

from highrank.config.words import compose_run
from highrank.model.placement import weight_of
from highrank.train.build import load_plain

CHOICES = ("w0", "random_scaled", "random_uniform", "ones")


def cosine(x: Tensor, y: Tensor) -> float:
    return float(F.cosine_similarity(x.flatten().double(), y.flatten().double(), dim=0))


def measure(words: Sequence[str]) -> list[dict[str, dict[str, float]]]:
    """Returns per weight, for every R: the cosines with every other, with G, and the gradient's size over that of R = W0."""
    run = compose_run([*words, "method=hira"])
    base = load_plain(run, run.make_task())
    dense: dict[str, Tensor] = {}
    gradients: dict[str, dict[str, Tensor]] = {}
    steps: dict[str, dict[str, float]] = {}
    for R in CHOICES:
        with subject([*words, "method=hira", f"R={R}"], 1, base) as at:
            views = at.adapters.views
            if not dense:
                weights = {v.name: weight_of(at.adapters.model.get_submodule(v.path).base) for v in views}
                with at.adapters.disabled():
                    for W in weights.values():
                        W.requires_grad_(True)
                    at.loss(at.batches[0]).backward()
                for name, W in weights.items():
                    dense[name], W.grad = W.grad, None
                    W.requires_grad_(False)
            at.loss(at.batches[0]).backward()
            for view in views:
                A = at.adapters.by_view[view.name].A
                gradients.setdefault(view.name, {})[R] = A.grad
                with torch.no_grad():
                    A.copy_(A.grad)  # ΔW is then R ⊙ (∂A B)
                steps.setdefault(view.name, {})[R] = cosine(at.adapters.delta_weight(view), dense[view.name])
    return [
        {
            R: {
                **{other: cosine(of[R], of[other]) for other in CHOICES},
                "with G": steps[name][R],
                "size": float(of[R].norm() / of["w0"].norm()),
            }
            for R in CHOICES
        }
        for name, of in gradients.items()
    ]


def main(words: Sequence[str] | None = None) -> None:
    args = arguments(__doc__, seeds=3).parse_intermixed_args(words)
    given = words_of(args.words, model="smollm2_135m", task="wordmath", placement="fc_qkv", model__dtype="float32")
    found = [weight for seed in range(args.seeds) for weight in measure([*given, f"seed={seed}"])]
    columns = [*CHOICES, "with G", "size"]
    quantiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    results = {
        R: {
            c: torch.tensor([weight[R][c] for weight in found], dtype=torch.float64).quantile(quantiles).tolist()
            for c in columns
        }
        for R in CHOICES
    }
    rows = [[R, *(f"{results[R][c][1]:.3g}" for c in columns)] for R in CHOICES]
    report(args, ["R", *columns], rows, {"weights": len(found), "quartiles": results})


if __name__ == "__main__":
    main()
