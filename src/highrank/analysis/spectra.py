"""Singular values of weight updates: one decomposition per matrix, kept on disk.

Per adapted weight of a run: those of ΔW, of W, and for full fine-tuning of E ⊘ W with E = ΔW. Everything else in
`highrank.analysis` is computed from these arrays.
"""

import hashlib
import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save
from torch import Tensor

from highrank.analysis.statistics import Values
from highrank.base.errors import UserError
from highrank.base.files import cache_dir, write_atomic
from highrank.model.adapters import Adapters
from highrank.model.low_rank import ROUNDING, range_of

FORMAT_VERSION = 1
FILE = "singular_values.safetensors"
TRIED = 64
"""Columns of the sketch by which an update of low rank is recognised."""


@dataclass(frozen=True)
class Settings:
    """What the arrays depend on beside the weights."""

    tiny: float = 1e-8
    """Entries of W below it in size are masked in E ⊘ W."""
    sketch: int | None = None
    """Columns of a randomised SVD in place of the exact one."""

    def __post_init__(self) -> None:
        if not 0 <= self.tiny < math.inf:
            raise UserError(f"analyze: tiny must be a number >= 0, got tiny={self.tiny}")
        if self.sketch is not None and self.sketch < 1:
            raise UserError(f"analyze: sketch must be >= 1, got sketch={self.sketch}")


EXACT = Settings()


@dataclass(frozen=True)
class Spectrum:
    """Singular values, in descending order, min(n, k) of them."""

    values: Values
    error: float = 0.0
    """Every σ_i lies in [values_i, values_i + error], up to the rounding of fp64."""


@dataclass(frozen=True)
class Spectra:
    """The singular values of one run."""

    key: dict[str, Any]
    """What they were computed from: hashes of adapter and base, settings."""
    values: dict[str, Values] = field(default_factory=dict)
    """`delta/<view>`, `base/<view>` and for full fine-tuning `ratio/<view>`."""
    notes: dict[str, dict[str, float]] = field(default_factory=dict)
    """By the same names: `error`, and for a ratio `masked` (entries) and `left_out` (‖E‖_F on them)."""

    def add(self, name: str, spectrum: Spectrum, **notes: float) -> None:
        self.values[name] = spectrum.values
        self.notes[name] = {"error": spectrum.error, **notes}


@torch.no_grad()
def singular_values(M: Tensor, sketch: int | None = None) -> Spectrum:
    """Returns the singular values of M (n, k), computed in fp64.

    Exact by `torch.linalg.svdvals`. An update of low rank is recognised by a sketch Q of its range, and then exact too:
    with ρ = ‖M - Q Qᵀ M‖_F, each σ_i(M) lies in [σ_i(Qᵀ M), σ_i(Qᵀ M) + ρ], and ρ is rounding. With `sketch` columns
    asked for, the result is a randomised SVD (Halko et al., arXiv 0909.4061, algorithm 4.4 with two power iterations)
    whatever ρ is, and σ_i = 0 stands beyond them.
    """
    smaller = min(M.shape)
    M = M.detach().to("cuda" if torch.cuda.is_available() else "cpu", torch.float64)
    if M.shape[0] > M.shape[1]:
        M = M.mT
    if not M.any():
        return Spectrum(np.zeros(smaller))
    if sketch is not None and sketch < smaller:
        return _in_range(M, range_of(M, sketch, power=2))
    if smaller >= 4 * TRIED:
        spectrum = _in_range(M, range_of(M, TRIED))
        if spectrum.error <= ROUNDING * float(M.norm()):
            return spectrum
    return Spectrum(torch.linalg.svdvals(M).cpu().numpy())


def _in_range(M: Tensor, Q: Tensor) -> Spectrum:
    inside = Q.mT @ M
    error = float((M - Q @ inside).norm())
    values = torch.linalg.svdvals(inside).cpu().numpy()
    return Spectrum(np.pad(values, (0, min(M.shape) - len(values))), error)


def ratio(E: Tensor, W: Tensor, tiny: float) -> tuple[Tensor, int, float]:
    """Returns E ⊘ W (n, k) in fp64 with 0 where |W| < tiny, how many entries that are, and the Frobenius norm of E there.

    A tiny or zero entry of W makes an entry that no rank can hide, and the spectrum is then that entry's.
    """
    E, W = E.double(), W.double()
    masked = (W.abs() < tiny) | (W == 0)
    return torch.where(masked, 0.0, E / W.masked_fill(masked, 1.0)), int(masked.sum()), float(E[masked].norm())


def measure(adapters: Adapters, key: dict[str, Any], settings: Settings) -> Spectra:
    """Returns the singular values of every adapted weight, in the views' order.

    Raises:
        UserError: for an update or a weight that is not finite, or a weight that is zero.
    """
    spectra = Spectra(key)
    for view in adapters.views:
        W, E = adapters.base_weight(view).detach().float(), adapters.delta_weight(view)
        for symbol, M in (("ΔW", E), ("W", W)):
            if not torch.isfinite(M).all():
                raise UserError(
                    f"analyze: {symbol} must be finite, got NaN or inf in {view.name}; was the learning rate too high?"
                )
        if not W.any():
            raise UserError(f"analyze: a base weight must not be zero, got 0 in all of {view.name}")
        spectra.add(f"delta/{view.name}", singular_values(E, settings.sketch))
        spectra.add(f"base/{view.name}", _of_base(W, settings.sketch))
        if not adapters.keeps_base:
            quotient, masked, left_out = ratio(E, W, settings.tiny)
            spectrum = singular_values(quotient, settings.sketch)
            spectra.add(f"ratio/{view.name}", spectrum, masked=masked, left_out=left_out)
    return spectra


def _of_base(W: Tensor, sketch: int | None) -> Spectrum:
    """As `singular_values`, kept in the user's cache under the sha256 of the numbers: runs share their base."""
    if sketch is not None:
        return singular_values(W, sketch)
    numbers = W.cpu().contiguous().numpy()
    name = hashlib.sha256(f"{FORMAT_VERSION} {W.shape}".encode() + numbers.tobytes()).hexdigest()
    file = cache_dir() / "spectra" / f"{name}.safetensors"
    if file.is_file():
        try:
            stored = load_file(file)
            return Spectrum(stored["values"], float(stored["error"]))
        except (SafetensorError, KeyError):
            file.unlink()  # damaged: decompose again
    spectrum = singular_values(W)
    with suppress(OSError):  # a cache that cannot be written costs time alone
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, save({"values": spectrum.values, "error": np.array(spectrum.error)}))
    return spectrum


def cache_key(adapter_sha256: str, base_sha: str | None, settings: Settings) -> dict[str, Any]:
    """Returns what a run's arrays are kept under: they are computed again when any of it differs."""
    return {"format_version": FORMAT_VERSION, "adapter": adapter_sha256, "base": base_sha, **asdict(settings)}


def write(folder: Path, spectra: Spectra) -> None:
    """Writes the arrays into a run's analysis folder, whole or not at all."""
    metadata = {"key": json.dumps(spectra.key), "notes": json.dumps(spectra.notes)}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FILE, save(spectra.values, metadata=metadata))


def read(folder: Path, key: dict[str, Any]) -> Spectra | None:
    """Returns what `write` wrote under the same key, or None."""
    file = folder / FILE
    try:
        with safe_open(file, framework="numpy") as stored:
            metadata = stored.metadata() or {}
        if json.loads(metadata.get("key", "{}")) != key:
            return None
        return Spectra(key, load_file(file), json.loads(metadata["notes"]))
    except (FileNotFoundError, IsADirectoryError, SafetensorError, KeyError, ValueError):
        return None
