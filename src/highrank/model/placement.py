"""Where adapters go: placement parts (q, k, v, o, gate, up, down) resolved to views of base weights.

A view is a whole `nn.Linear`, quantised or not, a GPT-2 `Conv1D` (which stores W transposed), or a row slice of a fused
projection.
Modules are matched by their full path inside a block, never by suffix, so that heads, poolers and embeddings cannot be
hit by accident.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from highrank.base.errors import UserError, suggest
from highrank.model.quantised import QuantisedWeight, is_quantised

PARTS = ("q", "k", "v", "o", "gate", "up", "down")

PLACEMENTS: dict[str, tuple[str, ...]] = {
    "q": ("q",),
    "k": ("k",),
    "v": ("v",),
    "o": ("o",),
    "gate": ("gate",),
    "up": ("up",),
    "down": ("down",),
    "qk": ("q", "k"),
    "qv": ("q", "v"),
    "qkv": ("q", "k", "v"),
    "qkvo": ("q", "k", "v", "o"),
    "fc": ("up", "down"),
    "fc_qkv": ("q", "k", "v", "up", "down"),
    "all": PARTS,
}
"""Named sets. `fc` is up and down, never gate (HiRA Table 5); `all` takes the parts an architecture has."""


@dataclass(frozen=True)
class Architecture:
    """Where one family of models keeps its parts.

    `blocks` is the path of the list of blocks; `parts(config)` maps a part to a module path inside a block, with
    `[start:stop]` behind it where the part is a range of output rows of a fused module.
    """

    blocks: str
    parts: Callable[[Any], Mapping[str, str]]


def _llama(config: Any) -> Mapping[str, str]:
    return {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }


def _phi3(config: Any) -> Mapping[str, str]:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, kv, inter = (
        config.num_attention_heads * head_dim,
        config.num_key_value_heads * head_dim,
        config.intermediate_size,
    )
    return {
        "q": f"self_attn.qkv_proj[0:{q}]",
        "k": f"self_attn.qkv_proj[{q}:{q + kv}]",
        "v": f"self_attn.qkv_proj[{q + kv}:{q + 2 * kv}]",
        "o": "self_attn.o_proj",
        "gate": f"mlp.gate_up_proj[0:{inter}]",
        "up": f"mlp.gate_up_proj[{inter}:{2 * inter}]",
        "down": "mlp.down_proj",
    }


def _gpt2(config: Any) -> Mapping[str, str]:
    d = config.hidden_size
    return {
        "q": f"attn.c_attn[0:{d}]",
        "k": f"attn.c_attn[{d}:{2 * d}]",
        "v": f"attn.c_attn[{2 * d}:{3 * d}]",
        "o": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    }


def _bert(config: Any) -> Mapping[str, str]:
    return {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
    }


def _distilbert(config: Any) -> Mapping[str, str]:
    return {
        "q": "attention.q_lin",
        "k": "attention.k_lin",
        "v": "attention.v_lin",
        "o": "attention.out_lin",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
    }


_LLAMA, _ENCODER = Architecture("layers", _llama), Architecture("encoder.layer", _bert)
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "phi3": Architecture("layers", _phi3),
    "gpt2": Architecture("h", _gpt2),
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "distilbert": Architecture("transformer.layer", _distilbert),
}
"""By `model_type`. Any other model works with an explicit map, `architecture={blocks: ..., q: ..., ...}`."""


@dataclass(frozen=True)
class WeightView:
    """One weight that an adapter sees as W (out_features, in_features)."""

    name: str
    """Unique name: the module's path, with `[part]` behind it for a slice."""
    path: str
    """Path of the module in the model."""
    part: str
    """The part, or parts joined by `+` for a fused module adapted whole."""
    layer: int
    rows: tuple[int, int] | None
    """Output rows of the slice, or None for the whole weight."""
    in_features: int
    out_features: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores its weight as (in_features, out_features), as GPT-2's Conv1D does."""
    return type(module).__name__ == "Conv1D"


def weight_of(module: nn.Module, rows: tuple[int, int] | None = None) -> Tensor:
    """Returns the module's W (out_features, in_features), or rows of it, sharing storage with the module.

    Of a quantised module: a stand-in without storage, or the dequantised rows.
    """
    if is_quantised(module):
        quantised = QuantisedWeight(module)
        return quantised if rows is None else quantised[rows[0] : rows[1]]
    weight: Any = module.weight
    W = weight.t() if is_transposed(module) else weight
    return W if rows is None else W[rows[0] : rows[1]]


def weight_reader(module: nn.Module) -> Callable[[], Tensor]:
    """Returns what gives `weight_of(module)` in every forward pass; what kind of layer it is, is looked at here, once."""
    if is_quantised(module):
        return lambda: QuantisedWeight(module)
    if is_transposed(module):
        return lambda: module.weight.t()  # type: ignore[operator]
    return lambda: module.weight  # type: ignore[return-value]


def parse_placement(placement: str | Sequence[str]) -> tuple[str, ...]:
    """Returns the parts that a named set, or a list of parts and sets, stands for, in the order of PARTS."""
    if not isinstance(placement, str | Sequence):
        raise UserError(f"placement: give a set such as fc_qkv, or a list such as [q,down], got placement={placement}")
    names = [placement] if isinstance(placement, str) else list(placement)
    if not names:
        raise UserError("placement: at least one part is needed, got placement=[]; use a set such as fc_qkv")
    chosen: set[str] = set()
    for name in names:
        if not isinstance(name, str) or name not in PLACEMENTS:
            raise UserError(f"placement: unknown set or part, got placement={name}{suggest(str(name), PLACEMENTS)}")
        chosen.update(PLACEMENTS[name])
    return tuple(p for p in PARTS if p in chosen)


def parse_layers(layers: str | int | Sequence[int], num_layers: int) -> range | list[int]:
    """Returns layer indices for `all`, one index, `4-11` (both ends in) or a list.

    Raises:
        UserError: for another form, or an index outside [0, num_layers).
    """
    if layers == "all":
        return range(num_layers)
    chosen: range | list[int]
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", layers) if isinstance(layers, str) else None
    if match:
        chosen = range(int(match[1]), int(match[2] or match[1]) + 1)
    elif _is_index(layers):
        chosen = [layers]  # type: ignore[list-item]
    elif isinstance(layers, Sequence) and not isinstance(layers, str) and all(_is_index(i) for i in layers):
        chosen = sorted(layers)
    else:
        raise UserError(f"layers: give all, an index, a range like 4-11 or a list of indices, got layers={layers}")
    if not chosen or chosen[0] < 0 or chosen[-1] >= num_layers or len(set(chosen)) != len(chosen):
        raise UserError(f"layers: the model has layers 0-{num_layers - 1}, got layers={layers}")
    return list(chosen)


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def resolve(
    model: nn.Module,
    placement: str | Sequence[str] = "fc_qkv",
    layers: str | int | Sequence[int] = "all",
    fused: str = "auto",
    architecture: Mapping[str, str] | None = None,
) -> list[WeightView]:
    """Returns the views that `placement` names in `model`, ordered by layer, then part.

    `fused` says what to do with a projection that holds several parts: `fused` puts one adapter on the whole matrix,
    `split` one on each part's rows, and `auto` takes `fused` if every touched matrix is wanted whole, else `split`.
    `architecture` maps parts to paths for a model that is not built in.

    Raises:
        UserError: for a part that the architecture lacks, a placement that matches nothing, a module matched twice,
            or `fused=fused` with only some parts of a matrix.
    """
    config: Any = model.config
    arch = _architecture(config.model_type, architecture)
    paths = {part: _parse_path(path) for part, path in arch.parts(config).items()}
    parts = parse_placement(placement)
    missing = [p for p in parts if p not in paths]
    if placement == "all":
        parts = tuple(p for p in parts if p in paths)
    elif missing:
        raise UserError(
            f"placement: {config.model_type} has no part {', '.join(missing)}, got placement={placement}; "
            f"it has: {', '.join(paths)}"
        )
    modules = _blocks(model, arch.blocks)
    chosen_layers = parse_layers(layers, 1 + max(modules, default=-1)) if modules else []
    groups = _groups(parts, paths, fused)
    views = [
        view
        for layer in chosen_layers
        for path, members, whole in groups
        for view in _views_of(modules[layer], layer, path, members, whole)
    ]
    if not views:
        raise UserError(
            f"placement: must match at least one weight, got placement={placement} with no blocks at "
            f"'{arch.blocks}' in this {config.model_type}; give the paths with architecture={{blocks: ..., q: ...}}"
        )
    return views


def _architecture(model_type: str, custom: Mapping[str, str] | None) -> Architecture:
    if custom is not None:
        if not isinstance(custom, Mapping):
            raise UserError(
                f"architecture: a map of parts to paths is needed, got architecture={custom}; give one such as "
                "{blocks: model.layers, q: self_attn.q_proj}"
            )
        wrong = [key for key, path in custom.items() if not isinstance(path, str)]
        if wrong:
            raise UserError(f"architecture: a path is a text, got {wrong[0]}={custom[wrong[0]]}")
        rest = {k: v for k, v in custom.items() if k != "blocks"}
        unknown = [k for k in rest if k not in PARTS]
        if "blocks" not in custom or unknown or not rest:
            raise UserError(
                f"architecture: needs 'blocks' and parts out of {', '.join(PARTS)}, got keys={', '.join(map(str, custom))}"
            )
        return Architecture(custom["blocks"], lambda config: rest)
    if model_type not in ARCHITECTURES:
        raise UserError(
            f"architecture: no built-in map, got model_type={model_type}; built in: {', '.join(ARCHITECTURES)}; give one "
            "with architecture={blocks: model.layers, q: self_attn.q_proj, ...}"
        )
    return ARCHITECTURES[model_type]


def _parse_path(path: str) -> tuple[str, tuple[int, int] | None]:
    match = re.fullmatch(r"([\w.]+)(?:\[(\d+):(\d+)\])?", path)
    if not match:
        raise UserError(f"architecture: a part is a module path, with [start:stop] for rows of it, got {path}")
    return match[1], (int(match[2]), int(match[3])) if match[2] else None


def _blocks(model: nn.Module, blocks: str) -> dict[int, tuple[str, nn.Module]]:
    """Returns layer index -> (path, module) of the blocks."""
    pattern = re.compile(rf"(?:.*\.)?{re.escape(blocks)}\.(\d+)")
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        match = pattern.fullmatch(name)
        if match:
            layer = int(match[1])
            if layer in found:
                raise UserError(
                    f"placement: a block is matched once, got layer {layer} at both {found[layer][0]} and {name}; "
                    "give a longer path with architecture={blocks: ...}"
                )
            found[layer] = (name, module)
    return found


Member = tuple[str, tuple[int, int] | None]
"""A part and the rows it takes, None for the whole module."""


def _groups(parts: Sequence[str], paths: Mapping[str, Member], fused: str) -> list[tuple[str, list[Member], bool]]:
    """Groups the parts by module; the last item says whether the module is adapted whole."""
    if fused not in ("auto", "fused", "split"):
        raise UserError(f"fused: the policy is auto, fused or split, got fused={fused}")
    by_path: dict[str, list[Member]] = {}
    for part in parts:
        path, rows = paths[part]
        by_path.setdefault(path, []).append((part, rows))
    every_part = {path: [p for p, (other, _) in paths.items() if other == path] for path in by_path}
    incomplete = [path for path, members in by_path.items() if len(members) < len(every_part[path])]
    if fused == "fused" and incomplete:
        lacking = [p for path in incomplete for p in every_part[path] if p not in parts]
        raise UserError(
            f"placement: fused=fused adapts a fused matrix whole, got a placement without {', '.join(lacking)} of "
            f"{', '.join(incomplete)}; add them or use fused=split"
        )
    split = fused == "split" or bool(incomplete)
    return [(path, members, len(members) > 1 and not split) for path, members in by_path.items()]


def _views_of(
    block: tuple[str, nn.Module], layer: int, path: str, members: Sequence[Member], whole: bool
) -> Iterator[WeightView]:
    prefix, module = block
    names = dict(module.named_modules())
    full_path = f"{prefix}.{path}"
    if path not in names:
        raise UserError(f"placement: no module {full_path} in this model{suggest(path, (n for n in names if n))}")
    weight = getattr(names[path], "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or isinstance(names[path], nn.Embedding):
        raise UserError(
            f"placement: an adapted module is a linear layer with a weight matrix, got {full_path}="
            f"{type(names[path]).__name__}; point the part to a linear layer"
        )
    out_features, in_features = weight_of(names[path]).shape
    taken: set[int] = set()
    for part, rows in members:
        span = range(*(rows or (0, out_features)))
        if not span or span.stop > out_features or taken.intersection(span):
            raise UserError(
                f"placement: rows of {full_path} are matched once and lie in [0, {out_features}), got {part} at {rows}"
            )
        taken.update(span)
        if not whole:
            name = full_path if rows is None else f"{full_path}[{part}]"
            yield WeightView(name, full_path, part, layer, rows, in_features, len(span))
    if whole:
        if len(taken) < out_features:
            raise UserError(
                f"placement: a matrix adapted whole must be covered by its parts, got {len(taken)} of {out_features} "
                f"rows of {full_path}; use fused=split"
            )
        parts = "+".join(part for part, _ in members)
        yield WeightView(full_path, full_path, parts, layer, None, in_features, out_features)
