"""Models that read images: which there are, in how many parts they see one, and whether they take what they are given."""

from typing import Any

import numpy as np
import torch

from highrank.base.errors import UserError
from highrank.model.transformers_internals import setting
from highrank.model.weights import reading


def check_image_config(config: Any) -> None:
    """Raises UserError unless a model reads images in colour."""
    channels = setting(config, "num_channels")
    if channels not in (None, 3):
        raise UserError(
            f"model: images are read in three colours, got num_channels={channels} in config.json of a "
            f"{config.model_type}; give a model of colour images"
        )


def num_patches(config: Any) -> int:
    """Returns in how many patches a model sees an image of its own size, each a token; 1 where its config does not say."""
    sizes = [setting(config, name) for name in ("image_size", "patch_size")]
    if not all(sizes):
        return 1
    (height, width), (down, across) = (size if isinstance(size, list | tuple) else (size, size) for size in sizes)
    return int((height // down) * (width // across))


@torch.no_grad()
def check_processor(model: Any, processor: Any) -> None:
    """Raises UserError unless a model takes images as its processor scales them."""
    with reading(
        f"model: a model must take what its image processor gives, got model_type={model.config.model_type}",
        "; give a folder whose preprocessor_config.json fits its config.json",
    ):
        pixels = processor(np.zeros((64, 64, 3), dtype=np.uint8), return_tensors="pt")["pixel_values"]
        model(pixel_values=pixels.to(model.dtype))
