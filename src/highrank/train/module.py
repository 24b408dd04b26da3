"""The one LightningModule: any backbone, any method, language modelling, classification or regression."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import get_scheduler

from highrank.base.errors import described
from highrank.base.processes import WHOLE, Share
from highrank.config.run_config import RunConfig
from highrank.data.protocol import Protocol
from highrank.data.task import Task
from highrank.model.adapters import Adapters
from highrank.model.language import padding_moves
from highrank.model.sharding import is_sharded
from highrank.model.torch_internals import leave_out_of_ddp
from highrank.model.transformers_internals import stacks_of
from highrank.train.fsdp import shard
from highrank.train.loss import example_losses
from highrank.train.memory import DoesNotFit, halving, out_of_memory
from highrank.train.objectives import OBJECTIVES
from highrank.train.optimizer import SCHEDULERS, make_optimizer, warmup_steps
from highrank.train.outputs import decoding, of_one_length, rank_options

LACKING = -1
"""In the place of an example's number: memory did not suffice."""


class FineTuner(lightning.LightningModule):
    """Trains the adapters of a model on a task, and predicts with them.

    Only what trains is in `state_dict`; the frozen backbone is re-read from its source.
    """

    strict_loading = False
    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(
        self,
        adapters: Adapters,
        task: Task,
        tokenizer: Any,
        core: RunConfig,
        total_steps: int,
        protocol: Protocol | None = None,
        eval_share: Share = WHOLE,
        parts: int = 1,
    ):
        super().__init__()
        self.one_length = False
        """Whether prompts are computed with others of their own length only, because padding would move them."""
        self.model: Any = adapters.model
        self.adapters, self.task, self.tokenizer = adapters, task, tokenizer
        self.core, self.total_steps, self.protocol = core, total_steps, protocol
        self.objective = OBJECTIVES[task.kind]
        self.eval_share = eval_share
        self.num_tokens = 0
        """Tokens that this process saw in training, padding not counted."""
        self.parts = parts
        """Into how many parts a training batch is cut where it does not fit into memory whole."""
        self.validation_rows = core.eval_batch_size
        """How many held-out examples are computed at a time; fewer where they do not fit."""
        self.out_of_memory = False
        """Whether memory ran out in this pass over a test set, whose further batches are then left out."""
        if core.checkpoint_activations:
            self.model.activation_checkpointing_enable()
            self.model.disable_input_require_grads()  # which that turned on: frozen blocks below would be in the graph
        bodies = stacks_of(self.model) if core.compile else []
        self._compiled = [(body, torch.compile(body.forward, dynamic=True)) for body in bodies]

    @contextmanager
    def asked(self, task: Task, protocol: Protocol) -> Iterator[None]:
        """Within it the model is asked another task of its kind."""
        before = self.task, self.protocol
        self.task, self.protocol = task, protocol
        try:
            yield
        finally:
            self.task, self.protocol = before

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss, num_targets = self.loss_by_rows(batch, math.ceil(len(batch["labels"]) / self.parts))
        trainer: Any = self.trainer
        weight = trainer.train_dataloader.batch_sampler.weight(index)
        if not weight:
            return 0 * loss  # this process has no examples left in the step
        self.num_tokens += self.objective.num_tokens(self.model, batch)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=num_targets)
        return weight * loss

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Within it the model below its head runs compiled, if the run asks for it; generation never does."""
        for body, compiled in self._compiled:
            body.forward = compiled
        try:
            yield
        finally:
            for body, _ in self._compiled:
                body.__dict__.pop("forward", None)

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Returns the batch's mean loss and over how many targets it is taken.

        Cross-entropy in nats for language models and classes, squared error for regression.
        """
        with self.compiled():
            return self.objective.loss(self.model, batch)

    def loss_by_rows(self, batch: dict[str, Tensor], rows: int) -> tuple[Tensor, int]:
        """As `loss`, with the activations of `rows` rows in memory at a time: backward computes each part again."""
        if rows >= len(batch["labels"]):
            return self.loss(batch)
        parts = zip(*(tensor.split(rows) for tensor in batch.values()), strict=True)
        losses = [checkpoint(self.loss, dict(zip(batch, part, strict=True)), use_reentrant=False) for part in parts]
        num_targets = sum(n for _, n in losses)
        return sum(loss * (n / num_targets) for loss, n in losses), num_targets

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        rows = min(self.validation_rows, len(batch["labels"]))
        (loss, num_targets), fitting = halving(lambda rows: self.loss_by_rows(batch, rows), rows, self.model)
        if fitting < rows:
            self.validation_rows = fitting
        self.log("validation/loss", loss, batch_size=num_targets, sync_dist=True)

    def on_predict_start(self) -> None:
        self.out_of_memory = False
        # What is put in front of a row stands in front of its padding, which moves it where distance is counted in places.
        self.one_length = self.model.can_generate() and (self.adapters.num_positions > 0 or padding_moves(self.model))

    def predict_step(self, batch: dict[str, Tensor], index: int = 0) -> list[tuple[int, Any]]:
        """Returns `outputs`, or `losses` of texts with labels. Where memory runs out: (LACKING, how), and nothing for the batches after it; nothing is
        raised, because other processes go on."""
        if self.out_of_memory:
            return []
        try:
            texts = self.task.kind == "generate" and "labels" in batch
            return self.losses(batch) if texts else self.outputs(batch, index)
        except Exception as error:
            if not out_of_memory(error):
                raise
            if is_sharded(self.model):  # the other processes wait within their step
                raise DoesNotFit(described(error), len(batch["index"])) from error
            self.out_of_memory = True
            return [(LACKING, described(error))]

    def losses(self, batch: dict[str, Tensor]) -> list[tuple[int, Any]]:
        """Returns (place, sum of the cross-entropy in nats over the targets) per row; rows are padded as in training."""
        nats = example_losses(self.model, batch["input_ids"], batch["attention_mask"], batch["labels"])
        return list(zip(batch["index"].tolist(), nats, strict=True))

    def outputs(self, batch: dict[str, Tensor], index: int = 0) -> list[tuple[int, Any]]:
        """Returns (place, output) per row: the task's kind of answer, or {option: log-probability}."""
        if self.one_length:
            return [pair for part in of_one_length(batch) for pair in self._outputs(part, index)]
        return self._outputs(batch, index)

    def _outputs(self, batch: dict[str, Tensor], index: int) -> list[tuple[int, Any]]:
        if "owner" in batch:
            return rank_options(self.model, batch)
        seed = 1_000_003 * self.core.seed + self.eval_share.number(index)
        answers = self.objective.answers(self.model, batch, self.tokenizer, decoding(self.task, self.protocol), seed)
        return list(zip(batch["index"].tolist(), answers, strict=True))

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh: Any = self.device_mesh
            shard(self.model, mesh["data_parallel"])
            return
        # Every process has read the same frozen base: DDP need not send it, and could not send a quantised one.
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        frozen += [name for name, _ in self.named_buffers()]
        leave_out_of_ddp(self, frozen)

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.adapters, self.core)
        warmup = warmup_steps(self.core, self.total_steps)
        scheduler = get_scheduler(SCHEDULERS[self.core.schedule], optimizer, warmup, self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.adapters.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.adapters.load_state_dict(checkpoint.pop("state_dict"))
        checkpoint["state_dict"] = {}
