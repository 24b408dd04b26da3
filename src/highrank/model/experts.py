"""Experts whose matrices lie in one 3-D parameter (Mixtral, Qwen and others), each seen as a linear layer of its own."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from highrank.model.transformers_internals import gated


class Expert(nn.Module):
    """One matrix of one expert, W (out_features, in_features), a view of the parameter that holds all of them."""

    def __init__(self, experts: nn.Module, name: str, number: int):
        super().__init__()
        self._of = (experts,)  # a tuple: the experts are no part of one of them
        self._name, self._number = name, number

    @property
    def weight(self) -> Tensor:
        W: Tensor = getattr(self._of[0], self._name)[self._number]
        return W.t() if self._of[0].is_transposed else W

    @property
    def bias(self) -> Tensor | None:
        biases = getattr(self._of[0], f"{self._name}_bias", None)
        return None if biases is None else biases[self._number]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Experts(nn.Module):
    """What `base` computes, with each expert's matrices as layers that can be adapted: `up` (with its gate) and `down`."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base: Any = base
        self.up, self.down = (
            nn.ModuleList(Expert(base, name, e) for e in range(len(getattr(base, name))))
            for name in ("gate_up_proj", "down_proj")
        )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns Σ weight · down(gate(x) ⊙ up(x)) over each token's experts; x (T, d), chosen and weights (T, k)."""
        chosen, weights = (*args, *kwargs.values())
        out = torch.zeros_like(hidden_states)
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            tokens, places = torch.where(chosen == number)
            if len(tokens) or torch.is_grad_enabled():  # in training each has a gradient, if only of 0
                inner = gated(self.base, up(hidden_states[tokens]))
                y = down(inner) * weights[tokens, places, None]
                out = out.index_add(0, tokens, y.to(out.dtype))
        return out


def matrices(experts: nn.Module) -> Iterator[tuple[str, tuple[int, int, int] | tuple[int, int] | None, int, int]]:
    """Yields what an expert's adapted matrices are: the path inside `Experts` with a place for its number, the rows of it,
    and the shape (out_features, in_features) of those."""
    up, down = (getattr(experts, name).shape[1:] for name in ("gate_up_proj", "down_proj"))
    if experts.is_transposed:
        up, down = up[::-1], down[::-1]
    n = int(up[0])
    yield "up.{}", (n // 2, n) if experts.is_concatenated else (1, 2, 2), n // 2, int(up[1])
    yield "down.{}", None, int(down[0]), int(down[1])
