"""What each kind of task asks of a model: a loss in training, answers in evaluation."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from highrank.train.loss import language_model_loss
from highrank.train.outputs import generate


class Objective(Protocol):
    """One kind of task."""

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """Returns the batch's mean loss, and over how many targets it is taken."""

    def answers(
        self, model: Any, batch: Mapping[str, Tensor], tokenizer: Any, decoding: Mapping[str, Any], seed: int
    ) -> list[Any]:
        """Returns the model's answer to each row; `decoding` and `seed` are for those that write."""


class Generate:
    """Texts: cross-entropy in nats over supervised tokens; an answer is what the model writes."""

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        names = ("input_ids", "attention_mask", "labels", "position_ids")
        return language_model_loss(model, **{name: batch[name] for name in names if name in batch})

    def answers(
        self, model: Any, batch: Mapping[str, Tensor], tokenizer: Any, decoding: Mapping[str, Any], seed: int
    ) -> list[Any]:
        return generate(model, tokenizer, batch, decoding, seed)


class Classify:
    """Classes: cross-entropy in nats over rows; an answer is a class index, -1 where a logit is no number."""

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        labels = batch["labels"]
        return F.cross_entropy(_logits(model, batch), labels.long()), len(labels)

    def answers(
        self, model: Any, batch: Mapping[str, Tensor], tokenizer: Any, decoding: Mapping[str, Any], seed: int
    ) -> list[Any]:
        logits = _logits(model, batch)
        return logits.argmax(-1).where(logits.isfinite().all(-1), -1).tolist()  # of NaN, argmax makes a class


class Regress:
    """Values: squared error over rows; an answer is a value."""

    def loss(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        labels = batch["labels"]
        return F.mse_loss(_logits(model, batch).squeeze(-1), labels.float()), len(labels)

    def answers(
        self, model: Any, batch: Mapping[str, Tensor], tokenizer: Any, decoding: Mapping[str, Any], seed: int
    ) -> list[Any]:
        return _logits(model, batch).squeeze(-1).tolist()


OBJECTIVES: dict[str, Objective] = {"generate": Generate(), "classify": Classify(), "regress": Regress()}
"""By a task's `kind`."""


def _logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Returns a classification model's logits (B, num_labels) in fp32."""
    logits: Tensor = model(**{key: value for key, value in batch.items() if key not in ("labels", "index")}).logits
    return logits.float()
