"""Prefix tuning (P-tuning version 2): trained keys and values in front of every layer's own.

    K'_l = [P_l0; K_l],    V'_l = [P_l1; V_l]    for every layer l and head

| symbol   | shape             | start                   | trained |
| -------- | ----------------- | ----------------------- | ------- |
| K_l, V_l | (g, T, d_h)       | the tokens', in layer l | no      |
| P        | (L, 2, g, p, d_h) | N(0, 1)                 | yes     |

g key-value heads of d_h numbers, L layers. Trainable: 2 p L g d_h for the whole model. The output differs from the base's
at the start, and there is no merged weight.

Source: Li and Liang, "Prefix-Tuning", arXiv 2101.00190, section 4 (eq. 3); Liu et al., "P-Tuning v2", arXiv 2110.07602,
section 3, which trains P itself, without a network in front.
Reference code: huggingface/peft 0.21, tuners/prefix_tuning (prefix_projection off; embedding.weight = P as (p, 2 L g d_h)).
P holds keys as they are behind the rotary embedding, as there; the tokens' positions count from p on.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from highrank.plugin import (
    PeftForm,
    UserError,
    VirtualTokens,
    cache_name,
    cache_of,
    decoder_of,
    is_start,
    kept_shapes,
    make_room,
    register_method,
    setting,
    text_config,
    with_cache,
    without_cache,
)


@dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    num_virtual_tokens: int = 20
    """p, trained positions in front of every layer's keys and values."""

    def __post_init__(self) -> None:
        if self.num_virtual_tokens < 1:
            raise UserError(
                f"prefix: num_virtual_tokens must be >= 1, got num_virtual_tokens={self.num_virtual_tokens}"
            )


@register_method(config=PrefixConfig)
class Prefix(VirtualTokens):
    examples = ({"num_virtual_tokens": 3}, {"num_virtual_tokens": 20})
    peft = PeftForm(type="PREFIX_TUNING", fields={"num_virtual_tokens": "num_virtual_tokens"})
    _unasked = False
    """Whether the cache of the present call was made for the prefix alone: some models return whichever they were given."""

    def __init__(self, model: Any, cfg: PrefixConfig):
        super().__init__(model, cfg)
        layers, heads, width = _shape(model.config)
        self.P = nn.Parameter(torch.empty(layers, 2, heads, cfg.num_virtual_tokens, width))

    @torch.no_grad()
    def reset_parameters(self, model: Any, tokenizer: Any) -> None:
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        layers, _, heads, _, width = self.P.shape
        cache = cache_of(model(input_ids=token, use_cache=True))
        kept = [] if cache is None else kept_shapes(cache)
        if kept != [((heads, width), (heads, width))] * layers:
            raise UserError(
                f"prefix: every layer keeps keys and values of {heads} heads and {width} numbers, got {kept} in "
                f"{model.config.model_type}, as (heads, numbers) of both, per layer; use prompt_tuning"
            )
        nn.init.normal_(self.P)

    def before(self, body: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        from transformers import DynamicCache

        if body.training and any(getattr(module, "gradient_checkpointing", False) for module in body.modules()):
            raise UserError(
                "prefix: activation checkpointing keeps no cache for a prefix to be in, got checkpoint_activations=true; leave "
                "it out, or of a model in hand switch it off"
            )
        if is_start(kwargs):
            cache = cache_of(kwargs)
            self._unasked = cache is None and not kwargs.get("use_cache", getattr(body.config, "use_cache", True))
            if cache is None:
                cache = DynamicCache(config=body.config)
                kwargs = with_cache(body, kwargs, cache)
            rows = len(kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"])
            for layer, (K, V) in enumerate(self.P.to(body.dtype)):
                cache.update(K.expand(rows, -1, -1, -1), V.expand(rows, -1, -1, -1), layer)
        return make_room(kwargs, self.cfg.num_virtual_tokens, 0)

    def after(self, output: Any) -> Any:
        return without_cache(output) if self._unasked else output

    @classmethod
    def validate(cls, model: Any, cfg: PrefixConfig) -> None:
        super().validate(model, cfg)
        cache_name(decoder_of(model))

    @classmethod
    def num_trainable(cls, model: Any, cfg: PrefixConfig) -> int:
        layers, heads, width = _shape(model.config)
        return 2 * cfg.num_virtual_tokens * layers * heads * width


def _shape(config: Any) -> tuple[int, int, int]:
    """Returns L, g and d_h."""
    config = text_config(config)
    heads = setting(config, "num_key_value_heads") or config.num_attention_heads
    multi_query = setting(
        config, "multi_query"
    )  # falcon and gpt_bigcode, whose number of key-value heads is another one
    if multi_query is not None:
        grouped = setting(
            config, "new_decoder_architecture"
        )  # whose keys are repeated for each query before they are kept
        heads = 1 if multi_query and not grouped else config.num_attention_heads
    width = setting(config, "head_dim") or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, width
