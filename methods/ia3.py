"""(IA)³: scale every output of a weight, or every input, by a learned number.

    W' = diag(l) W  (side = out)    or    W' = W diag(l)  (side = in)

| symbol | shape                         | start      | trained |
| ------ | ----------------------------- | ---------- | ------- |
| W      | (n, k)                        | pretrained | no      |
| l      | (n, 1) for out, (1, k) for in | 1          | yes     |

Trainable: n, or k, per weight. W' = W at the start because l = 1. rank(ΔW) <= min(rank(W), how many l are not 1). This is
HyperAdapt with b = 1 (out) or a = 1 (in), and BOFT with R = 0 (out).

Source: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", arXiv
2205.05638, section 3.3: l_k and l_v scale keys and values, l_ff what goes into the last matrix of the feed-forward layer.
Where that is a product of a gate and `up`, as in Llama, to scale it is to scale the outputs of `up`: the paper's three
vectors are `placement=[k,v,up]` with side=out.
Reference code: huggingface/peft 0.21, tuners/ia3/layer.py (ia3_l = l; in is what it calls feedforward_modules).
Differences: PEFT scales a bias too where l scales outputs, y = l ⊙ (W x + bias); here the bias is added after l, unscaled,
since a method changes a weight. Without a bias both are the same; with one, export and import refuse. PEFT has a side per
module, here all weights have one.
l does not decay: its neutral value is 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from highrank.model.kernels import row_scaled
from highrank.plugin import Method, PeftForm, Site, UserError, register_method

SIDES = ("out", "in")


@dataclass(frozen=True, kw_only=True)
class IA3Config:
    side: str = "out"
    """What is scaled: out (rows of W) or in (columns)."""

    def __post_init__(self) -> None:
        if self.side not in SIDES:
            raise UserError(f"ia3: side must be one of {', '.join(SIDES)}, got side={self.side}")


def _side(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """The shapes say what PEFT's list of feedforward_modules came to."""
    sides = {"in" if len(tensor) == 1 else "out" for key, tensor in tensors.items() if key.endswith("ia3_l")}
    if len(sides) == 2:
        raise UserError(
            "ia3: all weights are scaled on one side, got both for "
            f"feedforward_modules={fields['side']}; merge it with PEFT instead"
        )
    return {"side": sides.pop() if sides else "out"}


@register_method(config=IA3Config)
class IA3(Method):
    default_lr = 9.5e-3
    no_decay = ("l",)
    examples = ({"side": "out"}, {"side": "in"})
    peft = PeftForm(
        type="IA3",
        fields={"side": "feedforward_modules"},
        computed={"feedforward_modules": lambda cfg: [] if cfg.side == "out" else ".*"},
        ignored=("init_ia3_weights",),
        tensors={"l": "ia3_l"},
        scales_bias=lambda cfg: cfg.side == "out",
        read=_side,
    )

    def __init__(self, in_features: int, out_features: int, cfg: IA3Config, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        self.l = nn.Parameter(torch.empty((out_features, 1) if cfg.side == "out" else (1, in_features)))

    def reset_parameters(self, W: Tensor, site: Site) -> None:
        nn.init.ones_(self.l)

    def effective_weight(self, W: Tensor) -> Tensor:
        return W * self.l

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = l ⊙ (W x) + bias or W (l ⊙ x) + bias, multiplied in fp32 (in bf16, 1 + 0.003 is 1)."""
        if self.cfg.side == "out":
            return row_scaled(F.linear(x, W), self.l[:, 0], bias)
        return F.linear((self.l[0] * x).to(x.dtype), W, bias)

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: IA3Config) -> int:
        return out_features if cfg.side == "out" else in_features
