"""Where adapters go: placement parts (q, k, v, o, gate, up, down) resolved to views of base weights.

A view is a whole `nn.Linear`, quantised or not, a GPT-2 `Conv1D` (which stores W transposed), or rows of a fused
projection. Parts are found by the names that transformers' models give their linear layers: by full path inside a block,
never by suffix, so that heads, poolers and embeddings cannot be hit by accident, and by class, so that routers cannot.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from highrank.base.errors import UserError, suggest
from highrank.model.experts import Expert, matrices
from highrank.model.quantised import QuantisedWeight, is_quantised
from highrank.model.transformers_internals import is_encoder_decoder, is_experts, setting, stacks_of, text_config

PARTS = ("q", "k", "v", "o", "gate", "up", "down")

EXPERTS = "experts"
"""The part that is each expert's up and down; only by its name, no set holds it."""

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
    EXPERTS: (EXPERTS,),
}
"""Named sets. `fc` is up and down, never gate (HiRA Table 5); `all` takes the parts an architecture has."""


Rows = tuple[int, int] | tuple[int, int, int]
"""Output rows of a slice, (start, stop), or of every `period` rows those from start to stop, (start, stop, period): what a
projection that holds queries, keys and values head by head needs."""
Member = tuple[str, Rows | None]
"""A module's path inside a block, and the rows of it; None for the whole module."""

PATHS: dict[str, tuple[str, ...]] = {
    "q": (
        *("self_attn.q_proj", "self_attn.q_b_proj", "attn.q_proj", "attn.attention.q_proj", "attention.self.query"),
        *("attention.self.query_proj", "attention.query", "attention.q_lin", "attention.attn.q", "mixer.q_proj"),
        *("temporal_block.q_proj", "attention.q_proj", "layer.0.SelfAttention.q"),
    ),
    "k": (
        *("self_attn.k_proj", "attn.k_proj", "attn.attention.k_proj", "attention.self.key"),
        *("attention.self.key_proj", "attention.key", "attention.k_lin", "attention.attn.k", "mixer.k_proj"),
        *("temporal_block.k_proj", "attention.k_proj", "layer.0.SelfAttention.k"),
    ),
    "v": (
        *("self_attn.v_proj", "attn.v_proj", "attn.attention.v_proj", "attention.self.value"),
        *("attention.self.value_proj", "attention.value", "attention.v_lin", "attention.attn.v", "mixer.v_proj"),
        *("temporal_block.v_proj", "attention.v_proj", "layer.0.SelfAttention.v"),
    ),
    "o": (
        *("self_attn.o_proj", "self_attn.out_proj", "self_attn.dense", "attn.out_proj", "attn.c_proj", "attn.Wo"),
        *("attn.attention.out_proj", "attention.output.dense", "attention.dense", "self_attention.dense"),
        *("attention.out_lin", "attention.attn.o", "mixer.o_proj", "temporal_block.o_proj"),
        *("attention.o_proj", "layer.0.SelfAttention.o"),
    ),
    "gate": (
        *("mlp.gate_proj", "feed_forward.gate_proj", "feed_forward.w1", "mlp_block.gate_proj"),
        *("mlp.shared_experts.gate_proj", "mlp.shared_expert.gate_proj", "feed_forward.shared_expert.gate_proj"),
        *("layer.1.DenseReluDense.wi_0", "layer.2.DenseReluDense.wi_0"),
    ),
    "up": (
        *("mlp.up_proj", "feed_forward.up_proj", "feed_forward.w3", "ffn.up_proj", "mlp.fc1", "fc1", "mlp.fc_in"),
        *(
            "mlp.c_fc",
            "mlp.dense_h_to_4h",
            "intermediate.dense",
            "ffn.lin1",
            "ffn",
            "mixer.up_proj",
            "mlp_block.up_proj",
        ),
        *("mlp.shared_experts.up_proj", "mlp.shared_expert.up_proj", "feed_forward.shared_expert.up_proj"),
        *("layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wi_1"),
        *("layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wi_1"),
    ),
    "down": (
        *(
            "mlp.down_proj",
            "feed_forward.down_proj",
            "feed_forward.w2",
            "ffn.down_proj",
            "mlp.fc2",
            "fc2",
            "mlp.fc_out",
        ),
        *("mlp.c_proj", "mlp.Wo", "mlp.dense_4h_to_h", "output.dense", "ffn.lin2", "ffn_output", "mixer.down_proj"),
        *("mlp_block.down_proj", "shared_mlp.output_linear"),
        *("mlp.shared_experts.down_proj", "mlp.shared_expert.down_proj", "feed_forward.shared_expert.down_proj"),
        *("layer.1.DenseReluDense.wo", "layer.2.DenseReluDense.wo"),
    ),
}
"""Where the blocks of transformers' models keep a part: the first of these paths at which a block has a linear layer.

Behind a low-rank bottleneck (DeepSeek) q is the second of the two matrices. Of a block with experts, up, gate and down are
those of the shared expert, which every token takes.
"""
CROSS: dict[str, tuple[str, ...]] = {
    part: (f"layer.1.EncDecAttention.{part}", f"encoder_attn.{name}")
    for part, name in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}.items()
}
"""Where the blocks of a decoder that attends to an encoder keep the parts of that attention, beside their own."""

Layout = Callable[[Any, int], Mapping[str, Rows]]
"""From a config and a fused module's number of rows to each part's rows."""


def _in_a_row(config: Any, n: int) -> Mapping[str, Rows]:
    q = config.num_attention_heads * _head_dim(config)
    kv = (n - q) // 2
    return {"q": (0, q), "k": (q, q + kv), "v": (q + kv, n)}


def _head_by_head(config: Any, n: int) -> Mapping[str, Rows]:
    period = n // config.num_attention_heads
    d = period // 3
    return {"q": (0, d, period), "k": (d, 2 * d, period), "v": (2 * d, period, period)}


def _gpt_bigcode(config: Any, n: int) -> Mapping[str, Rows]:
    return (_in_a_row if config.multi_query else _head_by_head)(config, n)


def _falcon(config: Any, n: int) -> Mapping[str, Rows]:
    """Each group of query heads is followed by its key and value; without groups there is one, or one per head."""
    if not config.new_decoder_architecture:
        return _gpt_bigcode(config, n)
    d, period = _head_dim(config), n // config.num_kv_heads
    return {
        "q": (0, period - 2 * d, period),
        "k": (period - 2 * d, period - d, period),
        "v": (period - d, period, period),
    }


def _codegen(config: Any, n: int) -> Mapping[str, Rows]:
    """Four parts, as if for four devices, each of queries, values and keys."""
    period = n // 4
    d = period // 3
    return {"q": (0, d, period), "k": (2 * d, period, period), "v": (d, 2 * d, period)}


def _latent(config: Any, n: int) -> Mapping[str, Rows]:
    d, period = config.qk_nope_head_dim, config.qk_nope_head_dim + config.v_head_dim
    return {"k": (0, d, period), "v": (d, period, period)}


def _gate_up(config: Any, n: int) -> Mapping[str, Rows]:
    return {"gate": (0, n // 2), "up": (n // 2, n)}


_PHI3: dict[str, Layout] = {"self_attn.qkv_proj": _in_a_row, "mlp.gate_up_proj": _gate_up}
FUSED: dict[str, dict[str, Layout]] = {
    "phi3": _PHI3,
    "phi4_multimodal": _PHI3,
    "glm": {"mlp.gate_up_proj": _gate_up},
    "glm4": {"mlp.gate_up_proj": _gate_up},
    "gpt2": {"attn.c_attn": _in_a_row},
    "openai-gpt": {"attn.c_attn": _in_a_row},
    "gpt_bigcode": {"attn.c_attn": _gpt_bigcode},
    "mpt": {"attn.Wqkv": _in_a_row},
    "modernbert": {"attn.Wqkv": _in_a_row, "mlp.Wi": _gate_up},
    "modernbert-decoder": {"mlp.Wi": _gate_up},
    "gpt_neox": {"attention.query_key_value": _head_by_head},
    "gpt_neox_japanese": {"attention.query_key_value": _head_by_head},
    "bloom": {"self_attention.query_key_value": _head_by_head},
    "persimmon": {"self_attn.query_key_value": _head_by_head},
    "falcon": {"self_attention.query_key_value": _falcon},
    "codegen": {"attn.qkv_proj": _codegen},
    "deberta": {"attention.self.in_proj": _head_by_head},
    "granitemoeshared": {"shared_mlp.input_linear": _gate_up},
    "granitemoehybrid": {"shared_mlp.input_linear": _gate_up},
}
"""Modules that hold several parts, by `model_type`: the order of their rows is in the model's code alone."""
LATENT: dict[str, Layout] = {"self_attn.kv_b_proj": _latent}
"""The same, where the config of any model type gives the sizes (DeepSeek's latent attention)."""


def _head_dim(config: Any) -> int:
    return int(setting(config, "head_dim") or config.hidden_size // config.num_attention_heads)


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
    rows: Rows | None
    """Output rows of the slice, or None for the whole weight."""
    in_features: int
    out_features: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores its weight as (in_features, out_features), as GPT-2's Conv1D does."""
    return type(module).__name__ == "Conv1D"


def is_linear(module: nn.Module) -> bool:
    """Whether the module computes x Wᵀ + bias with its weight, and nothing else.

    A weight matrix does not tell: routers, embeddings and subclasses of `nn.Linear` have one and return something else.
    """
    if is_transposed(module) or isinstance(module, Expert) or (isinstance(module, nn.Linear) and is_quantised(module)):
        return True
    plain = type(module).forward is nn.Linear.forward or type(module).__name__ == "FalconLinear"
    return isinstance(module, nn.Linear) and plain


def row_index(rows: Rows | None, n: int) -> slice | Tensor:
    """Returns the index of `rows` into a dimension of n: a slice, or one number per row where they are not in a row."""
    if rows is None or len(rows) == 2:
        return slice(*(rows or (0, n)))
    start, stop, period = rows
    return torch.arange(n).unflatten(0, (-1, period))[:, start:stop].flatten()


def weight_of(module: nn.Module, rows: Rows | None = None) -> Tensor:
    """Returns the module's W (out_features, in_features), sharing storage with the module, or rows of it.

    Rows from one head after the other are a copy. Of a quantised module: a stand-in without storage, or the dequantised
    rows.
    """
    if is_quantised(module):
        quantised = QuantisedWeight(module)
        return quantised if rows is None else quantised[row_index(rows, len(quantised))]
    weight: Any = module.weight
    W = weight.t() if is_transposed(module) else weight
    return W if rows is None else W[row_index(rows, len(W))]


def weight_reader(module: Any) -> Callable[[Any], Tensor]:
    """Returns what gives `weight_of(module)` in every forward pass; what kind of layer it is, is looked at here, once.

    It is given the module then, and holds none: a copy of an adapted layer reads its own.
    """
    if is_quantised(module):
        return QuantisedWeight
    return _transposed_weight if is_transposed(module) else _plain_weight


def _plain_weight(module: Any) -> Tensor:
    weight: Tensor = module.weight
    return weight


def _transposed_weight(module: Any) -> Tensor:
    weight: Tensor = module.weight.t()
    return weight


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
    return tuple(p for p in (*PARTS, EXPERTS) if p in chosen)


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
    elif isinstance(layers, int) and _is_index(layers):
        chosen = [layers]
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
    `architecture` maps parts to paths for a model whose linear layers carry other names than those in `PATHS`. Of a model
    whose blocks differ, a part is adapted in those that have it.

    Raises:
        UserError: for a part that no block has, a placement that matches nothing, a module matched twice, or
            `fused=fused` with only some parts of a matrix.
    """
    full_config: Any = model.config
    config, model_type = text_config(full_config), full_config.model_type
    blocks, members = _mapped(model, config, architecture) if architecture is not None else _known(model, config)
    parts = parse_placement(placement)
    has = [p for p in (*PARTS, EXPERTS) if any(p in block_members for block_members in members.values())]
    missing = [p for p in parts if p not in has]
    if placement == "all":
        parts = tuple(p for p in parts if p in has)
    elif missing:
        raise UserError(
            f"placement: {model_type} has no part {', '.join(missing)}, got placement={placement}; "
            f"it has: {', '.join(has)}"
        )
    chosen = parse_layers(layers, 1 + max(blocks))
    if absent := [p for p in parts if not any(p in members[layer] for layer in chosen)]:
        raise UserError(
            f"placement: {model_type} has no {', '.join(absent)} in these layers, got layers={layers}; layers with it: "
            f"{', '.join(str(layer) for layer, block_members in members.items() if absent[0] in block_members)}"
        )
    split = _is_split(parts, {layer: members[layer] for layer in chosen}, fused)
    return [
        view
        for layer in chosen
        for path, group in _groups(parts, members[layer]).items()
        for view in (_experts_of if EXPERTS in group else _views_of)(blocks[layer], layer, path, group, split)
    ]


def notes(config: Any, views: Sequence[WeightView]) -> list[str]:
    """Returns what a count of views per part does not tell: parts that not every adapted layer has, shared layers."""
    by_part: dict[str, set[int]] = {}
    for view in views:
        for part in view.part.split("+"):
            by_part.setdefault(part, set()).add(view.layer)
    num_layers = len({view.layer for view in views})
    remarks = [f"{part} in {len(has)} of {num_layers} layers" for part, has in by_part.items() if len(has) < num_layers]
    groups = setting(config, "num_hidden_groups")
    if views and groups and groups < config.num_hidden_layers:
        remarks.append(f"{config.num_hidden_layers} layers share the weights, and so the adapters, of {groups}")
    return remarks


Block = tuple[str, nn.Module]
"""A block's path and module."""
Members = dict[str, tuple[Member, ...]]
"""Of one block: each of its parts, and where it is: at one place, but with attention to an encoder at two."""


def _known(model: nn.Module, config: Any) -> tuple[dict[int, Block], dict[int, Members]]:
    """Returns the blocks of a model by layer, and where each keeps its parts, all found by name; of an encoder and a decoder
    in one the encoder's layers come first."""
    pairs = [pair for stack in stacks_of(model) for pair in _blocks_in(model, stack, config)]
    return {i: block for i, (block, _) in enumerate(pairs)}, {i: members for i, (_, members) in enumerate(pairs)}


def _blocks_in(model: nn.Module, body: nn.Module, config: Any) -> list[tuple[Block, Members]]:
    """Returns the blocks inside one part of a model in their order, each with where it keeps its parts."""
    prefix = next(name for name, module in model.named_modules() if module is body)
    lists: dict[str, dict[str, nn.Module]] = {}
    for name, module in body.named_modules(prefix=prefix):
        if name.rpartition(".")[2].isdigit():
            lists.setdefault(re.sub(r"\.\d+(?=\.|$)", ".#", name), {})[name] = module
    full_config: Any = model.config
    crosses = is_encoder_decoder(full_config)
    candidates = {}
    for pattern, modules in lists.items():
        members = [_members_of(module, config, crosses) for module in modules.values()]
        if any("q" in each and "o" in each for each in members):
            candidates[pattern] = list(zip(modules.items(), members, strict=True))
    if not candidates:
        raise UserError(
            f"architecture: no built-in map fits its names, got model_type={full_config.model_type}; give one with "
            "architecture={blocks: model.layers, q: self_attn.q_proj, ...}"
        )
    nearest = min(pattern.count(".") for pattern in candidates)
    candidates = {pattern: blocks for pattern, blocks in candidates.items() if pattern.count(".") == nearest}
    if len(candidates) > 1:
        first, second = list(candidates)[:2]
        raise UserError(
            f"placement: a block is matched once, got layer 0 at both {_first(candidates[first])} and "
            f"{_first(candidates[second])}; say which with architecture={{blocks: ..., q: ...}}"
        )
    (each,) = candidates.values()
    return each


def _first(blocks: Sequence[tuple[Block, Members]]) -> str:
    return blocks[0][0][0]


def _members_of(block: nn.Module, config: Any, crosses: bool) -> Members:
    """Returns where a block keeps its parts, by the known names; `crosses` says whether it may attend to an encoder."""
    linear: dict[str, nn.Module] = {}
    members: Members = {}
    for name, module in block.named_modules():
        if is_linear(module):
            linear[name] = module
        elif is_experts(module):
            members[EXPERTS] = ((name, None),)
    for part, paths in PATHS.items():
        places = [next((path for path in some if path in linear), None) for some in (paths, CROSS.get(part, ()))]
        if there := [path for path in places[: 1 + crosses] if path is not None]:
            members[part] = tuple((path, None) for path in there)
    for path, layout in _layouts(config).items():
        if path in linear:
            members |= {part: ((path, rows),) for part, rows in layout(config, len(weight_of(linear[path]))).items()}
    return members


def _layouts(config: Any) -> dict[str, Layout]:
    return {**FUSED.get(config.model_type, {}), **(LATENT if setting(config, "qk_nope_head_dim") else {})}


def _mapped(model: nn.Module, config: Any, custom: Mapping[str, str]) -> tuple[dict[int, Block], dict[int, Members]]:
    """Returns the blocks of a model by layer, and where each keeps its parts, by a map from parts to paths."""
    if not isinstance(custom, Mapping):
        raise UserError(
            f"architecture: a map of parts to paths is needed, got architecture={custom}; give one such as "
            "{blocks: model.layers, q: self_attn.q_proj}"
        )
    wrong = [key for key, path in custom.items() if not isinstance(path, str)]
    if wrong:
        raise UserError(f"architecture: a path is a text, got {wrong[0]}={custom[wrong[0]]}")
    unknown = [key for key in custom if key not in ("blocks", *PARTS)]
    if "blocks" not in custom or unknown or len(custom) < 2:
        raise UserError(
            f"architecture: needs 'blocks' and parts out of {', '.join(PARTS)}, got keys={', '.join(map(str, custom))}"
        )
    blocks = _blocks(model, custom["blocks"])
    if not blocks:
        raise UserError(
            f"placement: must match at least one weight, got no blocks at '{custom['blocks']}' in this "
            f"{config.model_type}; give the paths with architecture={{blocks: ..., q: ...}}"
        )
    parsed = {part: _parse_path(path) for part, path in custom.items() if part != "blocks"}
    names = {layer: dict(module.named_modules()) for layer, (_, module) in blocks.items()}
    for part, (path, rows) in parsed.items():
        if not any(path in modules for modules in names.values()):
            first = min(blocks)
            raise UserError(
                f"placement: no module {blocks[first][0]}.{path} in this model{suggest(path, filter(None, names[first]))}"
            )
        _check_heads(config, part, path, rows, next(modules[path] for modules in names.values() if path in modules))
    return blocks, {
        layer: {part: (member,) for part, member in parsed.items() if member[0] in modules}
        for layer, modules in names.items()
    }


def _check_heads(config: Any, part: str, path: str, rows: Rows | None, module: nn.Module) -> None:
    """Refuses rows of a map that cut through heads, or take those of other parts where they are stored head by head."""
    if rows is None or part not in ("q", "k", "v") or not is_linear(module):
        return
    layout = _layouts(config).get(path)
    right = layout(config, len(weight_of(module))).get(part) if layout else None
    if right is not None and len(right) == 3 and rows != right:
        raise UserError(
            f"architecture: {path} of {config.model_type} holds q, k and v head by head, got {part}={path}{_spelled(rows)}; "
            f"its {part} is {path}{_spelled(right)}, which needs no map"
        )
    d = _head_dim(config) if getattr(config, "num_attention_heads", None) else 1
    if layout is None and any(number % d for number in rows):
        raise UserError(
            f"architecture: rows of {part} must not cut through a head, got {part}={path}{_spelled(rows)} with heads of "
            f"{d} rows; give multiples of {d}"
        )


def _spelled(rows: Rows) -> str:
    return f"[{rows[0]}:{rows[1]}" + (f" of {rows[2]}]" if len(rows) == 3 else "]")


def _parse_path(path: str) -> Member:
    match = re.fullmatch(r"([\w.]+)(?:\[(\d+):(\d+)(?: of (\d+))?\])?", path)
    if not match:
        raise UserError(
            "architecture: a part is a module path, with [start:stop] or [start:stop of period] for rows of it, got "
            f"{path}"
        )
    numbers: Any = tuple(int(number) for number in match.groups()[1:] if number)
    return match[1], numbers or None


def _blocks(model: nn.Module, blocks: str) -> dict[int, tuple[str, nn.Module]]:
    """Returns layer index -> (path, module) of the blocks."""
    pattern = re.compile(rf"(?:.*\.)?{re.escape(blocks)}\.(\d+)")
    by_layer: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        match = pattern.fullmatch(name)
        if match:
            layer = int(match[1])
            if layer in by_layer:
                raise UserError(
                    f"placement: a block is matched once, got layer {layer} at both {by_layer[layer][0]} and {name}; "
                    "give a longer path with architecture={blocks: ...}"
                )
            by_layer[layer] = (name, module)
    return by_layer


def _is_split(parts: Sequence[str], members: Mapping[int, Members], fused: str) -> bool:
    """Whether each part of a module that holds several has an adapter of its own."""
    if fused not in ("auto", "fused", "split"):
        raise UserError(f"fused: the policy is auto, fused or split, got fused={fused}")
    lacking: dict[str, list[str]] = {}
    for block_members in members.values():
        touched = {path for part in parts for path, _ in block_members.get(part, ())}
        for part, places in block_members.items():
            for path, _ in places:
                if path in touched and part not in parts and part not in lacking.setdefault(path, []):
                    lacking[path].append(part)
    incomplete = {path: others for path, others in lacking.items() if others}
    if fused == "fused" and incomplete:
        raise UserError(
            "placement: fused=fused adapts a fused matrix whole, got a placement without "
            f"{', '.join(part for others in incomplete.values() for part in others)} of {', '.join(incomplete)}; add them "
            "or use fused=split"
        )
    return fused == "split" or bool(incomplete)


def _groups(parts: Sequence[str], members: Members) -> dict[str, dict[str, Rows | None]]:
    """Returns the rows of each part that a module of a block holds, by the module's path."""
    by_path: dict[str, dict[str, Rows | None]] = {}
    for part in parts:
        for path, rows in members.get(part, ()):
            by_path.setdefault(path, {})[part] = rows
    return by_path


def _views_of(
    block: Block, layer: int, path: str, members: Mapping[str, Rows | None], split: bool
) -> Iterator[WeightView]:
    full_path, module = f"{block[0]}.{path}", block[1].get_submodule(path)
    if not is_linear(module):
        raise UserError(
            f"placement: an adapted module is a linear layer (Linear, Conv1D or a quantised one), got {full_path}="
            f"{type(module).__name__}; point the part to a linear layer"
        )
    if is_parametrized(module):
        raise UserError(
            f"placement: an adapted weight is a parameter, got one that is computed at {full_path}; take it off with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    n, in_features = weight_of(module).shape
    periods = {rows[2] if rows and len(rows) == 3 else n for rows in members.values()}
    period, is_fused = max(periods), len(members) > 1 and not split
    if len(periods) > 1 or n % period:
        raise UserError(
            f"placement: the rows of {full_path} repeat after one period that divides {n}, got "
            f"{', '.join(map(str, sorted(periods)))}"
        )
    taken: set[int] = set()
    for part, rows in members.items():
        span = range(*(rows[:2] if rows else (0, n)))
        if not span or span.stop > period or taken.intersection(span):
            raise UserError(
                f"placement: rows of {full_path} are matched once and lie in [0, {period}), got {part} at {rows}"
            )
        taken.update(span)
        if not is_fused:
            name = full_path if rows is None else f"{full_path}[{part}]"
            yield WeightView(name, full_path, part, layer, rows, in_features, len(span) * (n // period))
    if is_fused:
        if len(taken) < period:
            raise UserError(
                f"placement: a matrix adapted whole must be covered by its parts, got {len(taken)} of {period} "
                f"rows of {full_path}; use fused=split"
            )
        yield WeightView(full_path, full_path, "+".join(members), layer, None, in_features, n)


def _experts_of(
    block: Block, layer: int, path: str, members: Mapping[str, Rows | None], split: bool
) -> Iterator[WeightView]:
    full_path, experts = f"{block[0]}.{path}", cast(Any, block[1].get_submodule(path))
    for number in range(len(experts.down_proj)):
        for place, rows, n, k in matrices(experts):
            name = f"{full_path}.{place.format(number)}"
            yield WeightView(f"{name}[up]" if rows else name, name, EXPERTS, layer, rows, k, n)
