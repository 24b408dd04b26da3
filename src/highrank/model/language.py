"""What a model does with the tokens it is given: how many it takes, whether it sees later ones, whether padding moves it.

The latter two are tried on the model, with a handful of tokens, because no list of model types could tell.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from highrank.base.errors import UserError
from highrank.model.encoder_decoder import source
from highrank.model.transformers_internals import is_encoder_decoder, setting, text_config
from highrank.model.weights import reading

EXACT: Mapping[torch.dtype, float] = {torch.float64: 1e-5, torch.float32: 1e-5}
"""By how much of the logits' spread what is the same may differ, by dtype; a later token that is seen moves an untrained
model of width 32 by 1e-3."""
ROUNDED = 2e-2
"""The same in 16 bits, where experts may take their tokens in another order."""
PADDED: Mapping[torch.dtype, float] = {torch.float64: 1e-3, torch.float32: 1e-3}
PADDED_ROUNDED = 0.1
"""As for decoding with a cache: sums of other lengths."""


LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
"""Where configs say how many positions a model has."""
UNLIMITED = 10**9
"""As many positions as no text has; tokenizers without a limit say more."""


def context_length(model: Any, tokenizer: Any = None) -> int:
    """Returns how many tokens a model was made for, by its config, else by its tokenizer; UNLIMITED if neither says.

    `model` may be on the meta device. Where numbering starts behind the padding token's number (RoBERTa), those are less.
    """
    config = text_config(model.config)
    given = [setting(config, name) for name in LENGTHS]
    length = min((n for n in given if n), default=min(getattr(tokenizer, "model_max_length", UNLIMITED), UNLIMITED))
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            length = min(length, module.num_embeddings - module.padding_idx - 1)
    return int(length)


@torch.no_grad()
def check_causal(model: Any) -> None:
    """Raises UserError if changing a token moves the logits of an earlier one: such a model sees what it is to predict."""
    ids = some_tokens(model, 6)
    changed = ids.clone()
    changed[0, -1] = ids[0, 0]
    before, after = (_logits(model, text, prompt=ids)[:, :-1] for text in (ids, changed))
    moved = _difference(after, before)
    if not moved <= EXACT.get(model.dtype, ROUNDED):
        raise UserError(
            "model: a text-generating task needs a causal language model, got one whose logits move by "
            f"{moved:.1%} of their spread when a later token changes: {model.config.model_type}; try model=smollm2_135m, or "
            "a classification task"
        )


@torch.no_grad()
def padding_moves(model: Any) -> bool:
    """Whether the same tokens give other logits with padding in front of them, computed at once or written in turn; an
    encoder's prompts are padded behind."""
    ids = some_tokens(model, 6)
    if is_encoder_decoder(model.config):
        return _padding_moves_encoder(model, ids)
    padded = torch.cat([torch.full_like(ids, model.config.pad_token_id), ids], dim=1)
    alone, behind = _logits(model, ids)[:, -1], _logits(model, padded, padding=ids.shape[1])[:, -1]
    allowed = PADDED.get(model.dtype, PADDED_ROUNDED)
    if not _difference(behind, alone) <= allowed:
        return True
    alone, behind = (
        torch.stack(write(model, given, 2, padding).logits, dim=1).float()
        for given, padding in ((ids, 0), (padded, ids.shape[1]))
    )
    return not _difference(behind, alone) <= allowed


def write(model: Any, ids: Tensor, new_tokens: int, padding: int = 0) -> Any:
    """Returns what `generate` does with ids (1, T), the first `padding` of them masked: so many tokens, greedily, with the
    logits of each, whatever the model's own settings are."""
    from transformers import GenerationConfig

    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    config = GenerationConfig(**settings, return_dict_in_generate=True, output_logits=True)
    own, model.generation_config = model.generation_config, GenerationConfig()  # its values fill what is left open
    try:
        return model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    finally:
        model.generation_config = own


def some_tokens(model: Any, n: int) -> Tensor:
    """Returns n tokens (1, n) from over the whole vocabulary, none of them one to pad with."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.linspace(0, vocabulary - 1, n + 2).long()[1:-1]
    pad = getattr(model.config, "pad_token_id", None)  # which a run names, and a model in hand may not
    if pad is not None:
        ids = torch.where(ids == pad, ids + 1, ids)
    return ids[None].to(next(model.parameters()).device)


def _padding_moves_encoder(model: Any, ids: Tensor) -> bool:
    """The same of an encoder, where padding stands behind a prompt: beside a longer one."""
    end = torch.ones_like(ids)
    alone = model(**source(model, ids, end.bool()), decoder_input_ids=ids).logits.float()
    rows = torch.cat([torch.cat([ids, ids], dim=1), torch.cat([ids, end], dim=1)])
    kept = torch.cat([torch.cat([end, end], dim=1), torch.cat([end, 0 * end], dim=1)]).bool()
    beside = model(**source(model, rows, kept), decoder_input_ids=ids.expand(2, -1)).logits.float()
    return not _difference(beside[1:], alone) <= PADDED.get(model.dtype, PADDED_ROUNDED)


def _logits(model: Any, ids: Tensor, padding: int = 0, prompt: Tensor | None = None) -> Tensor:
    """Returns the logits at each of some tokens, the first `padding` of them masked; `prompt` is what an encoder reads, if the
    model has one beside its decoder."""
    mask = torch.ones_like(ids)
    mask[:, :padding] = 0
    given: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    if is_encoder_decoder(model.config):
        given = {"input_ids": prompt, "decoder_input_ids": ids}
    with reading(f"model: a language model gives logits for a few tokens, got model_type={model.config.model_type}"):
        logits: Tensor = model(**given, use_cache=False).logits
    return logits.float()


def _difference(logits: Tensor, right: Tensor) -> float:
    return float((logits - right).abs().mean() / right.std())
