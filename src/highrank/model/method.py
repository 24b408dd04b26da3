"""The contract of a method: how one frozen weight W becomes W'.

A method sees a weight and an input, never the model: it cannot know whether W is a whole `nn.Linear`, a row slice of a
fused projection or a transposed GPT-2 `Conv1D`. Shapes: n = out_features, k = in_features, W is (n, k), x is (..., k).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from highrank.model.adapters import Adapters
from highrank.model.contract import check_class
from highrank.model.kernels import DTYPES, handles
from highrank.model.peft_form import PeftForm
from highrank.model.quantised import QuantisedWeight
from highrank.model.torch_internals import version_of
from highrank.model.weight_adapters import Site, WeightAdapters


class Method(nn.Module):
    """One adapter on one frozen weight.

    A subclass sets its parameters in `__init__` (fp32, whatever the base's dtype), gives their start in
    `reset_parameters`, and defines the method in `effective_weight`. Merging, export, analysis and the contract tests
    rest on that one definition; `forward` may be overridden for speed only.
    """

    name: ClassVar[str]
    config: ClassVar[type]
    family: ClassVar[type[Adapters]] = WeightAdapters
    """How it sits on a model; methods on anything but weights follow the contract in `highrank.model.whole_model`."""
    default_lr: ClassVar[float] = 1e-3
    """A starting point for the learning rate, used when none is given."""
    exact_at_init: ClassVar[bool] = True
    """Whether W' equals W before the first step, up to rounding."""
    exact_gradient: ClassVar[bool] = True
    """Whether parameter gradients are those of the forward value; False where a method stops one on purpose."""
    no_decay: tuple[str, ...] = ()
    """Parameters whose neutral value is not 0, which weight decay must not touch; an adapter may have its own."""
    lr_factors: Mapping[str, float] = {}
    """By what the learning rate of some parameters is multiplied; an adapter may have its own."""
    examples: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    """Fields that show what the method can do, on a weight as small as (24, 16): the tests run over them. The first is used
    where one is enough."""
    mergeable: ClassVar[bool] = True
    """Whether the base can hold what the method learns."""
    peft: ClassVar[PeftForm | None] = None
    """How Hugging Face PEFT writes its adapters; None if it has no such type."""

    def __init__(self, in_features: int, out_features: int, cfg: Any, shared: nn.Module | None = None):
        super().__init__()
        self.in_features, self.out_features, self.cfg = in_features, out_features, cfg
        self._shared = (shared,)  # a tuple: the model owns the module, this adapter only points to it
        self._cache: dict[str, tuple[Any, Any]] = {}
        self.keeps = True
        """Whether evaluation may keep an (n, k) operand; not on a sharded model, whose point is not to hold one."""

    @property
    def shared_tensors(self) -> Any:
        return self._shared[0]

    def reset_parameters(self, W: Tensor, site: Site) -> None:
        """Sets the trainable start and rebuilds frozen tensors from W and `site`; called under the adapter's seed."""
        raise NotImplementedError

    def effective_weight(self, W: Tensor) -> Tensor:
        """Returns W' (n, k), in the wider of W's and the parameters' dtypes."""
        raise NotImplementedError

    def __call__(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns `forward`, or where its dtypes are beyond a faster form what the definition gives, in x's dtype or
        fp32; so too for no tokens, which an expert may get."""
        if not x.numel() and not isinstance(W, QuantisedWeight):
            return Method.forward(self, x, W, bias)
        if handles(x, W):
            return super().__call__(x, W, bias)
        x, W = (t if t.dtype in DTYPES or t.is_complex() else t.float() for t in (x, W))
        return Method.forward(self, x, W, None if bias is None else bias.to(x.dtype))

    def forward(self, x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns x W'ᵀ + bias, (..., n) in the dtype that `F.linear` would give (x's, or autocast's)."""
        return F.linear(x, self.effective_weight(W).to(x.dtype), bias)

    def added(self, x: Tensor) -> Tensor:
        """Returns ΔW x (..., n) in the dtype that `F.linear` would give; for methods whose ΔW does not depend on W, and whose
        ΔW x costs less than W x. It lets `sum` add it to what another method computes of W x."""
        raise NotImplementedError

    def delta_weight(self, W: Tensor) -> Tensor:
        """Returns ΔW = W' - W (n, k) in fp32, subtracted in fp64 so that no bit of a small update is lost."""
        return (self.effective_weight(W.double()) - W.double()).float()

    @classmethod
    def check_class(cls) -> None:
        """Raises UserError unless the class is what this contract says; called when it registers."""
        check_class(cls, Method, "num_trainable", "effective_weight", "reset_parameters")

    @classmethod
    def validate(cls, in_features: int, out_features: int, cfg: Any) -> None:
        """Raises UserError if `cfg` does not fit a weight of this shape; called before any weight loads."""

    @classmethod
    def exact_base(cls, cfg: Any) -> bool:
        """Whether trained numbers mean something beside this very W alone, no rounding of it: places in the order of its
        entries, coordinates in its singular vectors."""
        return False

    @classmethod
    def num_trainable(cls, in_features: int, out_features: int, cfg: Any) -> int:
        """Trainable parameters per adapted weight, from the paper's formula."""
        raise NotImplementedError

    @classmethod
    def num_frozen_extra(cls, in_features: int, out_features: int, cfg: Any) -> int:
        """Frozen numbers held per adapted weight beyond W itself (buffers named `*_cache` are not counted)."""
        return 0

    @classmethod
    def num_frozen_shared(cls, shapes: Sequence[tuple[int, int]], cfg: Any) -> int:
        """Frozen numbers held once per model; `shapes` are the (n, k) of every adapted weight."""
        return 0

    @classmethod
    def shared(cls, shapes: Sequence[tuple[int, int]], cfg: Any) -> nn.Module | None:
        """Builds the tensors common to all adapters of a model, or None."""
        return None

    def cached(self, key: str, W: Tensor, build: Callable[[], Tensor]) -> Tensor:
        """Returns `build()`, kept between calls while evaluating so that decoding pays for it once.

        The kept value is dropped when a parameter or W changes (by version counter), and on `train()`.
        """
        if self.training or torch.is_grad_enabled() or not self.keeps:
            return build()
        state = (W.data_ptr(), W.dtype, version_of(W), *map(version_of, self.parameters()))
        if key not in self._cache or self._cache[key][0] != state:
            self._cache[key] = (state, build())
        return self._cache[key][1]

    def train(self, mode: bool = True) -> "Method":
        self._cache.clear()
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.cfg}"


def kaiming_uniform_(tensor: Tensor, fan_in: int | None = None) -> Tensor:
    """Fills `tensor` (r, fan_in) with U(±1/√fan_in), the start `nn.Linear` has (Kaiming uniform with a = √5)."""
    bound = 1 / math.sqrt(fan_in or tensor.shape[-1])
    with torch.no_grad():
        return tensor.uniform_(-bound, bound)
