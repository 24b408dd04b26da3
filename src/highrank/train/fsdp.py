"""FSDP2: how a model is sharded, and checkpoints as those of every run: one file of whole tensors, of what trains."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim import Optimizer

from highrank.model.method import Method
from highrank.model.sharding import is_sharded, sharded_like, whole
from highrank.model.transformers_internals import block_names


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
        for optimizer, saved_state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for place, state in saved_state["state"].items():
                like = parameters[place]
                saved_state["state"][place] = {
                    key: sharded_like(like, value) if value.shape == like.shape else value
                    for key, value in state.items()
                }
            optimizer.load_state_dict(saved_state)


def shard(model: Any, mesh: Any) -> None:
    """Shards a model's parameters over the processes (FSDP2), block by block, the rest as one more unit.

    A block's parameters are whole while it computes, forward and backward, so an adapter inside sees W as ever. What
    trains and what is frozen keep their own dtypes.
    """
    from torch.distributed.fsdp import fully_shard

    if is_sharded(model):
        return
    blocks = block_names(model)
    for module in list(model.modules()):
        if isinstance(module, Method):
            module.keeps = False
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
