"""LayerNorm tuning: train the weights and biases of the norms, and nothing else.

    y = g' ⊙ x̂ + c',    x̂ = the norm's own x / rms(x), or (x - mean) / std

| symbol | shape | start               | trained |
| ------ | ----- | ------------------- | ------- |
| g, c   | (d,)  | pretrained          | no      |
| g'     | (d,)  | g                   | yes     |
| c'     | (d,)  | c, where it has one | yes     |

for every norm outside the head, those of queries and keys too. Trainable: as many numbers as the norms have; 175,104 in
Llama-3.2-3B (57 norms of 3072, without biases). The output is the base's at the start.

Source: Zhao et al., "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", arXiv 2312.11420.
Reference code: huggingface/peft 0.21, tuners/ln_tuning/layer.py (ln_tuning_layers.weight = g', ln_tuning_layers.bias = c').
Differences: all norms train, where PEFT's default for Qwen2 names one of a block's two. g', c' and x̂ are fp32 whatever the
base, and y is rounded once, since a small step on a bf16 weight, or beside a bf16 x̂, is rounded away. g' and c' do not
decay: their neutral values are g and c.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from highrank.model.backbones import modules_on_text
from highrank.plugin import PeftForm, UserError, WholeModelMethod, register_method


@dataclass(frozen=True, kw_only=True)
class LayerNormConfig:
    """There is nothing to set."""


@register_method(config=LayerNormConfig)
class LayerNormTuning(WholeModelMethod):
    default_lr = 3.2e-3
    mergeable = True
    peft = PeftForm(type="LN_TUNING", tensors={"weight": "ln_tuning_layers.weight", "bias": "ln_tuning_layers.bias"})

    def __init__(self, model: Any, cfg: LayerNormConfig):
        super().__init__(model, cfg)
        self.norms = nn.ModuleDict(
            {
                _key(name): nn.ParameterDict(
                    {key: nn.Parameter(torch.empty(len(p))) for key, p in norm.named_parameters(recurse=False)}
                )
                for name, norm in _norms(model)
            }
        )
        self.no_decay = tuple(name for name, _ in self.named_parameters())
        self._before: list[Tensor] = []
        self._own: dict[str, tuple[dict[str, Any], torch.dtype]] = {}
        """What the norms that are being computed hold themselves, and the dtype in which they answer."""

    @torch.no_grad()
    def reset_parameters(self, model: Any, tokenizer: Any) -> None:
        for tuned, pretrained in self._pairs(model):
            tuned.copy_(pretrained)

    def _pairs(self, model: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields every trained vector, and what the norm itself has in its place."""
        for name, norm in _norms(model):
            tuned = dict(self.norms[_key(name)].named_parameters())
            yield from ((tuned[key], pretrained) for key, pretrained in norm.named_parameters(recurse=False))

    def hooks(self, model: Any) -> list[RemovableHandle]:
        return [handle for name, norm in _norms(model) for handle in self._hooks(norm, _key(name))]

    def _hooks(self, norm: nn.Module, name: str) -> tuple[RemovableHandle, RemovableHandle]:
        """Puts the trained vectors in the norm's place for each of its calls, so that it computes as it always does."""
        enter, leave = partial(self._enter, name), partial(self._leave, name)
        return norm.register_forward_pre_hook(enter), norm.register_forward_hook(leave, always_call=True)

    def _enter(self, name: str, norm: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, tuned = args[0], cast(Any, self.norms[name])  # looked up in each call: it may have been sharded
        own = dict(norm.named_parameters(recurse=False))
        plain = all(tensor.dtype == torch.float32 for tensor in (x, *own.values()))
        # T5's norm answers in its weight's dtype, others in x's.
        dtype = torch.float32 if plain else type(norm).forward(norm, x[:0]).dtype
        self._own[name] = own, dtype
        for key, parameter in tuned.items():
            setattr(norm, key, parameter)
        return (x.to(next(iter(tuned.values())).dtype), *args[1:])

    def _leave(self, name: str, norm: Any, args: tuple[Any, ...], y: Tensor | None) -> Tensor | None:
        own, dtype = self._own.pop(name)
        for key, parameter in own.items():
            setattr(norm, key, parameter)
        return None if y is None else y.to(dtype)  # None: the call has failed

    @torch.no_grad()
    def merge(self, model: Any) -> None:
        self.unplug()
        for tuned, pretrained in self._pairs(model):
            self._before.append(pretrained.clone())
            pretrained.copy_(tuned)
        self.merged = True

    @torch.no_grad()
    def unmerge(self, model: Any) -> None:
        for before, (_, pretrained) in zip(self._before, self._pairs(model), strict=True):
            pretrained.copy_(before)
        self._before.clear()
        self.plug(model)
        self.merged = False

    @classmethod
    def validate(cls, model: Any, cfg: LayerNormConfig) -> None:
        if not any(True for _ in _norms(model)):
            raise UserError(
                f"layernorm: the model has no norms with weights to train, got model_type={model.config.model_type}"
            )

    @classmethod
    def sites(cls, model: Any, cfg: LayerNormConfig) -> dict[str, int]:
        return {"norms": sum(1 for _ in _norms(model))}

    @classmethod
    def num_trainable(cls, model: Any, cfg: LayerNormConfig) -> int:
        return sum(p.numel() for _, norm in _norms(model) for p in norm.parameters(recurse=False))


def _norms(model: Any) -> Iterator[tuple[str, Any]]:
    """Yields the modules that are called norms and hold vectors."""
    for name, module in modules_on_text(model):
        parameters = list(module.parameters(recurse=False)) if "Norm" in type(module).__name__ else []
        if parameters and all(p.dim() == 1 for p in parameters):
            yield name, module


def _key(name: str) -> str:
    """A module's name holds no dots."""
    return name.replace(".", "/")
