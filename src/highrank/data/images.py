"""Images: files and drawn ones, in the one form that models' image processors take, RGB with 8 bits a channel."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from highrank.base.errors import UserError, described
from highrank.base.files import shown


def check_image(file: Path) -> None:
    """Raises UserError unless a file begins as an image does; its pixels are not read."""
    _open(file).close()


def read_image(image: Any) -> Image.Image:
    """Returns an image, or the one in a file, as it is to be seen: upright, in RGB.

    Raises:
        UserError: if a file holds none, or one whose channels have more than 8 bits.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    with _open(image) as opened:
        try:
            seen = ImageOps.exif_transpose(opened)
            return (seen.convert("RGBA") if "transparency" in seen.info else seen).convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for damaged pixels
            raise _unreadable(image, described(error)) from error


def _open(file: Path) -> Image.Image:
    try:
        opened = Image.open(file)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(file, described(error)) from error
    if opened.mode[0] in "IF":
        mode = opened.mode
        opened.close()
        raise _unreadable(file, f"channels of more than 8 bits (mode {mode})")
    return opened


def _unreadable(file: Path, why: str) -> UserError:
    return UserError(f"image: a file must hold an image of 8 bits a channel, got {shown(str(file))} ({why})")


def noise(n: int, size: int = 64) -> Sequence[Image.Image]:
    """Returns n images of random pixels, always the same."""
    draw = random.Random(0)
    return [Image.frombytes("RGB", (size, size), draw.randbytes(3 * size * size)) for _ in range(n)]
