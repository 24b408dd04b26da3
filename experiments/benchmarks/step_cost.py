"""Time, saved tensors and peak memory of one training step, over the same step of the frozen model.

    python experiments/benchmarks/step_cost.py --json out.json

Rows: each method as we compute it, as PEFT does, and as its paper lists it, with W' written out ("listing"). Frozen step:
forward, and backward to the output of the input embeddings; nothing trains. Adapter sides: forward, backward, and AdamW
on the adapter's parameters. All sides share the frozen weights, the batch and the loss (ours, on the second half of each
row), and start from the same parameters, moved off their start: their losses must agree, and the script says so if not.

For each method a round is the frozen step, ours, PEFT's and the listing's, once each in shuffled order. A ratio is to the
frozen step of the same round; the table has medians and quartiles.
"""

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    FROZEN,
    Case,
    Gap,
    Step,
    add_ours,
    add_peft,
    arguments,
    cases,
    environment,
    interleave,
    model_arguments,
    note,
    over,
    peak_bytes,
    random_batch,
    random_model,
    ratio,
    same_weights,
    saved_bytes,
    show_environment,
    show_table,
    summary,
    write_json,
)
from torch import Tensor

from highrank.base.registry import load

# --- the papers' listings: W' of each method, built in every step; `m` is an adapter with the parameters -------------


def hyperadapt(m: Any, W: Tensor) -> Tensor:
    return W * (m.a[:, None] @ m.b[None, :])


def hira(m: Any, W: Tensor) -> Tensor:
    return W * (1 + m.A @ m.B)


def hilora(m: Any, W: Tensor) -> Tensor:
    return W * (1 + m.A @ m.B) + m.cfg.s * (m.L1 @ m.L2)


def dora(m: Any, W: Tensor) -> Tensor:
    V = W + m.cfg.scaling * (m.B @ m.A)
    return (m.m / V.norm(dim=1).detach())[:, None] * V


def vera(m: Any, W: Tensor) -> Tensor:
    A, B = m.shared_tensors.A[:, : W.shape[1]], m.shared_tensors.B[: W.shape[0]]
    return W + (m.lambda_b[:, None] * B) @ (m.lambda_d[:, None] * A)


def boft(m: Any, W: Tensor) -> Tensor:
    k, b = W.shape[1], m.R.shape[-1]
    S, eye = (m.R - m.R.mT) / 2, torch.eye(b, device=W.device)
    Q = torch.eye(k, device=W.device)
    for i, rotations in enumerate((eye - S) @ torch.linalg.inv(eye + S)):
        order = torch.arange(k, device=W.device)
        if i:  # in each group of b 2^i, the chunks of b/2 at even places first
            order = order.view(-1, 2**i, 2, b // 2).transpose(1, 2).flatten()
        Q = torch.block_diag(*rotations)[order][:, order] @ Q
    return m.s[:, None] * (W.to(Q.dtype) @ Q.T)


def abba(m: Any, W: Tensor) -> Tensor:
    return W + m.cfg.scaling * (m.B1 @ m.A1) * (m.B2 @ m.A2)


def boha(m: Any, W: Tensor) -> Tensor:
    return W * (1 + (m.A @ m.B).transpose(1, 2).reshape(W.shape))


def gralora(m: Any, W: Tensor) -> Tensor:
    q = m.cfg.r // m.cfg.K
    A, B = m.A.unflatten(2, (-1, q)), m.B.unflatten(1, (-1, q))
    return W + m.cfg.scaling * torch.einsum("jciq,ijqo->iojc", A, B).reshape(W.shape)


def diablo(m: Any, W: Tensor) -> Tensor:
    return W + torch.block_diag(*m.D)


def lokr(m: Any, W: Tensor) -> Tensor:
    w1, w2 = m.factors()
    return W + torch.kron(w1, w2[0] if len(w2) == 1 else w2[0] @ w2[1])


def oft(m: Any, W: Tensor) -> Tensor:
    turn = m.turn()
    R = torch.eye(W.shape[1], device=W.device) + torch.block_diag(*turn.expand(W.shape[1] // turn.shape[-1], -1, -1))
    return W.to(R.dtype) @ R.T


def defined(m: Any, W: Tensor) -> Tensor:
    """Where the paper writes W' as the method defines it."""
    return m.effective_weight(W)


LISTINGS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "hyperadapt": hyperadapt,
    "hira": hira,
    "hilora": hilora,
    "dora": dora,
    "vera": vera,
    "boft": boft,
    "abba": abba,
    "boha": boha,
    "gralora": gralora,
    "diablo": diablo,
    "loha": abba,
    "lokr": lokr,
    "oft": oft,
    **dict.fromkeys(("mora", "svft", "miss", "randlora", "delora", "fourierft"), defined),
}


def listing(method: str) -> type:
    """Returns the method with its forward replaced by the listing.

    Raises:
        Gap: for LoRA, whose paper computes two thin products beside W x, as we do.
    """
    if method not in LISTINGS:
        raise Gap("is the form of ours")
    cls, weight = load("methods", method), LISTINGS[method]

    def forward(self: Any, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight(self, W).to(x.dtype), bias)

    return type(f"{cls.__name__}Listing", (cls,), {"forward": forward})


# --- the benchmark --------------------------------------------------------------------


def build_sides(base: Any, batch: dict[str, Tensor], case: Case) -> tuple[dict[str, Step], dict[str, str]]:
    """Returns the steps by side, and for each side that does not exist the reason."""
    model = same_weights(base)
    adapters = add_ours(model, load("methods", case.method), case.fields)

    def peer() -> Any:
        return add_peft(same_weights(base), case.label, adapters)

    def listed() -> Any:
        model = same_weights(base)
        add_ours(model, listing(case.method), case.fields)
        return model

    sides, gaps = {FROZEN: Step(same_weights(base), batch), "ours": Step(model, batch)}, {}
    for name, build in (("PEFT", peer), ("listing", listed)):
        try:
            sides[name] = Step(build(), batch)
        except Gap as gap:
            gaps[name] = str(gap)
        except torch.OutOfMemoryError:
            gaps[name] = "out of memory"
    return sides, gaps


def measure(base: Any, batch: dict[str, Tensor], case: Case, args: Any) -> dict[str, Any]:
    """Returns per side: ratios of time, saved bytes and peak memory to the frozen step's, or the gap's name."""
    sides, gaps = build_sides(base, batch, case)
    saved, losses = {}, {}
    for name, step in list(sides.items()):
        try:
            saved[name], losses[name] = saved_bytes(step)
            step()
        except torch.OutOfMemoryError:
            if name == FROZEN:
                raise
            gaps[name] = "out of memory"
            del sides[name], step
        if name not in sides:  # here, where nothing holds the error's frames any more
            gc.collect()
            torch.cuda.empty_cache()
    tolerance = 1e-3 if args.dtype == "float32" else 3e-2  # in nats, over sums of other order and rounding
    for name in sides:
        if name != FROZEN and abs(losses[name] - losses.get("ours", losses[name])) > tolerance:
            note(f"WARNING {case.label}: {name} has loss {losses[name]:.5f}, ours {losses['ours']:.5f}")
    times = interleave(sides, args.rounds, args.warmups, args.device)
    peaks = {name: peak_bytes(step, args.device) for name, step in sides.items()}
    tokens = args.batch * args.sequence
    found: dict[str, Any] = {}
    for name in sides:
        seconds = summary(times[name])
        found[name] = {
            "time": over(times, name, FROZEN),
            "saved": saved[name] / saved[FROZEN],
            "peak": peaks[name] / peaks[FROZEN],
            "seconds": seconds,
            "tokens_per_second": tokens / seconds["median"],
            "saved_bytes": saved[name],
            "peak_bytes": peaks[name],
            "loss": losses[name],
        }
    return found | {name: {"gap": reason} for name, reason in gaps.items()}


def main(words: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=15)
    model_arguments(parser)
    parser.add_argument("--methods", help=f"joined by commas (default all: {','.join(c.key for c in cases())})")
    parser.add_argument("--r", type=int, default=16, help="rank (default 16)")
    parser.add_argument("--vera-r", type=int, default=256, help="VeRA's rank (default 256)")
    args = parser.parse_args(words)
    env = {"dtype": args.dtype, **environment(args.device)}
    show_environment("step_cost", env)
    base = random_model(args)
    batch = random_batch(args, base.config.vocab_size)
    c = base.config
    print(
        f"{args.shape}: {c.num_hidden_layers} layers, hidden {c.hidden_size}, intermediate {c.intermediate_size}, "
        f"vocabulary {c.vocab_size}; {args.batch} x {args.sequence} tokens; {args.rounds} rounds"
    )
    results, rows = {}, []
    for case in cases(args.methods, args.r, args.vera_r):
        found = results[case.key] = measure(base, batch, case, args)
        for side in ("ours", "PEFT", "listing"):
            at = found[side]
            if "gap" in at:
                rows.append([case.label, side, f"– ({at['gap']})", "–", "–", "–", ""])
                continue
            goal = "{:.2f}, {:.2f}".format(*case.goals) if case.goals and side == "ours" else ""
            speed = f"{at['tokens_per_second']:.0f}"
            rows.append([case.label, side, ratio(at["time"]), f"{at['saved']:.3f}", f"{at['peak']:.3f}", speed, goal])
        results[case.key]["goals"] = case.goals and dict(zip(("time", "saved"), case.goals, strict=True))
        note(f"{case.label}: {ratio(found['ours'].get('time'))}")
        write_json(args, "step_cost", env, results)  # after each, so that what is measured stays if a later one fails
        if args.device.startswith("cuda"):
            gc.collect()
            torch.cuda.empty_cache()
    show_table(["method", "side", "step (quartiles)", "saved", "peak memory", "tokens/s", "goals: step, saved"], rows)


if __name__ == "__main__":
    main()
