"""Seconds of a forward pass after merging, over those of the bare model: on a prompt, and on one token.

    python experiments/benchmarks/merged_latency.py --json out.json
    python experiments/benchmarks/merged_latency.py --methods hyperadapt,hira --dtype bfloat16

Sides: the bare model; a copy of it, which shows what the noise is; per method a copy into which its adapter was merged and then
taken off; and the same adapter acting on the bare weights. In each round every side runs once, in shuffled order; a ratio is the
median over rounds.
"""

import argparse
import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from common import (
    add_ours,
    arguments,
    cases,
    environment,
    interleave,
    model_arguments,
    over,
    random_model,
    ratio,
    same_weights,
    show_environment,
    show_table,
    write_json,
)
from torch import Tensor

from highrank.base.registry import load

BARE = "bare model"


@torch.inference_mode()
def forward(model: Any, ids: Tensor) -> None:
    model(input_ids=ids, use_cache=False)


def sides_of(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the models by name, in evaluation mode."""
    bare = random_model(args)
    models = {BARE: bare, "a copy": copy.deepcopy(bare)}
    for case in cases(args.methods, r=args.r):
        method = load("methods", case.method)
        models[f"{case.label}, acting"] = add_ours(same_weights(bare), method, case.fields).model
        merged = add_ours(copy.deepcopy(bare), method, case.fields)
        merged.merge()
        models[f"{case.label}, merged"] = merged.unload()
    return {name: model.eval() for name, model in models.items()}


def main(words: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=25)
    model_arguments(parser)
    parser.add_argument("--methods", default="hyperadapt,hira,lora")
    parser.add_argument("--r", type=int, default=16, help="of the methods that have one (default 16)")
    args = parser.parse_args(words)
    env = {"dtype": args.dtype, **environment(args.device)}
    show_environment("merged_latency", env)
    models, rng = sides_of(args), torch.Generator().manual_seed(0)
    results: dict[str, dict[str, Any]] = {}
    for work, shape in {"prompt": (args.batch, args.sequence), "token": (1, 1)}.items():
        ids = torch.randint(models[BARE].config.vocab_size, shape, generator=rng).to(args.device)
        sides = {name: partial(forward, model, ids) for name, model in models.items()}
        times = interleave(sides, args.rounds, args.warmups, args.device)
        results[work] = {name: over(times, name, BARE) for name in models if name != BARE}
    rows = [[name, *(ratio(of[name]) for of in results.values())] for name in results["prompt"]]
    show_table(["side", *(f"{work}, over the bare model (quartiles)" for work in results)], rows)
    write_json(args, "merged_latency", env, results)


if __name__ == "__main__":
    main()
