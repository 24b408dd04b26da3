"""P-tuning (version 1): prompt tuning whose virtual tokens come out of a small network.

    E' = [P; E],    P = L3 relu(L2 relu(L1 Z)),    Li x = Wi x + ci on each row

| symbol | shape        | start                  | trained |
| ------ | ------------ | ---------------------- | ------- |
| E      | (T, d)       | the tokens' embeddings | no      |
| Z      | (p, d)       | N(0, 1)                | yes     |
| L1     | (h, d) + (h) | U(±1/√d)               | yes     |
| L2     | (h, h) + (h) | U(±1/√h)               | yes     |
| L3     | (d, h) + (d) | U(±1/√h)               | yes     |

Trainable: p d + 2 d h + h² + 2 h + d for the whole model. The output differs from the base's at the start, and there is
no merged weight.

Source: Liu et al., "GPT Understands, Too", arXiv 2103.10385, section 2 (the prompt encoder).
Reference code: huggingface/peft 0.21, tuners/p_tuning/model.py, reparameterization MLP (embedding.weight = Z,
mlp_head.0, .2, .4 = L1, L2, L3). HiRA's tables count this with p = 20 and h = d.
Differences: no LSTM.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from highrank.plugin import PeftForm, UserError, VirtualTokens, register_method


@dataclass(frozen=True, kw_only=True)
class PTuningConfig:
    num_virtual_tokens: int = 20
    """p, trained positions in front of the sequence."""
    hidden_size: int | None = None
    """h, width of the network; default: that of the model."""

    def __post_init__(self) -> None:
        for key in ("num_virtual_tokens", "hidden_size"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"p_tuning: {key} must be >= 1, got {key}={value}")


@register_method(config=PTuningConfig)
class PTuning(VirtualTokens):
    default_lr = 1e-4
    examples = ({"num_virtual_tokens": 3}, {"hidden_size": 5})
    peft = PeftForm(type="P_TUNING", fields={"num_virtual_tokens": "num_virtual_tokens"}, one_way=True)

    def __init__(self, model: Any, cfg: PTuningConfig):
        super().__init__(model, cfg)
        d = model.get_input_embeddings().embedding_dim
        h = cfg.hidden_size or d
        self.Z = nn.Parameter(torch.empty(cfg.num_virtual_tokens, d))
        self.L1, self.L2, self.L3 = nn.Linear(d, h), nn.Linear(h, h), nn.Linear(h, d)

    def reset_parameters(self, model: Any, tokenizer: Any) -> None:
        nn.init.normal_(self.Z)
        for layer in (self.L1, self.L2, self.L3):
            layer.reset_parameters()

    def embeddings(self) -> Tensor:
        return self.L3(self.L2(self.L1(self.Z).relu()).relu())

    @classmethod
    def num_trainable(cls, model: Any, cfg: PTuningConfig) -> int:
        p, d = cfg.num_virtual_tokens, model.get_input_embeddings().embedding_dim
        h = cfg.hidden_size or d
        return p * d + 2 * d * h + h * h + 2 * h + d
