"""A saved adapter: `adapter.safetensors` and its description `adapter.json`, both with checksums."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from highrank.base.errors import UserError
from highrank.base.files import write_atomic
from highrank.base.processes import writes
from highrank.base.shapes import plain, read_json, shaped

FORMAT_VERSION = 1
SEAL = "card_sha256"
CARD = {"format_version": int, "method": str, "fields": {...: plain}, "sha256": str, "probe": plain, ...: plain}
"""What adapter.json holds at least."""


def write(folder: Path, tensors: dict[str, Tensor], *, method: str, fields: Any, seed: int, **about: Any) -> Path:
    """Writes both files, each of which appears whole or not at all, if this process is the one that writes."""
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    digest = hashlib.sha256(weights).hexdigest()
    card = {
        "format_version": FORMAT_VERSION,
        "method": method,
        "fields": fields,
        "seed": seed,
        "sha256": digest,
        **about,
    }
    if writes():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "adapter.safetensors", weights)
        write_atomic(folder / "adapter.json", _sealed(card))
    return folder


def read(folder: Path | str, method: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the description and the tensors of a saved adapter of this method.

    Raises:
        UserError: if it is of another method, or a file is missing or damaged.
    """
    card = read_card(folder)
    if card["method"] != method:
        raise UserError(f"adapter: the method must match, got {card['method']} for a model with {method}")
    path = Path(folder) / "adapter.safetensors"
    if not path.is_file():
        raise UserError(f"adapter: a saved adapter has adapter.safetensors, got none in {folder}")
    raw = path.read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    if digest != card["sha256"]:
        raise UserError(f"adapter: {path} is damaged, got sha256={digest[:12]}… instead of {card['sha256'][:12]}…")
    return card, safetensors.torch.load(raw)


def read_card(folder: Path | str) -> dict[str, Any]:
    """Returns the description of a saved adapter.

    Raises:
        UserError: if there is none, it is damaged, or of a later format.
    """
    path = Path(folder) / "adapter.json"
    if not path.is_file():
        raise UserError(f"adapter: a saved adapter has adapter.json, got none in {folder}")
    try:
        raw = path.read_bytes()
        card: dict[str, Any] = read_json(path, {"format_version": int, ...: plain})
        newer = card["format_version"] > FORMAT_VERSION
        if not newer:  # which may look otherwise
            shaped(card, CARD)
    except (OSError, ValueError) as error:
        raise UserError(f"adapter: {path} is damaged, got {error}") from error
    if newer:
        raise UserError(f"adapter: format {FORMAT_VERSION} is the newest read here, got {card['format_version']}")
    seal = str(card.get(SEAL))
    if hashlib.sha256(raw.replace(seal.encode(), b"", 1)).hexdigest() != seal:
        raise UserError(f"adapter: {path} is damaged, got {SEAL}={seal[:12]}… which does not match")
    return card


def _sealed(card: Mapping[str, Any]) -> bytes:
    """Returns the card as JSON that holds its own sha256, taken with that place empty."""
    text = json.dumps({**card, SEAL: ""}, indent=1)
    return text.replace(f'"{SEAL}": ""', f'"{SEAL}": "{hashlib.sha256(text.encode()).hexdigest()}"').encode()
