"""BitFit: train the biases that the model has.

    c' = c + delta

| symbol | shape | start      | trained |
| ------ | ----- | ---------- | ------- |
| c      | (n,)  | pretrained | no      |
| delta  | (n,)  | 0          | yes     |

for the bias c of every linear layer and every norm that runs on text, outside the head. Trainable: as many numbers as these
biases have; none in Llama. The output is the base's at the start.

Source: Ben Zaken et al., "BitFit", arXiv 2106.10199, section 3.
Differences: the update is fp32 whatever the base, since a small step on a bf16 bias is rounded away, and is added to what
the module returns; weight decay pulls it, not the bias, to 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from highrank.model.backbones import modules_on_text
from highrank.model.placement import is_transposed
from highrank.plugin import UserError, WholeModelMethod, register_method


@dataclass(frozen=True, kw_only=True)
class BitFitConfig:
    """There is nothing to set."""


@register_method(config=BitFitConfig)
class BitFit(WholeModelMethod):
    mergeable = True

    def __init__(self, model: Any, cfg: BitFitConfig):
        super().__init__(model, cfg)
        self.delta = nn.ParameterDict(
            {_key(name): nn.Parameter(torch.empty(len(module.bias))) for name, module in _biased(model)}
        )
        self._before: dict[str, Tensor] = {}

    def reset_parameters(self, model: Any, tokenizer: Any) -> None:
        for delta in self.delta.values():
            nn.init.zeros_(delta)

    def hooks(self, model: Any) -> list[RemovableHandle]:
        return [module.register_forward_hook(partial(self._add, _key(name))) for name, module in _biased(model)]

    def _add(self, key: str, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        return y + self.delta[key].to(y.dtype)  # looked up in each call: a strategy may put a shard in its place

    @torch.no_grad()
    def merge(self, model: Any) -> None:
        self.unplug()
        for name, module in _biased(model):
            self._before[name] = module.bias.clone()
            module.bias.copy_(module.bias + self.delta[_key(name)])
        self.merged = True

    @torch.no_grad()
    def unmerge(self, model: Any) -> None:
        for name, module in _biased(model):
            module.bias.copy_(self._before.pop(name))
        self.plug(model)
        self.merged = False

    @classmethod
    def validate(cls, model: Any, cfg: BitFitConfig) -> None:
        if not any(True for _ in _biased(model)):
            raise UserError(f"bitfit: the model has no biases to train, got model_type={model.config.model_type}")

    @classmethod
    def sites(cls, model: Any, cfg: BitFitConfig) -> dict[str, int]:
        return {"biases": sum(1 for _ in _biased(model))}

    @classmethod
    def num_trainable(cls, model: Any, cfg: BitFitConfig) -> int:
        return sum(len(module.bias) for _, module in _biased(model))


def _biased(model: Any) -> Iterator[tuple[str, Any]]:
    """Yields the modules whose bias is added to their output."""
    for name, module in modules_on_text(model):
        known = isinstance(module, nn.Linear | nn.LayerNorm) or is_transposed(module)
        if known and module.bias is not None:
            yield name, module


def _key(name: str) -> str:
    """A parameter's name holds no dots."""
    return name.replace(".", "/")
