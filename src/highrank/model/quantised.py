"""Quantised backbones: int8 and int4 through torchao, nf4 through bitsandbytes (the extra `quant`).

Every linear layer below the head is quantised after loading: int8 with one scale per output row, int4 with one per group
of at most 128 inputs, nf4 (4-bit normal floats) with one per 64 entries, these scales quantised too. An adapter sees such
a layer's weight as a `QuantisedWeight`: x Wᵀ is the layer's own product, and only what needs W itself has it dequantised.
"""

import importlib.util
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from highrank.base.errors import UserError
from highrank.model.torch_internals import as_plain_tensors, tensor_without_storage, tree_map

KINDS = {"int8": "torchao", "int4": "torchao", "nf4": "bitsandbytes"}
"""Kind -> the library that does it."""
BITS = {"int8": 8 + 32 / 1024, "int4": 8 + 16 / 128, "nf4": 4 + 8 / 64}
"""Stored bits per weight with its scales, for a width of 1024; torchao keeps int4 in whole bytes on the CPU."""


def check(kind: str) -> None:
    """Raises UserError if the library that quantises to `kind` is not installed."""
    if importlib.util.find_spec(KINDS[kind]) is None:
        raise UserError(
            f"model: quantize={kind} needs {KINDS[kind]}, got no such package; pip install 'highrank[quant]'"
        )


def linears(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """Yields the layers that are quantised: every `nn.Linear` below the head."""
    head = model.get_output_embeddings() if model.can_generate() else None
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield name, module


@torch.no_grad()
def quantise(model: Any, kind: str) -> None:
    """Quantises a model's linear layers in place.

    Raises:
        UserError: if the library is missing, the model has no linear layer (GPT-2 has Conv1D), or nf4 does not fit: on a
            CPU bitsandbytes 0.50 dequantises rows wrongly whose length is no multiple of its block of 64.
    """
    check(kind)
    layers = list(linears(model))
    if not layers:
        raise UserError(
            f"model: quantize needs linear layers, got model_type={model.config.model_type}; leave quantize away"
        )
    uneven = [name for name, module in layers if module.in_features % 64]
    if kind == "nf4" and uneven:
        raise UserError(
            "model: quantize=nf4 needs in_features that are multiples of 64, got "
            f"{uneven[0]}.in_features={model.base_model.get_submodule(uneven[0]).in_features}; use quantize=int8"
        )
    for name, module in layers:
        parent, _, leaf = name.rpartition(".")
        setattr(model.base_model.get_submodule(parent), leaf, _quantised(module, kind))


def _quantised(module: nn.Linear, kind: str) -> nn.Module:
    if kind == "nf4":
        from bitsandbytes.nn import Linear4bit

        n, k = module.weight.shape
        layer = Linear4bit(k, n, module.bias is not None, compute_dtype=module.weight.dtype, quant_type="nf4")
        layer.load_state_dict(module.state_dict())
        layer.support_avx512bf16_for_cpu = False  # it would pack the weight anew for every change of mode
        return layer.to(module.weight.device).requires_grad_(False)
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    if kind == "int8":
        config: Any = Int8WeightOnlyConfig()
    else:
        group = math.gcd(module.in_features, 128)
        config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group))  # type: ignore[attr-defined]  # torch has it
    quantize_(module, config)
    layer = TorchaoLinear(module.in_features, module.out_features, module.bias is not None, device="meta")
    layer.weight, layer.bias = module.weight, module.bias
    return layer.requires_grad_(False)


class Product(torch.autograd.Function):
    """x Wᵀ + bias with a torchao weight, which is made dense for the product: once more in backward, not kept until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        y = F.linear(x, weight)
        return y.clone() if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (weight,) = ctx.saved_tensors
        dx = g @ weight.dequantize().to(g.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, g.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None


class TorchaoLinear(nn.Linear):
    """A linear layer with a torchao weight."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Product.apply(x, self.weight, self.bias)
        return y


def is_quantised(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if type(weight) in (Tensor, nn.Parameter):  # all that torch.compile can look at
        return False
    return hasattr(weight, "quant_state") or type(weight).__module__.startswith("torchao.")


@torch.no_grad()
def dequantise(module: Any) -> Tensor:
    """Returns a quantised layer's W (out_features, in_features) in the dtype that it computes in."""
    weight = module.weight
    if not hasattr(weight, "quant_state"):
        return weight.dequantize()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state).to(module.compute_dtype)


def dequantise_model(model: nn.Module) -> None:
    """Puts a plain linear layer with the dequantised weight in the place of every quantised one."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_quantised(module):
            W, bias = dequantise(module), cast(Tensor | None, module.bias)
            plain = nn.Linear(W.shape[1], W.shape[0], bias is not None, W.device, W.dtype).requires_grad_(False)
            plain.weight.copy_(W)
            if bias is not None:
                plain.bias.copy_(bias)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, plain)


class QuantisedWeight(Tensor):
    """The weight (out_features, in_features) of a quantised linear layer, without a matrix behind it.

    `F.linear(x, W, bias)` is the layer's own product. Any other operation takes the dequantised matrix, which is made
    once per object, so once per forward pass, and kept for backward by the graph that needs it.
    """

    layer: Any
    _dense: Tensor | None

    @staticmethod
    def __new__(cls, layer: Any) -> "QuantisedWeight":
        dtype = getattr(layer, "compute_dtype", None) or layer.weight.dtype
        shape = (layer.out_features, layer.in_features)
        with torch.inference_mode(False):  # its version counter is asked for
            weight = tensor_without_storage(cls, shape, dtype, layer.weight.device)
        weight.layer, weight._dense = layer, None
        return weight

    @property
    def dense(self) -> Tensor:
        """The dequantised matrix."""
        if self._dense is None:
            self._dense = dequantise(self.layer)
        return self._dense

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Returns x Wᵀ + bias as the layer computes it, (..., out_features) in x's dtype."""
        weight = self.layer.weight
        if not hasattr(weight, "quant_state"):
            return Product.apply(x.to(self.dtype), weight, None if bias is None else bias.to(self.dtype)).to(x.dtype)
        from bitsandbytes import matmul_4bit

        z = x.to(self.dtype)
        bias = None if bias is None else bias.to(self.dtype)
        return matmul_4bit(z, weight, bias=bias, quant_state=weight.quant_state).to(x.dtype)

    def data_ptr(self) -> int:
        return id(self.layer)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with as_plain_tensors():
                return func(*args, **kwargs)
        if func is F.linear and isinstance(args[1], cls) and not isinstance(args[0], cls):
            return args[1].product(args[0], *args[2:], **kwargs)
        if func is Tensor.to and args[1:] == (args[0].dtype,):
            return args[0]
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # as torch documents it
        args, kwargs = tree_map(lambda a: a.dense if isinstance(a, cls) else a, (args, kwargs or {}))
        return func(*args, **kwargs)


METADATA = {
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__),
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf", "grad_fn", "_version", "layout")
    ),
}
"""What is asked of a weight without its entries."""
