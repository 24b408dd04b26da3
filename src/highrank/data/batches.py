"""From encoded examples to padded batches: length buckets, collation, what is held out."""

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from highrank.base.errors import UserError
from highrank.base.processes import WHOLE, Share
from highrank.data import leak
from highrank.data.chat import stop_tokens
from highrank.data.encoding import (
    IGNORED,
    Encoded,
    EncodedImage,
    encode,
    encode_question,
    num_targets,
    prompt_text,
    within,
)
from highrank.data.protocol import Protocol
from highrank.data.task import Example, Record, Task
from highrank.data.token_cache import cached_encoding


class LengthBuckets(Sampler[list[int]]):
    """Micro-batches of similar length in random order, a function of (seed, epoch) alone.

    The order is shuffled, cut into windows of 20 steps, sorted by length inside a window and cut into steps, which are
    shuffled again: padding stays small and no step depends on where an interruption fell. A step is the same examples
    however it is cut: `accumulate` micro-batches of `batch_size` for each of N processes, or one of them all. Process r
    takes the micro-batches r, r + N, ... of a step. One for which no example is left repeats the first, and weighs
    nothing.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        share: Share = WHOLE,
        accumulate: int = 1,
        targets: Sequence[int] | None = None,
        window: int = 20,
    ):
        self.lengths, self.batch_size, self.seed, self.epoch, self.first = lengths, batch_size, seed, 0, 0
        self.share, self.accumulate, self.window = share, accumulate, window
        self.targets = [1] * len(lengths) if targets is None else targets
        """How many targets each example has: what it weighs in its step."""
        self._steps: tuple[int | None, list[list[int]]] = None, []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def start_at(self, epoch: int, batch: int) -> None:
        """Lets the next pass be what is left of an epoch from its `batch`-th round on."""
        self.epoch, self.first = epoch, batch

    @property
    def num_pieces(self) -> int:
        """Micro-batches of one step, over all processes."""
        return self.accumulate * self.share.of

    def __len__(self) -> int:
        return self.accumulate * -(-len(self.lengths) // (self.batch_size * self.num_pieces))

    def steps(self) -> list[list[int]]:
        """Returns the examples of each step of the epoch."""
        if self._steps[0] != self.epoch:
            order = list(range(len(self.lengths)))
            rng = random.Random(f"{self.seed}/{self.epoch}")
            rng.shuffle(order)
            size = self.batch_size * self.num_pieces
            for start in range(0, len(order), self.window * size):
                window = slice(start, start + self.window * size)
                order[window] = sorted(order[window], key=lambda i: self.lengths[i])
            steps = [order[i : i + size] for i in range(0, len(order), size)]
            rng.shuffle(steps)
            self._steps = self.epoch, steps
        return self._steps[1]

    def _piece(self, position: int) -> tuple[list[int], list[int]]:
        """Returns the step that this process's micro-batch at `position` belongs to, and the micro-batch."""
        step, piece = divmod(self.share.number(position), self.num_pieces)
        rows = self.steps()[step]
        return rows, rows[piece * self.batch_size : (piece + 1) * self.batch_size]

    def weight(self, position: int) -> float:
        """Returns by how much the mean loss of the micro-batch at `position` is multiplied.

        The mean over accumulated micro-batches and processes is then the mean over all targets of the step.
        """
        step, piece = self._piece(position)
        of_step, of_piece = (sum(self.targets[i] for i in rows) for rows in (step, piece))
        return self.num_pieces * of_piece / of_step

    def __iter__(self) -> Iterator[list[int]]:
        rounds = range(self.first, len(self))
        self.first = 0
        pieces = (self._piece(position) for position in rounds)
        return iter([piece or step[: self.batch_size] for step, piece in pieces])


def pad(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> Tensor:
    """Returns the rows as one (B, T) tensor, T the longest row."""
    width = max(map(len, rows))
    filled = [[value] * (width - len(r)) + [*r] if left else [*r] + [value] * (width - len(r)) for r in rows]
    return torch.tensor(filled)


def pad_token(tokenizer: Any) -> int:
    """Returns the token that fills rows up; of an image processor 0, since images fill no rows."""
    return getattr(tokenizer, "pad_token_id", 0)


def collate(batch: Sequence[Encoded], pad_id: int, left: bool = False) -> dict[str, Tensor]:
    """Returns input_ids, attention_mask and, unless these are prompts, labels, padded to the longest row; of images
    pixel_values and labels."""
    if images := [row for row in batch if isinstance(row, EncodedImage)]:
        pixels = torch.stack([image.pixels() for image in images])
        return {"pixel_values": pixels, "labels": torch.tensor([image.labels for image in images])}
    ids = [row.input_ids for row in batch]
    out = {"input_ids": pad(ids, pad_id, left), "attention_mask": pad([[1] * len(r) for r in ids], 0, left)}
    if batch[0].token_type_ids is not None:
        out["token_type_ids"] = pad([row.token_type_ids or [] for row in batch], 0, left)
    labels: Any = [row.labels for row in batch]
    if isinstance(labels[0], float | int):
        out["labels"] = torch.tensor(labels)
    elif labels[0]:
        out["labels"] = pad(labels, IGNORED, left)
    return out


def collate_packed(batch: Sequence[Encoded], pad_id: int, longest: int) -> dict[str, Tensor]:
    """Returns what `collate` does with several examples in a row of at most `longest` tokens, and position_ids.

    Each example counts its positions from 0: by that a model knows where one ends. Padding stands as an example of its own.
    """
    rows: list[list[Encoded]] = []
    room: list[int] = []
    for example in sorted(batch, key=lambda example: -len(example.input_ids)):
        size = len(example.input_ids)
        at = next((i for i, left in enumerate(room) if left >= size), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(max(longest, size))
        rows[at].append(example)
        room[at] -= size
    ids = [[token for example in row for token in example.input_ids] for row in rows]
    width = max(map(len, ids))
    labels = [[label for e in row for label in [IGNORED, *e.targets[1:]]] for row in rows]
    sizes = [[*(len(e.input_ids) for e in row), width - len(tokens)] for row, tokens in zip(rows, ids, strict=True)]
    return {
        "input_ids": pad(ids, pad_id),
        "attention_mask": pad([[1] * len(row) for row in ids], 0),
        "position_ids": torch.tensor([[i for size in row for i in range(size)] for row in sizes]),
        "labels": pad(labels, IGNORED),
    }


def encode_records(records: Sequence[Record], protocol: Protocol, tokenizer: Any) -> list[Encoded | None]:
    """Returns what `encode` makes of each training record, read from the cache where it is there."""
    return cached_encoding(
        records, protocol, tokenizer, lambda: [encode(record, protocol, tokenizer) for record in records]
    )


class TrainingData:
    """A task's training set as length-bucketed batches, and what is held out of it.

    `encoded` are the tokens that `encode_records` gave for it before, under the same protocol and tokenizer.
    `cut_off` counts what max_length did to the training examples: left_out, cut, marker_lost (the end
    of the prompt is gone, the target is there), answer_lost (the target was cut away; such an example stays only if its
    prompt is trained on).
    """

    def __init__(
        self,
        task: Task,
        protocol: Protocol,
        tokenizer: Any,
        batch_size: int,
        eval_batch_size: int,
        seed: int,
        share: Share = WHOLE,
        accumulate: int = 1,
        packing: bool = False,
        encoded: Sequence[Encoded | None] | None = None,
    ):
        self.protocol, self.tokenizer, self.eval_batch_size = protocol, tokenizer, eval_batch_size
        self.packing = packing
        self.records, self.validation = hold_out(task.train(), protocol)
        encoded = encode_records(self.records, protocol, tokenizer) if encoded is None else encoded
        kept = [row for row in encoded if row is not None and num_targets(row)]
        self.cut_off = Counter(row.cut for row in encoded if row is not None and row.cut)
        self.cut_off["left_out"] = len(encoded) - len(kept)
        self.examples = kept
        if not kept:
            raise UserError(
                f"task {task.name}: the training set must hold an example within the protocol's cut-off, got "
                f"{len(encoded)} examples, all too long for max_length={protocol.max_length}"
            )
        held_out = [encode(record, protocol, tokenizer) for record in self.validation]
        self.held_out = [row for row in held_out if row is not None and num_targets(row)]
        """The held-out examples within the protocol's cut-off, encoded as in training."""
        if self.validation and not self.held_out:
            raise UserError(
                f"task {task.name}: the held-out examples must hold one within the protocol's cut-off, got "
                f"{len(held_out)}, all too long for max_length={protocol.max_length}; raise it, or hold out more with "
                "protocol.num_validation"
            )
        lengths, targets = [len(row.input_ids) for row in kept], [num_targets(row) for row in kept]
        self.buckets = LengthBuckets(lengths, batch_size, seed, share, accumulate, targets)

    @property
    def num_skipped(self) -> int:
        """Training examples left out because they exceed the protocol's max_length."""
        return self.cut_off["left_out"]

    def train_dataloader(self) -> DataLoader:
        pad_id, longest = pad_token(self.tokenizer), self.protocol.max_length + (self.protocol.max_target_length or 0)
        return DataLoader(
            self.examples,  # type: ignore[arg-type]  # a list is a data set
            batch_sampler=self.buckets,
            collate_fn=lambda batch: collate_packed(batch, pad_id, longest) if self.packing else collate(batch, pad_id),
        )

    def val_dataloader(self) -> DataLoader:
        return DataLoader(
            self.held_out,  # type: ignore[arg-type]  # a list is a data set
            batch_size=self.eval_batch_size,
            collate_fn=lambda batch: collate(batch, pad_token(self.tokenizer)),
        )


UNLIMITED = 10**9
"""More tokens than a text has."""


@dataclass(frozen=True)
class Places(Dataset[int]):
    """The records of a test set that a process computes, by their numbers, in order."""

    name: str
    numbers: list[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, at: int) -> int:
        return self.numbers[at]


class EvalData:
    """A task's test sets as batches sorted by length.

    `trained_on` are the training examples, among which the questions of a test set may occur; None where they are gone.
    `positions` is how many tokens the model takes.
    """

    def __init__(
        self,
        task: Task,
        protocol: Protocol,
        tokenizer: Any,
        trained_on: Sequence[Any] | None = (),
        share: Share = WHOLE,
        positions: int = UNLIMITED,
    ):
        self.task, self.tokenizer, self.share = task, tokenizer, share
        self.protocol, self.positions = within(protocol, positions), positions
        self.trained_on = trained_on

    def check_lengths(self) -> None:
        """Raises UserError if a prompt and its answer have more tokens than the model takes; classifiers' texts are cut, and
        images scaled."""
        new = self.protocol.max_new_tokens or self.task.max_new_tokens
        for name, records in self.task.test().items():
            lengths = [self._tokens(record, new, ranks(records, self.protocol)) for record in records]
            if max(lengths, default=0) > self.positions:
                longest = max(range(len(records)), key=lengths.__getitem__)
                raise UserError(
                    f"task {self.task.name}: a prompt and its answer must fit the model's {self.positions} positions, got "
                    f"{lengths[longest]} tokens at {records[longest].id} of {name}, and too many at "
                    f"{sum(n > self.positions for n in lengths)} of {len(records)}; lower protocol.max_new_tokens, now {new}, "
                    "leave such examples out, or take a model with more positions"
                )

    def _tokens(self, record: Record, new: int, ranked: bool) -> int:
        """Returns how many tokens a record takes with its answer; 0 where its letters are too few for too many."""
        if not isinstance(record, Example):
            return 0
        texts = record.options if ranked else [""]
        letters = len(prompt_text(record, self.protocol, evaluation=True).encode()) + max(
            len(t.encode()) for t in texts
        )
        if not record.messages and letters + new + 8 <= self.positions:  # 8: special tokens, which have no letters
            return 0
        if not ranked:
            return len(self.question(record).input_ids) + new
        return max(len(self._option(record, text, self._uncut_protocol).input_ids) for text in texts)

    @property
    def _uncut_protocol(self) -> Protocol:
        return replace(self.protocol, mask_prompt=True, max_target_length=None, max_length=UNLIMITED)

    @cached_property
    def _known(self) -> set[str] | None:
        return None if self.trained_on is None else leak.questions(self.trained_on)

    def leaked(self, records: Sequence[Any]) -> Sequence[bool | None]:
        """Returns per record whether its question occurs in the training data; None where that is gone."""
        return [None] * len(records) if self._known is None else leak.found(records, self._known)

    def dataloader(
        self, name: str, records: Sequence[Any], batch_size: int, places: Iterable[int] | None = None
    ) -> DataLoader:
        """Returns batches of a set's records, or of those at `places`, longest first; each carries `index`, its places.

        For generation the prompts are padded on the left, so that every row's answer starts at the same column. For
        likelihood ranking a record's prompt is one row and each of its options a `tail`, whose `owner` is that row.
        """
        places = range(len(records)) if places is None else places
        if ranks(records, self.protocol):
            return self._option_dataloader(name, records, batch_size, places)
        rows = [self.question(record) for record in records]
        left = isinstance(records[0], Example)
        pad_id = pad_token(self.tokenizer)
        spoken = next((record for record in records if getattr(record, "messages", ())), None)
        stop = {"stop": torch.tensor(stop_tokens(spoken, self.tokenizer))} if spoken else {}
        return self._sorted(
            name, places, rows, batch_size, lambda index: {**collate([rows[i] for i in index], pad_id, left), **stop}
        )

    def question(self, record: Record) -> Encoded:
        """Returns what the model is shown of a record."""
        return encode_question(record, self.protocol, self.tokenizer)

    def gold(self, record: Example) -> Encoded | None:
        """Returns prompt and gold answer as training has them, with the loss on the answer alone; None if nothing of the
        answer is left within the cut-off."""
        answer_only = replace(self.protocol, mask_prompt=True)
        row = encode(record, answer_only, self.tokenizer, evaluation=bool(record.messages))
        return row if row is not None and num_targets(row) else None

    def gold_option(self, record: Example, gold: Encoded) -> int | None:
        """Returns which of a record's options is, token by token, its gold answer in training; None if none is."""
        at = record.choices.index(record.answer) if record.answer in record.choices else len(record.options)
        if at >= len(record.options):
            return None
        option = self._option(record, record.options[at], self._uncut_protocol)
        return at if (option.input_ids, option.labels) == (gold.input_ids, gold.labels) else None

    def gold_dataloader(
        self, name: str, rows: Mapping[int, Encoded], batch_size: int, places: Iterable[int]
    ) -> DataLoader:
        """Returns batches of gold answers, `rows` by their places in a set, with `labels` and `index`; longest first."""
        pad_id = self.tokenizer.pad_token_id
        build = lambda index: collate([rows[i] for i in index], pad_id)  # noqa: E731
        return self._sorted(f"{name}, loss", places, rows, batch_size, build)

    def _sorted(
        self,
        name: str,
        places: Iterable[int],
        rows: Sequence[Encoded] | Mapping[int, Encoded],
        batch_size: int,
        build: Any,
    ) -> DataLoader:
        order = sorted(places, key=lambda i: -len(rows[i].input_ids))
        return DataLoader(
            Places(name, self.share.of_examples(order, batch_size)),
            batch_size=batch_size,
            collate_fn=lambda index: {**build(index), "index": torch.tensor(index)},
        )

    def _option_dataloader(
        self, name: str, records: Sequence[Example], batch_size: int, places: Iterable[int]
    ) -> DataLoader:
        """Returns batches of records with all their options: the tokens that a record's options share come once."""
        rows = [[self._option(record, text, self._uncut_protocol) for text in record.options] for record in records]
        shared = [shared_prefix(options) for options in rows]
        prefixes = [Encoded(options[0].input_ids[:n], []) for options, n in zip(rows, shared, strict=True)]
        pad_id = self.tokenizer.pad_token_id

        def build(index: Sequence[int]) -> dict[str, Tensor]:
            ids = [prefixes[i].input_ids for i in index]
            owners = [at for at, i in enumerate(index) for _ in rows[i]]
            tails = [row.input_ids[shared[i] :] for i in index for row in rows[i]]
            labels = [row.targets[shared[i] :] for i in index for row in rows[i]]
            return {
                "input_ids": pad(ids, pad_id, left=True),
                "attention_mask": pad([[1] * len(r) for r in ids], 0, left=True),
                "owner": torch.tensor(owners),
                "tail_ids": pad(tails, pad_id),
                "tail_mask": pad([[1] * len(r) for r in tails], 0),
                "tail_labels": pad(labels, IGNORED),
            }

        return self._sorted(name, places, prefixes, batch_size, build)

    def _option(self, record: Example, text: str, protocol: Protocol) -> Encoded:
        row = encode(replace(record, output=text), protocol, self.tokenizer, evaluation=True)
        assert row is not None
        return row


def shared_prefix(options: Sequence[Encoded]) -> int:
    """Returns how many leading tokens all options share, all before the first that is scored."""
    columns = zip(*(row.input_ids for row in options), strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    scored = min(next(i for i, label in enumerate(row.targets) if label != IGNORED) for row in options)
    return min(same, scored)


def ranks(records: Sequence[Any], protocol: Protocol) -> bool:
    """Whether these questions are answered by likelihood ranking: the protocol says so and all have options."""
    return protocol.choose == "likelihood" and all(getattr(record, "options", ()) for record in records)


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
