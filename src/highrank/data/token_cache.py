"""Encoded training examples in the cache, as safetensors, under a hash of everything they depend on."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from highrank.base.files import cache_dir, digest
from highrank.base.kept import keep, read_kept
from highrank.data.encoding import IGNORED, Encoded
from highrank.data.protocol import Protocol
from highrank.data.task import LabelledImage

MIN_EXAMPLES = 5_000
"""Below this, encoding takes less than a second or two and is not worth a file."""
CUTS = ("", "cut", "answer_lost", "marker_lost")


def cached_encoding(
    records: Sequence[Any], protocol: Protocol, tokenizer: Any, encode: Callable[[], list[Encoded | None]]
) -> list[Encoded | None]:
    """Returns what `encode` returns, read from the cache if the same records were encoded before.

    The key covers records, protocol, and the tokenizer's whole definition, and the checksum is compared on each use:
    nothing stale or damaged can be read. A cache that cannot be written costs time alone. Images, which have no tokens, are
    not kept.
    """
    if len(records) < MIN_EXAMPLES or isinstance(records[0], LabelledImage):
        return encode()
    file = cache_dir() / "tokens" / f"{_key(records, protocol, tokenizer)}.tokens"
    if (kept := read_kept(file)) is not None:
        return _unpack(load(kept))
    rows = encode()
    keep(file, save(_pack(rows)))
    return rows


def _key(records: Sequence[Any], protocol: Protocol, tokenizer: Any) -> str:
    content = hashlib.sha256(f"2/{protocol.hash}".encode())  # 2: how a file is laid out
    content.update(tokenizer.backend_tokenizer.to_str().encode())
    content.update(str(tokenizer.chat_template).encode())
    for record in records:
        content.update(digest(asdict(record)).encode())
    return content.hexdigest()


def _pack(rows: Sequence[Encoded | None]) -> dict[str, Tensor]:
    """Lays the rows end to end. A row left out has length -1; `learned` says of each token whether it is a target."""
    kept = [row for row in rows if row is not None]
    flat = [token for row in kept for token in row.input_ids]
    types = [token for row in kept for token in row.token_type_ids or ()]
    return {
        "input_ids": torch.tensor(flat, dtype=torch.int32),
        "token_type_ids": torch.tensor(types, dtype=torch.int32),
        "lengths": torch.tensor([-1 if row is None else len(row.input_ids) for row in rows]),
        "learned": torch.tensor(
            [label != IGNORED for row in kept if isinstance(row.labels, list) for label in row.labels], dtype=torch.bool
        ),
        "labels": torch.tensor([0.0 if isinstance(r.labels, list) else r.labels for r in kept], dtype=torch.float64),
        "cuts": torch.tensor([CUTS.index(row.cut) for row in kept]),
    }


def _unpack(stored: dict[str, Tensor]) -> list[Encoded | None]:
    flat, types, learned = (stored[key].tolist() for key in ("input_ids", "token_type_ids", "learned"))
    rows: list[Encoded | None] = []
    at = kept = 0
    for length in stored["lengths"].tolist():
        if length < 0:
            rows.append(None)
            continue
        ids = flat[at : at + length]
        labels: Any = float(stored["labels"][kept])
        if learned:
            mask = learned[at : at + length]
            labels = [token if is_target else IGNORED for token, is_target in zip(ids, mask, strict=True)]
        token_types = types[at : at + length] if types else None
        rows.append(Encoded(ids, labels, token_types, CUTS[int(stored["cuts"][kept])]))
        at, kept = at + length, kept + 1
    return rows
