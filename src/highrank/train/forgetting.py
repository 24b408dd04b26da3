"""Forgetting: what training did to the model's loss on general text, adapted against base model.

As in PEFT's method comparison (github.com/huggingface/peft, method_comparison/MetaMathQA): mean cross-entropy per token
over passages of at most 768 tokens, which have nothing to do with the task.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from highrank.base.errors import UserError
from highrank.data.batches import pad
from highrank.data.encoding import IGNORED
from highrank.data.sources import read_file, text_of
from highrank.model.adapters import Adapters
from highrank.train.loss import language_model_loss
from highrank.train.memory import halving

MAX_LENGTH = 768
"""Tokens read of a passage."""


def read_passages(file: Path | str) -> list[str]:
    """Returns the passages of a file: the lines of a .txt, or the field `text` of any other layout.

    Raises:
        UserError: if the file is missing, malformed, or holds no text.
    """
    if not Path(file).is_file():
        raise UserError(f"forgetting: general_text must be an existing file, got general_text={file}")
    rows = read_file(Path(file))
    texts = []
    for i, row in enumerate(rows, start=1):
        if not isinstance(row, str) and "text" not in row:
            raise UserError(f"forgetting: a row must have the field 'text', got {', '.join(row)} in {file} row {i}")
        try:
            texts.append(row if isinstance(row, str) else text_of(row, "text"))
        except ValueError as error:
            raise UserError(f"forgetting: {error} in {file} row {i}") from error
    passages = [text for text in texts if text.strip()]
    if not passages:
        raise UserError(f"forgetting: general_text must hold a passage, got none in {file}")
    return passages


@torch.no_grad()
def text_loss(model: Any, tokenizer: Any, passages: Sequence[str], batch_size: int) -> float:
    """Returns the mean cross-entropy in nats over all tokens of the passages but each one's first."""
    rows = [tokenizer(text, truncation=True, max_length=MAX_LENGTH).input_ids for text in passages]
    rows = sorted((row for row in rows if len(row) > 1), key=len)
    device = next(model.parameters()).device
    total, num_tokens = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        ids, labels = pad(batch, tokenizer.pad_token_id), pad(batch, IGNORED)
        mask = pad([[1] * len(row) for row in batch], 0)
        loss, n = language_model_loss(model, ids.to(device), mask.to(device), labels.to(device))
        total, num_tokens = total + n * float(loss), num_tokens + n
    return total / max(1, num_tokens)


def forgetting(adapters: Adapters, tokenizer: Any, file: Path | str, batch_size: int) -> dict[str, Any]:
    """Returns base and adapted loss in nats per token, their difference, and which passages they were taken on.

    The batch is halved where memory runs out.
    """
    passages, model = read_passages(file), adapters.model
    adapted, batch_size = halving(lambda size: text_loss(model, tokenizer, passages, size), batch_size, model)
    with adapters.disabled():
        base, _ = halving(lambda size: text_loss(model, tokenizer, passages, size), batch_size, model)
    return {
        "base_loss": base,
        "adapted_loss": adapted,
        "forgetting": adapted - base,
        "passages": len(passages),
        "sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest(),
    }
