"""From examples to padded batches: encoding under a protocol, length buckets, collation."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from highrank import leak
from highrank.config import Protocol
from highrank.errors import UserError
from highrank.loss import IGNORED
from highrank.task import Example, LabelledText, Record, Task


@dataclass(frozen=True)
class Encoded:
    """Tokens of one example; `labels` holds a target per token (IGNORED elsewhere), or the one class or value."""

    input_ids: list[int]
    labels: list[int] | float
    token_type_ids: list[int] | None = None
    cut: str = ""
    """What the cut-off took: "" nothing, "cut" some tokens, "answer_lost" the whole target."""


def prompt_text(example: Example, protocol: Protocol, evaluation: bool = False) -> str:
    """Returns the text that a model is given before it answers."""
    plain, with_input = protocol.template, protocol.template_with_input
    if evaluation:
        plain = protocol.eval_template or plain
        with_input = protocol.eval_template_with_input or (None if protocol.eval_template else with_input)
    if example.input and with_input is not None:
        return with_input.format(instruction=example.instruction, input=example.input)
    instruction = f"{example.instruction}\n{example.input}" if example.input else example.instruction
    return plain.format(instruction=instruction)


def encode_prompt(example: Example, protocol: Protocol, tokenizer: Any, evaluation: bool = True) -> list[int]:
    """Returns the tokens that a model is given before it answers."""
    bos = protocol.eval_bos if evaluation and protocol.eval_bos is not None else protocol.bos
    return tokenizer(prompt_text(example, protocol, evaluation), add_special_tokens=bos).input_ids


def encode(record: Record, protocol: Protocol, tokenizer: Any, evaluation: bool = False) -> Encoded | None:
    """Returns the tokens of prompt and target, or None if the protocol drops the example for its length.

    Unless the protocol tokenises them as one text, prompt and target are tokenised apart, so that the border is where
    it will be when the model answers.

    Raises:
        UserError: if the protocol ends targets with an end-of-text token that the tokenizer lacks.
    """
    if isinstance(record, LabelledText):
        return _encode_text(record, protocol, tokenizer)
    if protocol.eos and tokenizer.eos_token_id is None:
        raise UserError(f"protocol {protocol.name}: eos=true needs a tokenizer with an end-of-text token, got none")
    prompt = encode_prompt(record, protocol, tokenizer, evaluation)
    if protocol.joint:
        text = prompt_text(record, protocol, evaluation) + record.output
        target = tokenizer(text, add_special_tokens=protocol.bos).input_ids
        prompt, target = target[: len(prompt)], target[len(prompt) :]
    else:
        target = tokenizer(record.output, add_special_tokens=False).input_ids
    target = target + [tokenizer.eos_token_id] * protocol.eos
    whole, whole_target = len(prompt) + len(target), len(target)
    if protocol.max_target_length is not None:
        prompt, target = prompt[: protocol.max_length], target[: protocol.max_target_length]
    else:
        prompt = prompt[: protocol.max_length]
        target = target[: protocol.max_length - len(prompt)]
    cut = ""
    if len(prompt) + len(target) < whole:
        if protocol.too_long == "drop":
            return None
        cut = "cut" if target or not whole_target else "answer_lost"
    ids = prompt + target
    return Encoded(ids, [IGNORED] * len(prompt) + target if protocol.mask_prompt else list(ids), cut=cut)


def _encode_text(record: LabelledText, protocol: Protocol, tokenizer: Any) -> Encoded:
    """Returns an encoder's input; texts that are too long are cut, as encoders' tokenizers do, the longer one first."""
    texts = (record.text,) if record.text_pair is None else (record.text, record.text_pair)
    tokens = tokenizer(*texts, truncation=True, max_length=protocol.max_length)
    full = len(tokens.input_ids) == protocol.max_length
    cut = full and len(tokenizer(*texts).input_ids) > protocol.max_length
    return Encoded(tokens.input_ids, record.label, tokens.get("token_type_ids"), "cut" if cut else "")


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


class TaskData:
    """A task's training set as length-bucketed batches, what is held out of it, and its test sets as sorted batches.

    `cut_off` counts what max_length did to the training examples: left_out, cut, answer_lost (the target was cut away;
    such an example stays only if its prompt is trained on).
    """

    def __init__(
        self, task: Task, protocol: Protocol, tokenizer: Any, batch_size: int, eval_batch_size: int, seed: int
    ):
        self.task, self.protocol, self.tokenizer = task, protocol, tokenizer
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size, seed
        self.train_records, self.validation = hold_out(task.train(), protocol)
        encoded = [encode(record, protocol, tokenizer) for record in self.train_records]
        kept = [row for row in encoded if row is not None and supervised(row)]
        self.cut_off = Counter(row.cut for row in encoded if row is not None and row.cut)
        self.cut_off["left_out"] = len(encoded) - len(kept)
        self.examples = kept
        if not kept:
            raise UserError(
                f"task {task.name}: the training set must hold an example within the protocol's cut-off, got "
                f"{len(encoded)} examples, all too long for max_length={protocol.max_length}"
            )
        self.buckets = LengthBuckets([len(row.input_ids) for row in kept], batch_size, seed)

    @property
    def num_skipped(self) -> int:
        """Training examples left out because they exceed the protocol's max_length."""
        return self.cut_off["left_out"]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.examples,  # type: ignore[arg-type]
            batch_sampler=self.buckets,
            collate_fn=lambda batch: collate(batch, self.tokenizer.pad_token_id),
        )

    def val_dataloader(self) -> DataLoader:
        """Returns the held-out examples, encoded as in training."""
        encoded = [encode(record, self.protocol, self.tokenizer) for record in self.validation]
        return DataLoader(
            [row for row in encoded if row is not None and supervised(row)],  # type: ignore[arg-type]
            batch_size=self.eval_batch_size,
            collate_fn=lambda batch: collate(batch, self.tokenizer.pad_token_id),
        )

    @cached_property
    def _trained_on(self) -> set[str]:
        return leak.questions(self.train_records)

    def leaked(self, records: Sequence[Any]) -> list[bool]:
        """Returns per record whether its question occurs in the training data."""
        return leak.found(records, self._trained_on)

    def eval_dataloader(self, records: Sequence[Any]) -> DataLoader:
        """Returns batches of `records`, longest first; each batch carries `index`, the records' places.

        For generation the prompts are padded on the left, so that every row's answer starts at the same column. For
        likelihood ranking each record becomes one row per option, and `option` says which.
        """
        pad_id = self.tokenizer.pad_token_id
        if self.task.kind != "generate":
            rows = [_encode_text(r, self.protocol, self.tokenizer) for r in records]
            return self._sorted(rows, lambda index: collate([rows[i] for i in index], pad_id))
        if ranks(records, self.protocol):
            return self._option_dataloader(records)
        prompts = [Encoded(encode_prompt(r, self.protocol, self.tokenizer), []) for r in records]

        def build(index: Sequence[int]) -> dict[str, Tensor]:
            ids = [prompts[i].input_ids for i in index]
            mask = pad([[1] * len(r) for r in ids], 0, left=True)
            return {"input_ids": pad(ids, pad_id, left=True), "attention_mask": mask}

        return self._sorted(prompts, build)

    def _sorted(self, rows: Sequence[Encoded], build: Any) -> DataLoader:
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
        return DataLoader(
            order,  # type: ignore[arg-type]
            batch_size=self.eval_batch_size,
            collate_fn=lambda index: {**build(index), "index": torch.tensor(index)},
        )

    def _option_dataloader(self, records: Sequence[Example]) -> DataLoader:
        whole = replace(self.protocol, mask_prompt=True, max_target_length=None, max_length=10**9)
        rows, places, options = [], [], []
        for place, record in enumerate(records):
            for option, text in enumerate(record.options):
                row = encode(replace(record, output=text), whole, self.tokenizer, evaluation=True)
                assert row is not None
                rows.append(row)
                places.append(place)
                options.append(option)

        def build(index: Sequence[int]) -> dict[str, Tensor]:
            batch = collate([rows[i] for i in index], self.tokenizer.pad_token_id)
            return {
                **batch,
                "place": torch.tensor([places[i] for i in index]),
                "option": torch.tensor([options[i] for i in index]),
            }

        return self._sorted(rows, build)


def ranks(records: Sequence[Any], protocol: Protocol) -> bool:
    """Whether these questions are answered by likelihood ranking: the protocol says so and all have options."""
    return protocol.choose == "likelihood" and all(record.options for record in records)


def supervised(row: Encoded) -> bool:
    """Whether any loss falls on the example."""
    return not isinstance(row.labels, list) or any(label != IGNORED for label in row.labels[1:])


def hold_out(records: Sequence[Any], protocol: Protocol) -> tuple[list[Any], list[Any]]:
    """Returns the training and the validation examples.

    A question that occurs several times is held out with all its copies, so that validation is not trained on.

    Raises:
        UserError: if nothing would be left to train on.
    """
    n = protocol.num_validation
    if n == 0:
        return list(records), []
    if n >= len(records):
        raise UserError(
            f"protocol {protocol.name}: num_validation must leave examples to train on, got num_validation={n} of "
            f"{len(records)}"
        )
    chosen = random.Random(protocol.validation_seed).sample(range(len(records)), n)
    asked = leak.questions([records[i] for i in chosen])
    train = [record for record, known in zip(records, leak.found(records, asked), strict=True) if not known]
    if not train:
        raise UserError(f"protocol {protocol.name}: every training question is held out, got num_validation={n}")
    return train, [records[i] for i in sorted(chosen)]
