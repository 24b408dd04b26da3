"""SHiRA: train a few scattered entries of the weight.

    W' = W + S(v),    S(v)[i_t, j_t] = v_t for the p chosen places (i_t, j_t), and 0 elsewhere

| symbol | shape  | start                       | trained |
| ------ | ------ | --------------------------- | ------- |
| W      | (n, k) | pretrained                  | no      |
| v      | (p,)   | 0                           | yes     |
| places | (p,)   | by `mask`, in row order     | no      |

Choices of the places: `random`, p of the n k with the same chance; `wm` (weight magnitude), those of the p largest |W|.
A weight has its own random places unless `mask_seed` is given; then weights of one shape share theirs.

Trainable: p = r (n + k) per weight, as many as LoRA of rank r has. W' = W at the start because v = 0. rank(ΔW) <= min(n, k):
r bounds how many entries change, not their rank.

Source: Bhardwaj et al., "Sparse High Rank Adapters", arXiv 2406.13175, section 3 (SHiRA-Rand and SHiRA-WM; Grad and SNIP
choose by a gradient before training, which a method here does not see, and Struct is left out).
Reference code: huggingface/peft 0.21, tuners/shira/layer.py, mask_functions.py (shira_weight = v, shira_indices = places as
(rows, columns), random_seed = mask_seed: the same places, entry for entry).
Differences: PEFT gives all weights of one shape the same places also where it is given no seed, and has no `wm`. It keeps
a second (n, k) matrix and its gradient in each step; here W + S(v) is built again in backward. On a 16-bit base it rounds
W + v to 16 bits; here S(v) x is a product of its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from highrank.model.kernels import rebuilt_linear
from highrank.plugin import DoesNotFit, Method, PeftForm, Site, UserError, register_method

MASKS = ("random", "wm")


@dataclass(frozen=True, kw_only=True)
class SHiRAConfig:
    r: int = 32
    """Rank of the LoRA update with as many parameters."""
    mask: str = "random"
    """How places are chosen: random, or wm (the largest weights)."""
    mask_seed: int | None = None
    """Seed of the random places, the same for every weight; for mask=random alone."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"shira: r must be >= 1, got r={self.r}")
        if self.mask not in MASKS:
            raise UserError(f"shira: mask must be one of {', '.join(MASKS)}, got mask={self.mask}")
        if self.mask != "random" and self.mask_seed is not None:
            raise UserError(
                f"shira: mask_seed belongs to mask=random, got mask_seed={self.mask_seed} with mask={self.mask}"
            )


@register_method(config=SHiRAConfig)
class SHiRA(Method):
    default_lr = 1.6e-3
    examples = ({"r": 2}, {"r": 2, "mask": "wm"}, {"r": 1, "mask_seed": 7})
    peft = PeftForm(
        type="SHIRA",
        fields={"r": "r", "mask_seed": "random_seed"},
        fixed={"mask_type": "random"},  # the places are in the file, and what PEFT draws is replaced
        tensors={"v": "shira_weight"},
        frozen=lambda adapter: {"shira_indices": adapter.rows_and_columns()},
        linear_only=True,
        # without a seed PEFT draws with the one that a new generator has
        read=lambda fields, tensors: (
            {**fields, "mask_seed": torch.Generator().initial_seed()} if fields["mask_seed"] is None else fields
        ),
    )

    def __init__(self, in_features: int, out_features: int, cfg: SHiRAConfig, shared: nn.Module | None = None):
        super().__init__(in_features, out_features, cfg, shared)
        p = self.num_trainable(in_features, out_features, cfg)
        self.v = nn.Parameter(torch.empty(p))
        self.register_buffer("places", torch.empty(p, dtype=torch.int32), persistent=False)

    def reset_parameters(self, W: Tensor, site: Site) -> None:
        nn.init.zeros_(self.v)
        if self.cfg.mask == "wm":
            order = W.float().abs().flatten().sort(descending=True, stable=True).indices  # of equals the first
        else:
            seed = site.seed if self.cfg.mask_seed is None else self.cfg.mask_seed
            order = torch.randperm(W.numel(), generator=torch.Generator().manual_seed(seed))
        self.places.copy_(order[: len(self.v)].sort().values)

    def rows_and_columns(self) -> Tensor:
        """Returns the places as (2, p) rows and columns."""
        return torch.stack([self.places // self.in_features, self.places % self.in_features])

    def effective_weight(self, W: Tensor) -> Tensor:
        return W + scattered(self.v, self.places, W.shape)

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """One dense product with W + S(v), which is built again in backward."""
        shape = W.shape

        def update(v: Tensor, places: Tensor) -> Tensor:
            return scattered(v, places, shape)

        return rebuilt_linear(x, W, update, _gradients, (self.v, self.places), bias, self.cached)

    @classmethod
    def exact_base(cls, cfg: SHiRAConfig) -> bool:
        return cfg.mask == "wm"

    @classmethod
    def validate(cls, in_features: int, out_features: int, cfg: SHiRAConfig) -> None:
        most = in_features * out_features // (in_features + out_features)
        if cfg.r > most:
            rule, shape = "must be <= out * in / (out + in)", (out_features, in_features)
            raise DoesNotFit(cls, cfg, "r", rule, shape, most=most)

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: SHiRAConfig) -> int:
        return cfg.r * (in_features + out_features)

    @classmethod
    def num_frozen_extra(cls, in_features: int, out_features: int, cfg: SHiRAConfig) -> int:
        return cls.num_trainable(in_features, out_features, cfg)


def scattered(v: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """Returns S(v), of that shape."""
    return v.new_zeros(shape.numel()).index_add(0, places, v).view(shape)


def _gradients(G: Tensor, v: Tensor, places: Tensor) -> tuple[Tensor, None]:
    return G.flatten().index_select(0, places), None
