"""FSDP2 with the checkpoints of every run: one file of whole tensors, of what trains alone."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim import Optimizer

from highrank.model.sharding import sharded_like, whole


class Sharded(ModelParallelStrategy):
    """Lightning's strategy, which would gather the frozen model too, and loads only what is named as in the model."""

    lightning_restore_optimizer = True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # FineTuner gives what trains

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return apply_to_collection(optimizer.state_dict(), Tensor, whole)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Gives each process its shard of the moments, which have the shapes of their parameters."""
        for optimizer, found in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for place, state in found["state"].items():
                like = parameters[place]
                found["state"][place] = {
                    key: sharded_like(like, value) if value.shape == like.shape else value
                    for key, value in state.items()
                }
            optimizer.load_state_dict(found)
