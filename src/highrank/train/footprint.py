"""How much memory a run takes, estimated before any weight loads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from highrank.base.allocator import heap_share
from highrank.config.run_config import Run
from highrank.model.backbones import DTYPES, on_cpu
from highrank.model.placement import is_linear
from highrank.model.quantised import BITS, linears
from highrank.model.transformers_internals import setting, text_config

PROGRAM = 2**29
"""Bytes of a process with Python and all that a run imports, before it holds a weight: 0.45 to 0.55 GiB were measured."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of the training examples, prompt and target together."""

    mean: float
    longest: float
    target: float = 0
    """Of the longest target."""
    texts: Sequence[float] = ()
    """Of each text before it is cut; empty where there is none."""


@dataclass(frozen=True)
class Evaluation:
    """What is asked at a time."""

    rows: int
    new: int
    """Tokens beside a text: written ones at most, and virtual ones."""


def memory(
    run: Run, model: Any, lengths: Lengths, asked: Evaluation, trained: int, frozen_extra: int
) -> dict[str, int]:
    """Returns estimated bytes per part, and `peak`, the most at any time: training and evaluation take turns.

    program:    what is imported, nothing on a GPU
    weights:    the backbone, and what a method holds beside it
    adapters:   4 bytes each for value, gradient, two moments and the optimizer's step of what trains
    training:   what autograd keeps of the longest batch: per token what every linear layer reads and writes, n + k numbers,
                four fifths of it where no weight changes; at targets the logits and their gradient
    evaluation: keys and values of a batch's texts where the model writes them, and what one block computes of them

    All but program, weights and values take as much of the heap as `heap_share` says. With `checkpoint_activations` training
    keeps a block's input per block and one block's own, and the heap's share of what is computed in between.
    """
    core, config = run.core, text_config(model.config)
    here = on_cpu(str(run.trainer.get("accelerator", "auto")))
    share = heap_share() if here else 1.0
    width = 2 if run.model["dtype"] != "float32" or "16" in str(run.trainer.get("precision")) else 4
    layers = setting(config, "num_hidden_layers") or 1
    hidden = setting(config, "hidden_size") or 0
    head = model.get_output_embeddings() if model.can_generate() else None
    touched = sum(sum(m.weight.shape) for m in model.modules() if is_linear(m) and m is not head)
    vocabulary = 0 if head is None else head.weight.shape[0]
    row = lengths.mean if core.packing else lengths.longest
    kept = core.batch_size * row * touched * (1 if run.method.family.changes_weights else 0.8)
    training = share * kept
    if core.checkpoint_activations:
        training += core.batch_size * row * hidden * layers + kept / layers - kept
    training += share * 2 * core.batch_size * lengths.target * vocabulary
    evaluation = asked.rows * lengths.longest * touched / layers
    if head is not None:
        evaluation += asked.rows * (lengths.longest + asked.new) * 2 * _key_width(config) * layers
    parts = {
        "program": PROGRAM if here else 0,
        "weights": weight_bytes(model, run.model) + 4 * frozen_extra,
        "adapters": int(trained * (4 + 16 * share)),
        "training": int(training * width),
        "evaluation": int(evaluation * width * share),
    }
    held = parts["program"] + parts["weights"] + parts["adapters"]
    return {**parts, "peak": held + max(parts["training"], parts["evaluation"])}


def weight_bytes(model: Any, spec: Mapping[str, Any]) -> int:
    """Returns the bytes of a backbone's weights, quantised layers in their own bits."""
    quantised = sum(m.weight.numel() for _, m in linears(model)) if spec.get("quantize") else 0
    plain = sum(p.numel() for p in model.parameters()) - quantised
    return plain * DTYPES[spec["dtype"]].itemsize + int(quantised * BITS.get(spec.get("quantize", ""), 0) / 8)


def _key_width(config: Any) -> int:
    """Returns how many numbers of a token's key a block keeps, over all heads."""
    heads = setting(config, "num_attention_heads") or 1
    size = setting(config, "head_dim") or (setting(config, "hidden_size") or 0) // heads
    return int((setting(config, "num_key_value_heads") or heads) * size)
