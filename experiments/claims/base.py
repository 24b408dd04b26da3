"""Writes a base to train on with path=DIR: fewer layers, random weights, or weights of low rank.

    python experiments/claims/base.py DIR model=smollm2_135m --layers 3             # the first layers, as trained
    python experiments/claims/base.py DIR model=smollm2_135m --layers 3 --random 0  # the same shape, weights drawn anew
    python experiments/claims/base.py DIR model=minilm_l6 --rank 32                 # every linear weight cut to rank 32

Weights are float32. The cut is W's best approximation of that rank, U_v Σ_v V_vᵀ; embeddings and norms stay.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from highrank.base.errors import UserError
from highrank.config.words import compose_run
from highrank.model.backbones import load_backbone
from highrank.model.placement import resolve, weight_of


@torch.no_grad()
def cut_to_rank(model: Any, rank: int) -> int:
    """Cuts every linear weight of the blocks to a rank, in fp64; returns how many there are."""
    views = resolve(model, "all")
    for view in views:
        W = weight_of(model.get_submodule(view.path), view.rows)
        if rank > min(W.shape):
            raise UserError(f"base: a rank must be <= min(out, in) = {min(W.shape)}, got --rank {rank} for {view.name}")
        U, S, Vt = torch.linalg.svd(W.double(), full_matrices=False)
        W.copy_((U[:, :rank] * S[:rank]) @ Vt[:rank])
    return len(views)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("words", nargs="*", help="words of run.py: model=, task=, path=")
    parser.add_argument("--layers", type=int, help="how many of the first layers to keep (default all)")
    parser.add_argument("--random", type=int, metavar="SEED", help="draw the weights anew, as the model's class does")
    parser.add_argument("--rank", type=int, help="cut every linear weight to this rank")
    args = parser.parse_intermixed_args(words)
    if args.out.exists():
        raise UserError(f"base: the output folder must be new, got {args.out}; choose another")
    run = compose_run([*args.words, "model.dtype=float32"])
    task = run.make_task()
    backbone = load_backbone(run.model, run.core.path, task.kind, task.num_labels)
    model = backbone.model
    if args.layers is not None:
        if not 1 <= args.layers <= model.config.num_hidden_layers:
            raise UserError(f"base: layers must be 1 to {model.config.num_hidden_layers}, got --layers {args.layers}")
        state = model.state_dict()
        model.config.num_hidden_layers = args.layers
        model = type(model)(model.config)
        model.load_state_dict({key: state[key] for key in model.state_dict()})
    if args.random is not None:
        torch.manual_seed(args.random)
        model = type(model)(model.config)
    if args.rank is not None:
        print(f"cut {cut_to_rank(model, args.rank)} weights to rank {args.rank}")
    # a classifier's head is new in every run
    (model if model.can_generate() else model.base_model).save_pretrained(args.out)
    backbone.tokenizer.save_pretrained(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
