"""Time of W ⊙ (A B), the product of HiRA that every step makes twice: by PyTorch's operations, and by the Triton kernel.

    python experiments/benchmarks/hadamard.py --json out.json

The sides take turns; W is bf16, A and B are fp32, the result is bf16. Without a GPU there is one side.
"""

from collections.abc import Callable, Sequence

import torch
from common import arguments, environment, interleave, over, ratio, show_environment, show_table, summary, write_json
from torch import Tensor

from highrank.model import kernels


def sides_of(W: Tensor, A: Tensor, B: Tensor) -> dict[str, Callable[[], Tensor]]:
    sides = {"plain": lambda: (A @ B).mul_(W).to(W.dtype)}
    if kernels.HAS_TRITON and W.is_cuda:
        sides["Triton"] = lambda: kernels.hadamard(W, A, B, False, W.dtype)
    return sides


def main(words: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=50)
    parser.add_argument("--shapes", default="4096x4096,14336x4096,4096x14336", help="of W (default Llama-3-8B's)")
    parser.add_argument("--ranks", default="16,32,128", help="joined by commas")
    args = parser.parse_args(words)
    env = {"dtype": "bfloat16", **environment(args.device)}
    show_environment("hadamard", env)
    rows, results = [], {}
    for n, k in (map(int, shape.split("x")) for shape in args.shapes.split(",")):
        for r in map(int, args.ranks.split(",")):
            W = torch.randn(n, k, device=args.device, dtype=torch.bfloat16)
            A, B = torch.randn(n, r, device=args.device), torch.randn(r, k, device=args.device)
            times = interleave(sides_of(W, A, B), args.rounds, 3, args.device)
            found = results[f"{n}x{k}, r={r}"] = {name: summary(each) for name, each in times.items()}
            speed = over(times, "plain", "Triton") if "Triton" in times else None
            rows.append([f"{n} x {k}", r, *(f"{1000 * each['median']:.3f}" for each in found.values()), ratio(speed)])
            write_json(args, "hadamard", env, results)
    show_table(["W", "r", *(f"{name}, ms" for name in times), "plain over Triton"], rows)


if __name__ == "__main__":
    main()
