"""How a model answers: what it writes after a prompt, or which of a question's options it finds likeliest."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig

from highrank.data.encoding import IGNORED
from highrank.data.protocol import Protocol
from highrank.data.task import Task
from highrank.model.encoder_decoder import source, start_token
from highrank.model.transformers_internals import cache_name, cache_of, is_encoder_decoder
from highrank.train.loss import example_losses, head_sees_only


def decoding(task: Task, p: Protocol | None) -> dict[str, Any]:
    """The protocol's decoding as arguments of `generate`; sampling is seeded per batch."""
    if p is None:
        return {"max_new_tokens": task.max_new_tokens, "do_sample": False}
    arguments: dict[str, Any] = {
        "max_new_tokens": p.max_new_tokens or task.max_new_tokens,
        "do_sample": p.do_sample,
        "num_beams": p.num_beams,
        "no_repeat_ngram_size": p.no_repeat_ngram,
    }
    if p.num_beams > 1:
        arguments["length_penalty"] = p.length_penalty
    if p.do_sample:
        arguments |= {"temperature": p.temperature, "top_p": p.top_p, "top_k": p.top_k}
    return arguments


def generate(
    model: Any, tokenizer: Any, batch: Mapping[str, Tensor], arguments: Mapping[str, Any], seed: int
) -> list[str]:
    """Returns the text that the model writes after each prompt; `seed` is for decoding that samples."""
    with torch.random.fork_rng(enabled=arguments["do_sample"]):
        if arguments["do_sample"]:
            torch.manual_seed(seed)
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        start, before = start_token(model), batch["input_ids"].shape[1]
        if start is not None:
            given, before = source(model, batch["input_ids"], batch["attention_mask"].bool()), 1
        # In place of the checkpoint's own defaults (penalties, sampling), which would mix into the protocol's.
        model.generation_config = GenerationConfig(
            eos_token_id=batch["stop"].tolist() if "stop" in batch else tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            decoder_start_token_id=start,
            **arguments,
        )
        tokens = model.generate(**given)
    return tokenizer.batch_decode(tokens[:, before:], skip_special_tokens=True)


def of_one_length(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Returns the rows of a batch as batches of prompts of one length, without padding in front."""
    lengths = batch["attention_mask"].sum(1)
    parts = []
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        part = {name: batch[name][rows, -length:] for name in ("input_ids", "attention_mask")}
        part["index"] = batch["index"][rows]
        if "stop" in batch:
            part["stop"] = batch["stop"]
        if "owner" in batch:
            tails = torch.isin(batch["owner"], rows)
            part["owner"] = torch.searchsorted(rows, batch["owner"][tails])
            part |= {name: batch[name][tails] for name in ("tail_ids", "tail_mask", "tail_labels")}
        parts.append(part)
    return parts


def rank_options(model: Any, batch: dict[str, Tensor]) -> list[tuple[int, Any]]:
    """Returns (place, {option: sum of the target tokens' log-probabilities in nats}) per row.

    The prompt is computed once per row; its keys and values then serve every option, but of an encoder and a decoder in one.
    """
    if is_encoder_decoder(model.config):
        return _rank_answers(model, batch)
    owner, labels, mask = batch["owner"], batch["tail_labels"], batch["attention_mask"]
    prompt = model(
        input_ids=batch["input_ids"],
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    cache = cache_of(prompt)
    if cache is None:
        return _rank_whole(model, batch)
    cache.batch_select_indices(owner)
    lengths = mask.sum(1)[owner]
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    predicts = following != IGNORED
    with head_sees_only(model, predicts):
        logits = model(
            input_ids=batch["tail_ids"],
            attention_mask=torch.cat([mask[owner], batch["tail_mask"]], dim=1),
            position_ids=lengths[:, None] + torch.arange(labels.shape[1], device=lengths.device),
            use_cache=True,
            **{cache_name(model): cache},
        ).logits
    losses = torch.zeros(labels.shape, device=logits.device)
    losses[predicts] = F.cross_entropy(logits.float(), following[predicts], reduction="none")
    first = F.cross_entropy(prompt.logits[:, -1].float()[owner], labels[:, 0], ignore_index=IGNORED, reduction="none")
    return _by_option(batch, -losses.sum(1) - first)


def _rank_whole(model: Any, batch: dict[str, Tensor]) -> list[tuple[int, Any]]:
    """As `rank_options`, of a model that keeps no cache: each option is computed with its prompt."""
    owner, labels = batch["owner"], batch["tail_labels"]
    mask = torch.cat([batch["attention_mask"][owner], batch["tail_mask"]], dim=1)
    start = batch["input_ids"].shape[1]
    logits = model(
        input_ids=torch.cat([batch["input_ids"][owner], batch["tail_ids"]], dim=1),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
    ).logits[:, start - 1 : -1]
    losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return _by_option(batch, -losses.sum(1))


def _rank_answers(model: Any, batch: dict[str, Tensor]) -> list[tuple[int, Any]]:
    """As `rank_options`, of an encoder and a decoder in one: what of an option is no target is read with its prompt."""
    owner, prompts = batch["owner"], batch["input_ids"]
    nats = example_losses(
        model,
        torch.cat([prompts[owner], batch["tail_ids"]], dim=1),
        torch.cat([batch["attention_mask"][owner], batch["tail_mask"]], dim=1),
        torch.cat([torch.full_like(prompts[owner], IGNORED), batch["tail_labels"]], dim=1),
    )
    return _by_option(batch, -torch.tensor(nats))


def _by_option(batch: dict[str, Tensor], scores: Tensor) -> list[tuple[int, Any]]:
    by_row: dict[int, dict[int, float]] = {row: {} for row in range(len(batch["attention_mask"]))}
    for row, score in zip(batch["owner"].tolist(), scores.tolist(), strict=True):
        by_row[row][len(by_row[row])] = score
    return [(place, by_row[row]) for row, place in enumerate(batch["index"].tolist())]
