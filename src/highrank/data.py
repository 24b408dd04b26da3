"""From examples to padded batches: encoding under a protocol, length buckets, collation."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from highrank.config import Protocol
from highrank.errors import UserError
from highrank.task import Example, LabelledText, Record, Task

IGNORED = -100
"""Label of a position that carries no loss."""


@dataclass(frozen=True)
class Encoded:
    """Tokens of one example; `labels` holds a target per token (IGNORED elsewhere), or the one class or value."""

    input_ids: list[int]
    labels: list[int] | float
    token_type_ids: list[int] | None = None


def encode_prompt(example: Example, protocol: Protocol, tokenizer: Any) -> list[int]:
    """Returns the tokens that a model is given before it answers; the same in training and evaluation."""
    text = protocol.template.format(instruction=example.instruction)
    return tokenizer(text, add_special_tokens=protocol.bos).input_ids


def encode(record: Record, protocol: Protocol, tokenizer: Any) -> Encoded:
    """Returns one training example. Prompt and target are tokenised apart, so that the border is where it will be
    when the model answers."""
    if isinstance(record, LabelledText):
        texts = (record.text,) if record.text_pair is None else (record.text, record.text_pair)
        tokens = tokenizer(*texts, truncation=True, max_length=protocol.max_length)
        return Encoded(tokens.input_ids, record.label, tokens.get("token_type_ids"))
    prompt = encode_prompt(record, protocol, tokenizer)
    target = tokenizer(record.output, add_special_tokens=False).input_ids
    target = target + [tokenizer.eos_token_id] * protocol.eos
    ids = prompt + target
    return Encoded(ids, [IGNORED] * len(prompt) + target if protocol.mask_prompt else list(ids))


class LengthBuckets(Sampler[list[int]]):
    """Batches of similar length in random order, a function of (seed, epoch) alone.

    The order is shuffled, cut into chunks of 20 batches, sorted by length inside a chunk and cut into batches, which are
    shuffled again: padding stays small and no batch depends on where an interruption fell.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(len(self.lengths)))
        rng = random.Random(f"{self.seed}/{self.epoch}")
        rng.shuffle(order)
        size = 20 * self.batch_size
        for start in range(0, len(order), size):
            order[start : start + size] = sorted(order[start : start + size], key=lambda i: self.lengths[i])
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        rng.shuffle(batches)
        return iter(batches)


def pad(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> Tensor:
    """Returns the rows as one (B, T) tensor, T the longest row."""
    width = max(map(len, rows))
    filled = [[value] * (width - len(r)) + [*r] if left else [*r] + [value] * (width - len(r)) for r in rows]
    return torch.tensor(filled)


def collate(batch: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """Returns input_ids, attention_mask and labels, padded on the right to the longest row."""
    ids = [row.input_ids for row in batch]
    out = {"input_ids": pad(ids, pad_id), "attention_mask": pad([[1] * len(r) for r in ids], 0)}
    if batch[0].token_type_ids is not None:
        out["token_type_ids"] = pad([row.token_type_ids or [] for row in batch], 0)
    labels: Any = [row.labels for row in batch]
    if isinstance(labels[0], list):
        out["labels"] = pad(labels, IGNORED)
    else:
        out["labels"] = torch.tensor(labels)
    return out


class TaskData(lightning.LightningDataModule):
    """The training set of a task as length-bucketed batches, and its test sets as sorted evaluation batches.

    `num_skipped` counts training examples left out because they exceed the protocol's max_length.
    """

    def __init__(
        self, task: Task, protocol: Protocol, tokenizer: Any, batch_size: int, eval_batch_size: int, seed: int
    ):
        super().__init__()
        self.task, self.protocol, self.tokenizer = task, protocol, tokenizer
        self.eval_batch_size, self.seed = eval_batch_size, seed
        encoded = [encode(record, protocol, tokenizer) for record in task.train()]
        self.examples = [row for row in encoded if len(row.input_ids) <= protocol.max_length]
        self.num_skipped = len(encoded) - len(self.examples)
        if not self.examples:
            raise UserError(
                f"task {task.name}: the training set must hold an example within the protocol's cut-off, got "
                f"{len(encoded)} examples, {self.num_skipped} longer than max_length={protocol.max_length}"
            )
        self.buckets = LengthBuckets([len(row.input_ids) for row in self.examples], batch_size, seed)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.examples,  # type: ignore[arg-type]
            batch_sampler=self.buckets,
            collate_fn=lambda batch: collate(batch, self.tokenizer.pad_token_id),
        )

    def eval_dataloader(self, records: Sequence[Any]) -> DataLoader:
        """Returns batches of `records`, longest first; each batch carries `index`, the records' places.

        For generation the prompts are padded on the left, so that every row's answer starts at the same column.
        """
        generate = self.task.kind == "generate"
        if generate:
            rows = [Encoded(encode_prompt(r, self.protocol, self.tokenizer), []) for r in records]
        else:
            rows = [encode(r, self.protocol, self.tokenizer) for r in records]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
        pad_id = self.tokenizer.pad_token_id

        def build(index: Sequence[int]) -> dict[str, Tensor]:
            if not generate:
                return {**collate([rows[i] for i in index], pad_id), "index": torch.tensor(index)}
            ids = [rows[i].input_ids for i in index]
            mask = pad([[1] * len(r) for r in ids], 0, left=True)
            return {"input_ids": pad(ids, pad_id, left=True), "attention_mask": mask, "index": torch.tensor(index)}

        return DataLoader(order, batch_size=self.eval_batch_size, collate_fn=build)  # type: ignore[arg-type]
