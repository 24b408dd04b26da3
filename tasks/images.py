"""images: one class per image: generated shapes or, with a folder, images of one's own.

Generated, `task=images`: circles, squares, triangles and crosses of any place, size and colour on noise, 32 × 32 pixels. Each
image is drawn from a seed of its own, in integers, so that it is the same on every machine; licence: the project's own.
One's own: `task=images task.folder=DIR`, with DIR/train/CLASS/*.png and DIR/test/CLASS/*.png; png, jpg, jpeg, webp, bmp,
gif and tif are taken, anything else in these folders is left alone.
Metric: accuracy in percent, higher is better; test loss in nats per image.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from highrank.plugin import LabelledImage, Task, UserError, check_image, path_field, register_task, shown

SHAPES = ("circle", "square", "triangle", "cross")
SIZE = 32
"""Pixels of a side of a drawn image."""
DRAWN = {"train": 512, "test": 200}
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    folder: str | None = path_field(None)
    """Folder with train/CLASS and test/CLASS; default: generated shapes."""
    classes: list[str] | None = None
    """The folder's classes, in the order of their numbers: filled in, sorted; where given, it must have just these."""
    n_train: int | None = None
    """Training images, of a folder drawn at random; default: 512 shapes, or all of a folder's."""
    n_test: int | None = None
    """Test images; default: 200 shapes, or all of a folder's."""
    data_seed: int = 0
    """Seed of the shapes, and of what n_train and n_test draw from a folder."""

    def __post_init__(self) -> None:
        for key in ("n_train", "n_test"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise UserError(f"task images: {key} must be >= 1, got {key}={getattr(self, key)}")
        if self.folder is None and self.classes is not None:
            raise UserError(
                f"task images: classes are those of a folder, got classes={self.classes} without task.folder; leave it out"
            )
        if self.folder is not None and self.classes is None:  # saved with a run, whose adapter then needs no folder
            object.__setattr__(self, "classes", _class_names(Path(self.folder) / "train"))


@register_task(config=ImagesConfig)
class Images(Task):
    kind = "classify_images"
    family = "images"
    version = 1

    def __init__(self, cfg: ImagesConfig, seed: int):
        super().__init__(cfg, seed)
        self.folder = None if cfg.folder is None else Path(cfg.folder)
        self.classes: Sequence[str] = SHAPES if self.folder is None else _two_or_more(self.folder, cfg.classes)
        self.num_labels = len(self.classes)

    @property
    def has_data(self) -> bool:
        return self.folder is None or (self.folder / "train").is_dir()

    def train(self) -> Sequence[LabelledImage]:
        return self._train

    def test(self) -> Mapping[str, Sequence[LabelledImage]]:
        return {"images": self._test}

    def sources(self) -> list[dict[str, Any]]:
        sets = {"train": self._train, "test": self._test}
        where = "images" if self.folder is None else str(self.folder)
        return [
            {"name": f"{where}/{name}", "rows": len(records), "sha256": _fingerprint(records)}
            for name, records in sets.items()
        ]

    @cached_property
    def _train(self) -> list[LabelledImage]:
        return self._records("train", self.cfg.n_train)

    @cached_property
    def _test(self) -> list[LabelledImage]:
        return self._records("test", self.cfg.n_test)

    def _records(self, split: str, n: int | None) -> list[LabelledImage]:
        if self.folder is None:
            return [drawn(split, self.cfg.data_seed, i) for i in range(n or DRAWN[split])]
        records = list(_read(self.folder / split, self.classes))
        if n is None or n >= len(records):
            return records
        places = random.Random(f"{self.cfg.data_seed}/{split}").sample(range(len(records)), n)
        return [records[i] for i in sorted(places)]


def drawn(split: str, seed: int, i: int) -> LabelledImage:
    """Returns one shape of a split; every fourth has the same class."""
    draw = random.Random(f"images/{split}/{seed}/{i}")
    label = i % len(SHAPES)

    def number(low: int, high: int) -> int:
        return low + int(draw.random() * (high - low + 1))

    radius = number(6, 12)
    x, y = (number(radius, SIZE - 1 - radius) for _ in range(2))
    noise = np.frombuffer(draw.randbytes(3 * SIZE * SIZE), dtype=np.uint8).reshape(SIZE, SIZE, 3)
    dark, bright = (np.array([number(*of) for _ in range(3)]) for of in ((0, 80), (110, 190)))
    rows, columns = np.mgrid[:SIZE, :SIZE]
    inside = _inside(SHAPES[label], columns - x, rows - y, radius)[:, :, None]
    pixels = (np.where(inside, bright, dark) + noise // 4).astype(np.uint8)
    return LabelledImage(
        f"{split}-{seed}-{i}", Image.fromarray(pixels), label, hashlib.sha256(pixels.tobytes()).hexdigest()
    )


def _inside(shape: str, dx: Any, dy: Any, radius: int) -> Any:
    """Returns which pixels a shape covers, from their distances to its middle."""
    within = np.maximum(abs(dx), abs(dy)) <= radius
    if shape == "circle":
        return dx * dx + dy * dy <= radius * radius
    if shape == "triangle":
        return within & (2 * abs(dx) <= dy + radius)
    if shape == "cross":
        return within & (np.minimum(abs(dx), abs(dy)) <= radius // 4)
    return within


def _class_names(folder: Path) -> list[str] | None:
    """Returns the names of the folders in a folder, sorted; None if it is not there."""
    if not folder.is_dir():
        return None
    return sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))


def _two_or_more(folder: Path, classes: Sequence[str] | None) -> Sequence[str]:
    if classes is None:
        raise UserError(
            "task images: folder must be an existing folder with train/CLASS and test/CLASS, got "
            f"task.folder={shown(str(folder))}"
        )
    if len(classes) < 2:
        raise UserError(
            f"task images: there must be two classes to tell apart, got {', '.join(classes) or 'no folder'} in "
            f"{shown(str(folder))}/train; make a folder per class"
        )
    return classes


def _read(folder: Path, classes: Sequence[str]) -> Iterator[LabelledImage]:
    """Yields the images of a split, class by class."""
    found = _class_names(folder)
    if found is None:
        raise UserError(f"task images: a folder of classes is needed, got none at {shown(str(folder))}")
    if set(found) != set(classes):
        more, fewer = (", ".join(sorted(set(a) - set(b))) or "none" for a, b in ((found, classes), (classes, found)))
        raise UserError(
            f"task images: train and test must hold the same classes, those trained on, got {more} too many and "
            f"{fewer} missing in {shown(str(folder))}"
        )
    for label, name in enumerate(classes):
        files = sorted(
            file
            for file in (folder / name).iterdir()
            if file.suffix.lower() in ENDINGS and not file.name.startswith(".")
        )
        if not files:
            raise UserError(
                f"task images: a class must hold an image ({', '.join(e[1:] for e in ENDINGS)}), got none in "
                f"{shown(str(folder / name))}"
            )
        for file in files:
            check_image(file)
            sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
            yield LabelledImage(f"{folder.name}/{name}/{file.name}", file, label, sha256)


def _fingerprint(records: Sequence[LabelledImage]) -> str:
    lines = (f"{record.sha256} {record.label} {record.id}" for record in records)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
