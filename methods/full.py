"""Full fine-tuning: train the weight itself.

    W' = weight

| symbol | shape  | start         | trained                |
| ------ | ------ | ------------- | ---------------------- |
| weight | (n, k) | W, in fp32    | yes                    |
| W      | (n, k) | pretrained    | no, kept to measure ΔW |

Trainable: n k per weight, and with it every other parameter of the model. W' = W at the start because weight copies
W. rank(ΔW) <= min(n, k).

Source: the baseline of every method here, e.g. Hu et al., arXiv 2106.09685, section 2 (eq. 1).
Differences: the copy is fp32 whatever the base, since a step of 1e-5 on a bf16 weight is rounded away; products run in
the input's dtype.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from highrank.plugin import FullAdapters, Method, Site, register_method


@dataclass(frozen=True, kw_only=True)
class FullConfig:
    """There is nothing to set."""


@register_method(config=FullConfig)
class Full(Method):
    default_lr = 5e-5
    family = FullAdapters

    def __init__(self, in_features: int, out_features: int, cfg: FullConfig, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def reset_parameters(self, W: Tensor, site: Site) -> None:
        with torch.no_grad():
            self.weight.copy_(W)

    def effective_weight(self, W: Tensor) -> Tensor:
        return self.weight.to(torch.promote_types(W.dtype, self.weight.dtype))

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: FullConfig) -> int:
        return in_features * out_features
