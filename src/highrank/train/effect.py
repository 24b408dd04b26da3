"""Whether an adapter acts on the model: what would otherwise leave a run going with wrong numbers is an error.

A new version of a library can leave an adapter out of the computation, or put virtual tokens where none belong, and say
nothing. So the first step looks for each adapter's gradient, and evaluation decodes one prompt with the cache and without.
"""

import math
from collections.abc import Sequence
from typing import Any

import lightning
import torch
import transformers
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from highrank.base.errors import UserError
from highrank.model.adapters import Adapters, evaluating
from highrank.model.language import write
from highrank.model.placement import EXPERTS
from highrank.model.sharding import whole
from highrank.model.transformers_internals import cache_of

NEW_TOKENS = 6
"""How many tokens are decoded to see whether the cache serves them right."""
PACKED_TOKENS = 24
"""How many tokens of a text are looked at to see whether texts in one row are kept apart."""
ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-3}
"""By how much of the logits' spread decoding with the cache may differ from that without it, by the base's dtype."""
ROUNDING_16_BIT = 0.1
"""On SmolLM2-135M in bf16 it is up to 0.04; virtual tokens in front of every step make 0.06 to 0.5."""


class EveryAdapterLearns(Callback):
    """Looks at the first gradient of a fit: it must not be zero for any adapter."""

    def __init__(self) -> None:
        self.seen = False

    def on_before_backward(self, trainer: lightning.Trainer, module: Any, loss: Tensor) -> None:
        if not loss.requires_grad:
            raise _no_effect(module.adapters, list(module.adapters.by_view))

    def on_before_optimizer_step(self, trainer: lightning.Trainer, module: Any, optimizer: Any) -> None:
        if self.seen:
            return
        self.seen = True
        adapters = module.adapters
        # To some experts no token of a step may go: of a layer's, one at least learns.
        layers = {view.name: view.path.rpartition(".")[0] for view in adapters.views if view.part == EXPERTS}
        learning = {layers.get(name, name) for name, adapter in adapters.by_view.items() if _has_gradient(adapter)}
        if idle := [name for name in adapters.by_view if layers.get(name, name) not in learning]:
            raise _no_effect(adapters, idle)


class PacksExactly(Callback):
    """Looks, before the first step, whether examples that share a row are computed as they are alone."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        examples = trainer.train_dataloader.dataset
        check_packing(module.adapters, [examples[i].input_ids for i in range(min(3, len(examples)))])


@torch.no_grad()
def check_packing(adapters: Adapters, texts: Sequence[Sequence[int]]) -> None:
    """Checks on a few tokens of some texts that in one row they are computed as they are alone, and none sees another.

    Raises:
        UserError: if they are not: the model does not keep apart what begins again at position 0, or remembers.
    """
    model: Any = adapters.model
    device = next(model.parameters()).device
    rows = [torch.tensor([list(text[:PACKED_TOKENS])], device=device) for text in (*texts, *texts)]
    positions = torch.cat([torch.arange(row.shape[1], device=device) for row in rows])[None]
    try:
        with evaluating(model):
            apart = torch.cat([_logits(model, row, attention_mask=torch.ones_like(row)) for row in rows], 1)
            other = (rows[0] + 1) % model.get_input_embeddings().num_embeddings
            packed, moved = (
                _logits(model, torch.cat([first, *rows[1:]], 1), position_ids=positions) for first in (rows[0], other)
            )
        behind = slice(rows[0].shape[1], None)
        difference = float((packed - apart).abs().mean() / apart.std())
        seen = float((moved - packed)[:, behind].abs().mean() / apart.std())
        outcome = (
            f"a difference of {difference:.2%} of the logits' spread, {seen:.2%} where another text of the row changes"
        )
    except TypeError as error:
        difference, seen, outcome = math.inf, math.inf, str(error)
    allowed = ROUNDING.get(model.dtype, ROUNDING_16_BIT)
    if not (difference <= allowed and seen <= allowed / 100):
        raise UserError(
            f"packing: texts in one row must be computed as they are alone, got {outcome} (rounding: {allowed:.1%}) in "
            f"{_about(adapters)}; leave out packing=true"
        )


def _logits(model: Any, ids: Tensor, **where: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False, **where).logits
    return logits.float() if logits.dtype != torch.float64 else logits


def _has_gradient(adapter: Any) -> bool:
    gradients = [whole(p.grad) for p in adapter.parameters() if p.grad is not None]
    return any(bool(gradient.any()) for gradient in gradients)


def _no_effect(adapters: Adapters, idle: Sequence[str]) -> UserError:
    return UserError(
        f"{adapters.method.name}: every adapter must move the loss, got no gradient at {len(idle)} of "
        f"{len(adapters.by_view)} (first: {idle[0]}) in {_about(adapters)}; the model computes without them: leave them "
        "out with placement or layers, or use a version of transformers that this one was tested with"
    )


def _about(adapters: Adapters) -> str:
    return f"{type(adapters.model).__name__} with transformers {transformers.__version__}"


@torch.no_grad()
def check_decoding(adapters: Adapters, prompt: Sequence[int]) -> None:
    """Checks on one prompt that decoding with the cache and without it agree, for methods that add positions.

    Raises:
        UserError: if they do not.
    """
    if not adapters.num_positions:
        return
    ids = torch.tensor([list(prompt)], device=next(adapters.model.parameters()).device)
    difference, positions = _decode(adapters.model, ids)
    allowed = ROUNDING.get(adapters.model.dtype, ROUNDING_16_BIT)
    expected = adapters.num_positions + len(prompt) + NEW_TOKENS
    if not difference <= allowed or positions != expected:
        raise UserError(
            f"{adapters.method.name}: decoding with the cache must agree with decoding without it, got a difference of "
            f"{difference:.1%} of the logits' spread (rounding: {allowed:.1%} at most) and {positions} cached positions "
            f"instead of {expected} in {_about(adapters)}; use a version of transformers that this one was tested with"
        )


def _decode(model: Any, ids: Tensor) -> tuple[float, int]:
    """Returns how far the logits behind each of NEW_TOKENS greedy tokens differ without the cache, and its length.

    That is the mean |difference| over the logits' standard deviation.
    """
    decoded = write(model, ids, NEW_TOKENS + 1)
    sequence = decoded.sequences[:, :-1]
    logits = model(input_ids=sequence, attention_mask=torch.ones_like(sequence), use_cache=False).logits
    cached, plain = torch.stack(decoded.logits[1:], dim=1).float(), logits[:, ids.shape[1] :].float()
    return float((cached - plain).abs().mean() / plain.std()), cache_of(decoded).get_seq_length()
