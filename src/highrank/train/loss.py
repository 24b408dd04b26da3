"""The language-model loss, computed at supervised positions only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from highrank.data.encoding import IGNORED
from highrank.model.encoder_decoder import parted
from highrank.model.transformers_internals import is_encoder_decoder


def language_model_loss(
    model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, position_ids: Tensor | None = None
) -> tuple[Tensor, int]:
    """Returns the mean cross-entropy in nats over the supervised tokens, and their number.

    Position t predicts labels[:, t + 1]; labels equal to IGNORED carry no loss. The softmax is taken in fp32. Given
    position_ids that begin again within a row, the examples there are computed each by itself: without a mask,
    transformers builds one from them, in every layer the one of its kind. Of an encoder and a decoder in one, the decoder
    predicts every labelled token of a row, the encoder reads the others.
    """
    logits, targets, mask = _supervised(model, input_ids, attention_mask, labels, position_ids)
    return TokenCrossEntropy.apply(logits, targets[mask]), int(mask.sum())


@torch.no_grad()
def example_losses(model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> list[float]:
    """Returns, per row, the sum of the cross-entropy in nats over its supervised tokens: what `language_model_loss` is the
    mean of."""
    logits, targets, mask = _supervised(model, input_ids, attention_mask, labels)
    parts = zip(logits.split(TokenCrossEntropy.ROWS), targets[mask].split(TokenCrossEntropy.ROWS), strict=True)
    losses = [F.cross_entropy(part.to(_wide(part.dtype)), wanted, reduction="none") for part, wanted in parts]
    return [float(row.sum()) for row in torch.cat(losses).cpu().double().split(mask.sum(1).tolist())]


def _supervised(
    model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, position_ids: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the logits (N, V) of the supervised positions, what each position predicts, and where that is supervised."""
    if is_encoder_decoder(model.config):
        given, targets = parted(model, input_ids, attention_mask, labels, IGNORED)
    else:
        where = {"attention_mask": attention_mask} if position_ids is None else {"position_ids": position_ids}
        given, targets = {"input_ids": input_ids, **where}, F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    mask = targets != IGNORED
    with head_sees_only(model, mask):
        return model(**given, use_cache=False).logits, targets, mask


@contextmanager
def head_sees_only(model: Any, mask: Tensor) -> Iterator[None]:
    """Within it the model's output head gets the hidden states (N, D) of the N positions in `mask` (B, T), no others.

    The head itself, and whatever the architecture does to its logits (bias, scaling, soft-capping), stay the model's
    own; the cost of vocabulary times sequence is not paid for positions without a target.
    """
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: (args[0][mask], *args[1:]))
    try:
        yield
    finally:
        handle.remove()


class TokenCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of logits (N, V) against targets (N,), softmax in fp32, a few rows at a time.

    The gradient, softmax(logits) - onehot(targets) over N, is formed in the same pass and kept in the logits' dtype: no
    (N, V) tensor in fp32 ever exists, which for a large vocabulary is most of a small model's memory.
    """

    ROWS = 16

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        losses, grad = [], torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), TokenCrossEntropy.ROWS):
            rows = slice(start, start + TokenCrossEntropy.ROWS)
            log_probs = F.log_softmax(logits[rows], -1, dtype=_wide(logits.dtype))
            losses.append(F.nll_loss(log_probs, targets[rows], reduction="sum"))
            if grad is not None:
                probs = log_probs.exp_()
                probs.scatter_add_(1, targets[rows, None], probs.new_full((len(probs), 1), -1.0))
                grad[rows] = probs.div_(len(targets))
        ctx.save_for_backward(grad)
        return torch.stack(losses).sum() / len(targets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad * dloss.to(grad.dtype), None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
