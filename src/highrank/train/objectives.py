"""What each kind of task asks of a model: a loss in training, answers in evaluation."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from highrank.model.images import num_patches
from highrank.train.loss import language_model_loss
from highrank.train.outputs import generate


class Objective(Protocol):
    """One kind of task."""

    def num_tokens(self, model: Any, batch: Mapping[str, Tensor]) -> int:
        """Returns how many tokens a batch shows the model, padding not counted."""

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """Returns the batch's mean loss, and over how many targets it is taken."""

    def answers(
        self, model: Any, batch: Mapping[str, Tensor], tokenizer: Any, decoding: Mapping[str, Any], seed: int
    ) -> list[Any]:
        """Returns the model's answer to each row; `decoding` and `seed` are for those that write."""


class OfTexts:
    """What is read is texts."""

    def num_tokens(self, model: Any, batch: Mapping[str, Tensor]) -> int:
        return int(batch["attention_mask"].sum())


class Generate(OfTexts):
    """Texts: cross-entropy in nats over supervised tokens; an answer is what the model writes."""

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        names = ("input_ids", "attention_mask", "labels", "position_ids")
        return language_model_loss(model, **{name: batch[name] for name in names if name in batch})

    def answers(
        self, model: Any, batch: Mapping[str, Tensor], tokenizer: Any, decoding: Mapping[str, Any], seed: int
    ) -> list[Any]:
        return generate(model, tokenizer, batch, decoding, seed)


class Classify(OfTexts):
    """Classes: cross-entropy in nats over rows; an answer is a class index, -1 where a logit is no number."""

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        labels = batch["labels"]
        return F.cross_entropy(_logits(model, batch), labels.long()), len(labels)

    def answers(
        self, model: Any, batch: Mapping[str, Tensor], tokenizer: Any, decoding: Mapping[str, Any], seed: int
    ) -> list[Any]:
        return _classes(_logits(model, batch))


class Regress(OfTexts):
    """Values: squared error over rows; an answer is a value."""

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        labels = batch["labels"]
        return F.mse_loss(_logits(model, batch).squeeze(-1), labels.float()), len(labels)

    def answers(
        self, model: Any, batch: Mapping[str, Tensor], tokenizer: Any, decoding: Mapping[str, Any], seed: int
    ) -> list[Any]:
        return _logits(model, batch).squeeze(-1).tolist()


class ClassifyImages(Classify):
    """Classes of images: as of texts, but an answer is (class, loss on the right one), and the tokens are patches."""

    def num_tokens(self, model: Any, batch: Mapping[str, Tensor]) -> int:
        return num_patches(model.config) * len(batch["labels"])

    def answers(
        self, model: Any, batch: Mapping[str, Tensor], tokenizer: Any, decoding: Mapping[str, Any], seed: int
    ) -> list[Any]:
        logits = _logits(model, batch)
        nats = F.cross_entropy(logits, batch["labels"], reduction="none")
        return list(zip(_classes(logits), nats.tolist(), strict=True))


OBJECTIVES: dict[str, Objective] = {
    "generate": Generate(),
    "classify": Classify(),
    "regress": Regress(),
    "classify_images": ClassifyImages(),
}
"""By a task's `kind`."""


def _logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Returns a classification model's logits (B, num_labels) in fp32."""
    given = {key: value for key, value in batch.items() if key not in ("labels", "index")}
    if "pixel_values" in given:
        given["pixel_values"] = given["pixel_values"].to(model.dtype)
    logits: Tensor = model(**given).logits
    return logits.float()


def _classes(logits: Tensor) -> list[int]:
    """Returns the class of each row, -1 where a logit is no number."""
    classes: list[int] = logits.argmax(-1).where(logits.isfinite().all(-1), -1).tolist()  # of NaN, argmax makes a class
    return classes
