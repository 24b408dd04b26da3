"""An encoder and a decoder in one model: which tokens of a text the one reads, and which the other answers.

Data comes in the rows that a decoder alone takes: a prompt, and behind it the answer. Here the rows are parted, so that
tasks, protocols, batches and scores need not know which kind of model reads them.
"""

from typing import Any

import torch
from torch import Tensor

from highrank.base.errors import UserError
from highrank.model.transformers_internals import is_encoder_decoder


def packed(rows: Tensor, kept: Tensor, filler: int) -> tuple[Tensor, Tensor]:
    """Returns the kept entries of each row of (B, T), in their order from the first place on and `filler` behind them, and
    where they are; both (B, T'), T' the most that a row keeps."""
    order, width = (~kept).int().argsort(dim=1, stable=True), int(kept.sum(1).max())
    kept = kept.gather(1, order)[:, :width]
    return rows.gather(1, order)[:, :width].where(kept, filler), kept


def source(model: Any, input_ids: Tensor, is_prompt: Tensor) -> dict[str, Tensor]:
    """Returns what the encoder is called with: the prompts, each closed by the end-of-text token as these models' tokenizers
    close every text they read, padded behind."""
    end, rows = model.config.eos_token_id, len(input_ids)
    if end is not None:
        input_ids = torch.cat([input_ids, input_ids.new_full((rows, 1), end)], dim=1)
        is_prompt = torch.cat([is_prompt, is_prompt.new_ones(rows, 1)], dim=1)
    ids, mask = packed(input_ids, is_prompt, model.config.pad_token_id)
    return {"input_ids": ids, "attention_mask": mask.to(input_ids.dtype)}


def parted(model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, ignored: int) -> Any:
    """Returns what the model is called with to predict the labelled tokens from all the others of their row, and what each
    place of its output predicts, (B, T'), `ignored` behind an answer's end."""
    is_answer = labels != ignored
    targets, _ = packed(labels, is_answer, ignored)
    given = source(model, input_ids, attention_mask.bool() & ~is_answer)
    return {**given, "decoder_input_ids": _shifted(model, targets, ignored)}, targets


def start_token(model: Any) -> int | None:
    """Returns the token from which a decoder begins its answer; None of a model that goes on from its prompt."""
    if not is_encoder_decoder(model.config):
        return None
    start: int | None = model.config.decoder_start_token_id
    if start is None:
        raise UserError(
            "model: a decoder that answers an encoder needs a token to begin with, got decoder_start_token_id=null in "
            f"config.json of a {model.config.model_type}; name it there"
        )
    return start


def _shifted(model: Any, targets: Tensor, ignored: int) -> Tensor:
    """Returns what the decoder reads: its first token, then each target but the last."""
    first = torch.full_like(targets[:, :1], start_token(model) or 0)
    read = torch.cat([first, targets[:, :-1]], dim=1)
    return read.masked_fill(read == ignored, model.config.pad_token_id)


def everywhere(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a call's arguments such that there are logits at every token of a text: a decoder that answers an encoder
    reads it too."""
    if not is_encoder_decoder(model.config):
        return batch
    return {**batch, "decoder_input_ids": batch["input_ids"]}
