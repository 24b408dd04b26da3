"""Every model type against every check: a table of verdicts, and what tests/model/test_model_types.py runs.

python experiments/robustness/model_types.py [TYPE ...] [--write]
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from highrank.base.errors import UserError
from highrank.base.registry import available, load
from highrank.data.batches import pad
from highrank.data.encoding import IGNORED
from highrank.model.adapters import Adapters, attach
from highrank.model.backbones import empty_model, prepare_tokenizer
from highrank.model.language import check_causal, padding_moves
from highrank.model.placement import resolve
from highrank.model.tiny import tiny_tokenizer
from highrank.train.loss import language_model_loss
from highrank.train.outputs import generate, of_one_length, rank_options

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "vocab_size": 260,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def under(module: str, **names: str) -> dict[str, str]:
    return {part: f"{module}.{name}" for part, name in names.items()}


ATTENTION = under("self_attn", q="q_proj", k="k_proj", v="v_proj", o="o_proj")
MLP = under("mlp", gate="gate_proj", up="up_proj", down="down_proj")
LLAMA = ATTENTION | MLP
UP_DOWN = ATTENTION | under("mlp", up="up_proj", down="down_proj")
SHARED_EXPERT = ATTENTION | under("mlp.shared_expert", gate="gate_proj", up="up_proj", down="down_proj")
SHARED_EXPERTS = under("mlp.shared_experts", gate="gate_proj", up="up_proj", down="down_proj")
OPT = under("self_attn", q="q_proj", k="k_proj", v="v_proj", o="out_proj") | {"up": "fc1", "down": "fc2"}
BERT = {
    **under("attention.self", q="query", k="key", v="value"),
    **{"o": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"},
}
H_TO_4H = under("mlp", up="dense_h_to_4h", down="dense_4h_to_h")
IN_A_ROW = {"q": "[0:32]", "k": "[32:64]", "v": "[64:96]"}
BY_HEAD = {"q": "[0:8 of 24]", "k": "[8:16 of 24]", "v": "[16:24 of 24]"}
HALVES = {"gate": "[0:48]", "up": "[48:96]"}
LATENT = {
    **{"q": "self_attn.q_b_proj", "o": "self_attn.o_proj"},
    **{"k": "self_attn.kv_b_proj[0:8 of 16]", "v": "self_attn.kv_b_proj[8:16 of 16]"},
}


def rows(module: str, spans: Mapping[str, str]) -> dict[str, str]:
    return {part: module + span for part, span in spans.items()}


@dataclass(frozen=True)
class Type:
    """A model type: where its parts are, and what its tiny model needs beyond SIZES."""

    blocks: str
    parts: Mapping[str, str]
    fields: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "generate"
    second: Mapping[str, str] | None = None
    """Parts of the second block, where they are others."""


def decoder(parts: Mapping[str, str] = LLAMA, second: Mapping[str, str] | None = None, **fields: Any) -> Type:
    return Type("model.layers", parts, {**GROUPED, **fields}, second=second)


def encoder(blocks: str, parts: Mapping[str, str] = BERT, **fields: Any) -> Type:
    return Type(blocks, parts, {"type_vocab_size": 2, **fields}, "classify")


OTHER_PAD = {"pad_token_id": 3}
"""Another id than the tokenizer's, which a decoder that classifies must not go by."""


def seeing(text: str, parts: Mapping[str, str], kind: str = "generate", **fields: Any) -> Type:
    """A model that also sees, whose config keeps that of its language model apart."""
    sizes = {**SIZES, **GROUPED, **EXPERTS, **OTHER_PAD, "model_type": text, "attention_chunk_size": 4}
    if text == "qwen3_5_text":
        sizes["layer_types"] = ["full_attention"] * 2
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8, "vision_use_head": False}
    blocks = "model.layers" if text in ("llama4_text", "qwen3_5_text") else "model.language_model.layers"
    return Type(blocks, parts, {"text_config": sizes, "vision_config": vision, **fields}, kind)


LATENT_SIZES = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    **{"head_dim": 8, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1},
}
UNSHIFTED = ("bart", "pegasus")
"""Types whose own loss takes the label of a position for that position, not for the one before it."""
TYPES: dict[str, Type] = {
    **{
        name: decoder()
        for name in (
            *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "olmo3"),
            *("stablelm", "granite", "cohere", "cohere2", "smollm3", "exaone4", "helium", "seed_oss", "ministral3"),
            *("ernie4_5", "vaultgemma", "diffllama", "cwm"),
        )
    },
    **{name: decoder(UP_DOWN) for name in ("arcee", "apertus", "jais2")},
    **{
        name: decoder(ATTENTION | rows("mlp.gate_up_proj", HALVES) | {"down": "mlp.down_proj"})
        for name in ("glm", "glm4")
    },
    "phi": decoder(
        under("self_attn", q="q_proj", k="k_proj", v="v_proj", o="dense") | under("mlp", up="fc1", down="fc2")
    ),
    "phi3": decoder(
        rows("self_attn.qkv_proj", {"q": "[0:32]", "k": "[32:48]", "v": "[48:64]"})
        | rows("mlp.gate_up_proj", HALVES)
        | {"o": "self_attn.o_proj", "down": "mlp.down_proj"}
    ),
    "nanochat": decoder(ATTENTION | under("mlp", up="fc1", down="fc2")),
    "starcoder2": decoder(ATTENTION | under("mlp", up="c_fc", down="c_proj")),
    "lfm2": decoder(
        under("self_attn", q="q_proj", k="k_proj", v="v_proj", o="out_proj")
        | under("feed_forward", gate="w1", up="w3", down="w2"),
        layer_types=["full_attention", "full_attention"],
    ),
    "persimmon": Type("model.layers", rows("self_attn.query_key_value", BY_HEAD) | {"o": "self_attn.dense"} | H_TO_4H),
    "mpt": Type(
        "transformer.blocks",
        rows("attn.Wqkv", IN_A_ROW) | {"o": "attn.out_proj"} | under("ffn", up="up_proj", down="down_proj"),
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "expansion_ratio": 2},
    ),
    "gpt2": Type(
        "transformer.h", rows("attn.c_attn", IN_A_ROW) | {"o": "attn.c_proj"} | under("mlp", up="c_fc", down="c_proj")
    ),
    "openai-gpt": Type(
        "transformer.h", rows("attn.c_attn", IN_A_ROW) | {"o": "attn.c_proj"} | under("mlp", up="c_fc", down="c_proj")
    ),
    "gpt_bigcode": Type(
        "transformer.h",
        rows("attn.c_attn", {"q": "[0:32]", "k": "[32:40]", "v": "[40:48]"})
        | {"o": "attn.c_proj"}
        | under("mlp", up="c_fc", down="c_proj"),
    ),
    "gpt_neo": Type(
        "transformer.h",
        under("attn.attention", q="q_proj", k="k_proj", v="v_proj", o="out_proj")
        | under("mlp", up="c_fc", down="c_proj"),
        {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    ),
    "gptj": Type(
        "transformer.h",
        under("attn", q="q_proj", k="k_proj", v="v_proj", o="out_proj") | under("mlp", up="fc_in", down="fc_out"),
        {"rotary_dim": 4},
    ),
    "codegen": Type(
        "transformer.h",
        rows("attn.qkv_proj", {"q": "[0:8 of 24]", "k": "[16:24 of 24]", "v": "[8:16 of 24]"})
        | {"o": "attn.out_proj"}
        | under("mlp", up="fc_in", down="fc_out"),
        {"rotary_dim": 4},
    ),
    "gpt_neox": Type(
        "gpt_neox.layers", rows("attention.query_key_value", BY_HEAD) | {"o": "attention.dense"} | H_TO_4H
    ),
    "bloom": Type(
        "transformer.h", rows("self_attention.query_key_value", BY_HEAD) | {"o": "self_attention.dense"} | H_TO_4H
    ),
    "falcon": Type(
        "transformer.h",
        rows("self_attention.query_key_value", {"q": "[0:16 of 32]", "k": "[16:24 of 32]", "v": "[24:32 of 32]"})
        | {"o": "self_attention.dense"}
        | H_TO_4H,
        {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 48},
    ),
    "falcon/multi-query": Type(
        "transformer.h",
        rows("self_attention.query_key_value", {"q": "[0:32]", "k": "[32:40]", "v": "[40:48]"})
        | {"o": "self_attention.dense"}
        | H_TO_4H,
        {"multi_query": True, "ffn_hidden_size": 48},
    ),
    "falcon/alibi": Type(
        "transformer.h",
        rows("self_attention.query_key_value", BY_HEAD) | {"o": "self_attention.dense"} | H_TO_4H,
        {"multi_query": False, "alibi": True, "parallel_attn": False, "ffn_hidden_size": 48},
    ),
    "gpt_bigcode/multi-head": Type(
        "transformer.h",
        rows("attn.c_attn", BY_HEAD) | {"o": "attn.c_proj"} | under("mlp", up="c_fc", down="c_proj"),
        {"multi_query": False},
    ),
    "opt": Type("model.decoder.layers", OPT, {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "xglm": Type("model.layers", OPT, {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48}),
    "biogpt": Type("biogpt.layers", OPT),
    **{
        name: Type("model.decoder.layers", OPT, {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4})
        for name in ("bart", "pegasus")
    },
    **{
        name: decoder(ATTENTION, **EXPERTS)
        for name in ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "phimoe", "minimax_m2", "flex_olmo")
    },
    "llama4_text": decoder(
        ATTENTION | under("feed_forward.shared_expert", gate="gate_proj", up="up_proj", down="down_proj"),
        attention_chunk_size=4,
        **EXPERTS,
    ),
    "qwen2_moe": decoder(SHARED_EXPERT, shared_expert_intermediate_size=24, **EXPERTS),
    "ernie4_5_moe": decoder(
        ATTENTION | MLP, second=ATTENTION | SHARED_EXPERTS, moe_num_experts=4, moe_k=2, moe_layer_start_index=1
    ),
    **{
        name: Type("model.layers", LATENT | MLP, LATENT_SIZES, second=LATENT | SHARED_EXPERTS)
        for name in ("deepseek_v2", "deepseek_v3")
    },
    "glm4_moe": Type(
        "model.layers",
        LLAMA,
        {**GROUPED, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        second=ATTENTION | SHARED_EXPERTS,
    ),
    "gemma3": seeing("gemma3_text", LLAMA, mm_tokens_per_image=4),
    "llama4": seeing(
        "llama4_text",
        ATTENTION | under("feed_forward.shared_expert", gate="gate_proj", up="up_proj", down="down_proj"),
    ),
    "qwen3_5": seeing("qwen3_5_text", LLAMA),
    "llama/classes": Type("model.layers", LLAMA, {**GROUPED, **OTHER_PAD}, "classify"),
    "gemma3/classes": seeing("gemma3_text", LLAMA, "classify", mm_tokens_per_image=4),
    "opt/classes": Type(
        "model.decoder.layers", OPT, {"ffn_dim": 48, "word_embed_proj_dim": 32, **OTHER_PAD}, "classify"
    ),
    "falcon/classes": Type(
        "transformer.h",
        rows("self_attention.query_key_value", {"q": "[0:32]", "k": "[32:40]", "v": "[40:48]"})
        | {"o": "self_attention.dense"}
        | H_TO_4H,
        {"multi_query": True, "ffn_hidden_size": 48, **OTHER_PAD},
        "classify",
    ),
    "bert": encoder("bert.encoder.layer"),
    "roberta": encoder("roberta.encoder.layer"),
    "xlm-roberta": encoder("roberta.encoder.layer"),
    "camembert": encoder("roberta.encoder.layer"),
    "electra": encoder("electra.encoder.layer", embedding_size=32),
    "ernie": encoder("ernie.encoder.layer"),
    "rembert": encoder("rembert.encoder.layer", input_embedding_size=32, output_embedding_size=32),
    "roformer": encoder("roformer.encoder.layer", embedding_size=32),
    "megatron-bert": encoder("bert.encoder.layer"),
    "data2vec-text": encoder("data2vec_text.encoder.layer"),
    "deberta-v2": encoder(
        "deberta.encoder.layer", BERT | under("attention.self", q="query_proj", k="key_proj", v="value_proj")
    ),
    "deberta": encoder("deberta.encoder.layer", BERT | rows("attention.self.in_proj", BY_HEAD)),
    "albert": encoder(
        "albert.encoder.albert_layer_groups.0.albert_layers",
        under("attention", q="query", k="key", v="value", o="dense") | {"up": "ffn", "down": "ffn_output"},
        embedding_size=16,
    ),
    "mpnet": encoder("mpnet.encoder.layer", BERT | under("attention.attn", q="q", k="k", v="v", o="o")),
    "distilbert": encoder(
        "distilbert.transformer.layer",
        under("attention", q="q_lin", k="k_lin", v="v_lin", o="out_lin") | under("ffn", up="lin1", down="lin2"),
        hidden_dim=48,
    ),
    "modernbert": encoder(
        "model.layers",
        rows("attn.Wqkv", IN_A_ROW) | rows("mlp.Wi", HALVES) | {"o": "attn.Wo", "down": "mlp.Wo"},
    ),
    "nomic_bert": encoder("nomic_bert.layers", LLAMA),
}


def tiny(name: str) -> Any:
    """Returns the config of a tiny model of a type; a window that slides is shorter than the prompts."""
    from transformers import AutoConfig

    model_type, fields = name.partition("/")[0], {**SIZES, **TYPES[name].fields}
    config = AutoConfig.for_model(model_type, **fields)
    if getattr(config, "sliding_window", None):
        config = AutoConfig.for_model(model_type, **fields, sliding_window=4)
    return config


def built(name: str) -> Any:
    """Returns a tiny model in which every part tells."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.manual_seed(0)
    auto = AutoModelForCausalLM if TYPES[name].kind == "generate" else AutoModelForSequenceClassification
    return telling(auto.from_config(tiny(name)))


def telling(model: Any) -> Any:
    """Returns a tiny model with matrices that are random and large enough for every part to tell, as one is evaluated."""
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    prepare_tokenizer(tiny_tokenizer(), model)
    return model


def adapted(name: str, method: str = "lora", model: Any = None, **fields: Any) -> Adapters:
    """Returns a tiny model with an adapter on each part of each block, none of them at its start."""
    model = built(name) if model is None else model
    cls = load("methods", method)
    views = resolve(model, "all", fused="split") if cls.family.placed else []
    adapters = attach(model, views, cls, cls.config(**fields), tokenizer=tiny_tokenizer())
    move(adapters)
    model.eval()
    return adapters


def move(adapters: Adapters) -> None:
    """Moves every adapter away from its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in adapters.named_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [50, 60, 70, 80], [100, 90]]


def close(found: Tensor, right: Tensor, what: str) -> None:
    """Raises AssertionError unless two results agree to fp32's rounding in sums of some hundred numbers."""
    error = float((found - right).abs().max() / (right.std() + 1e-30))
    assert error < 1e-4, f"{what} differ by {error:.1e} of their spread"


def placement(name: str) -> None:
    """Every part is where the table says, in each block, and nowhere else."""
    of = TYPES[name]
    views = resolve(empty_model(tiny(name), of.kind), "all", fused="split")
    found = {f"{view.path}{_rows(view.rows)}": (view.layer, view.part) for view in views}
    num_blocks = 1 + max(view.layer for view in views)
    expected = {
        f"{of.blocks}.{layer}.{path}": (layer, part)
        for layer in range(num_blocks)
        for part, path in (of.second if of.second and layer else of.parts).items()
    }
    assert found == expected, f"parts at {sorted(found.items() ^ expected.items())}"
    assert num_blocks == (1 if name == "albert" else 2), f"{num_blocks} blocks"


def _rows(found: Any) -> str:
    return "" if found is None else f"[{found[0]}:{found[1]}" + (f" of {found[2]}]" if len(found) > 2 else "]")


def roles(name: str) -> None:
    """Where rows of one matrix are q, k and v: with q = 0 every token attends alike, so that k does not matter."""
    model = built(name)
    views = [view for view in resolve(model, "all", fused="split") if view.part in ("q", "k", "v")]
    if all(view.rows is None for view in views) or name.startswith("deberta"):
        return
    cls = load("methods", "hyperadapt")
    adapters = attach(model, views, cls, cls.config())
    with torch.no_grad():
        for view in views:
            if view.part == "q":
                adapters.by_view[view.name].a.zero_()
    model(input_ids=torch.tensor(PROMPTS[:1])).logits.square().sum().backward()
    for view in views:
        moves = float(adapters.by_view[view.name].a.grad.abs().sum())
        assert view.part != "k" or moves < 1e-4, f"{view.name} matters without q"
        assert view.part != "v" or moves > 1e-2, f"{view.name} does not matter"


def merging(name: str) -> None:
    """An adapter on each part computes what the model does with the merged weights."""
    adapters = adapted(name)
    ids = torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        before = adapters.model(input_ids=ids).logits
        adapters.merge()
        close(adapters.model(input_ids=ids).logits, before, "merged and adapted logits")


def loss(name: str) -> None:
    """The loss is the model's own, padding and prompt left out."""
    model = adapted(name).model
    ids, mask = pad(PROMPTS, 0), pad([[1] * len(row) for row in PROMPTS], 0)
    with torch.no_grad():
        if TYPES[name].kind == "generate":
            labels = torch.where(mask.bool(), ids, IGNORED)
            labels[:, 0] = IGNORED
            found, _ = language_model_loss(model, ids, mask, labels)
            if name in UNSHIFTED:
                labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        else:
            labels = torch.tensor([0, 1, 0])
            found = F.cross_entropy(torch.cat([model(input_ids=torch.tensor([row])).logits for row in PROMPTS]), labels)
        own = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert abs(float(found - own)) < 1e-4 * float(own), f"loss {found} for the model's own {own}"


def causality(name: str) -> None:
    """A model that sees later tokens is refused for texts, and no other one is."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as WRITERS

    config = tiny(name)
    if TYPES[name].kind == "generate":
        check_causal(built(name))
    elif config.model_type in WRITERS and "/" not in name:
        try:
            check_causal(AutoModelForCausalLM.from_config(config).eval())
        except UserError as error:
            assert "needs a causal language model" in str(error), error  # noqa: PT017
        else:
            raise AssertionError("trained on what it sees")


def experts(name: str) -> None:
    """With an adapter of every method on each expert's up and down: at the start nothing changes, moved they compute what
    merging writes, all learn."""
    ids = torch.tensor(PROMPTS[:1])
    model = built(name)
    with torch.no_grad():
        base = model(input_ids=ids).logits
    views = resolve(model, "experts")
    for method in available("methods"):
        cls = load("methods", method)
        if not (cls.family.changes_weights and cls.family.keeps_base):  # matrices that train are taken whole
            continue
        adapters = attach(model, views, cls, cls.config(**cls.examples[0]))
        with torch.no_grad():
            close(model(input_ids=ids).logits, base, f"{method}: logits at the start")
            generator = torch.Generator().manual_seed(1)
            for _, parameter in adapters.named_parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            found = model(input_ids=ids).logits
            assert not torch.allclose(found, base, atol=1e-3), f"{method}: nothing changed"
            adapters.merge()
            close(model(input_ids=ids).logits, found, f"{method}: merged and adapted logits")
            adapters.unmerge()
        model(input_ids=ids).logits.square().mean().backward()
        assert all(p.grad is not None for _, p in adapters.named_parameters()), f"{method}: an expert has no gradient"
        adapters.unload()
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, base), f"{method}: traces are left"


EXPERTS_OF = {
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "phimoe", "minimax_m2", "flex_olmo"),
    *("ernie4_5_moe", "deepseek_v2", "deepseek_v3", "glm4_moe"),
}
"""Types with experts that can be adapted."""


def learning(name: str) -> None:
    """Methods whose backward keeps more than inputs have the same gradients in each step, all of them."""
    ids = torch.tensor(PROMPTS[:1])
    for method in ("hyperadapt", "dora"):
        adapters = adapted(name, method)
        steps = []
        for _ in range(2):
            adapters.model.zero_grad()
            adapters.model(input_ids=ids.expand(8, -1)).logits.square().mean().backward()
            steps.append({key: p.grad for key, p in adapters.named_parameters()})
        for key, first in steps[0].items():
            assert first is not None, f"{method}: no gradient at {key}"
            close(steps[1][key], first, f"{method}: gradients of two steps at {key}")


def generation(name: str) -> None:
    """A text does not depend on what else is in the batch."""
    _texts(adapted(name))


def _cut(adapters: Adapters) -> Callable[[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Returns what evaluation makes of a batch: one of each length, if padding matters, else itself."""
    return of_one_length if adapters.num_positions > 0 or padding_moves(adapters.model) else lambda batch: [batch]


def _prompts(prompts: list[list[int]]) -> dict[str, Tensor]:
    return {
        "input_ids": pad(prompts, 0, left=True),
        "attention_mask": pad([[1] * len(row) for row in prompts], 0, left=True),
        "index": torch.arange(len(prompts)),
    }


def _texts(adapters: Adapters) -> None:
    tokenizer, parts = tiny_tokenizer(), _cut(adapters)
    decoding = {"max_new_tokens": 4, "do_sample": False}

    def texts(prompts: list[list[int]]) -> list[str]:
        found = {}
        for part in parts(_prompts(prompts)):
            written = generate(adapters.model, tokenizer, part, decoding, 0)
            found |= dict(zip(part["index"].tolist(), written, strict=True))
        return [found[i] for i in range(len(prompts))]

    with torch.no_grad():
        together, alone = texts(PROMPTS), [text for row in PROMPTS for text in texts([row])]
    assert together == alone, f"texts {together} together, {alone} alone"


def ranking(name: str) -> None:
    """Nor do an option's log-probabilities, which are those of the whole text."""
    _rankings(adapted(name))


TAILS = [[20, 21, 2], [30, 2]]


def _rankings(adapters: Adapters) -> None:
    model, parts = adapters.model, _cut(adapters)

    def ranked(prompts: list[list[int]]) -> Tensor:
        tails = TAILS * len(prompts)
        batch = {
            **_prompts(prompts),
            "owner": torch.tensor([at for at in range(len(prompts)) for _ in TAILS]),
            "tail_ids": pad(tails, 0),
            "tail_mask": pad([[1] * len(row) for row in tails], 0),
            "tail_labels": pad(tails, IGNORED),
        }
        found = dict(pair for part in parts(batch) for pair in rank_options(model, part))
        return torch.tensor([[found[row][i] for i in range(len(TAILS))] for row in range(len(prompts))])

    def whole(prompt: list[int], tail: list[int]) -> float:
        ids = torch.tensor([prompt + tail])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return float(logits.gather(1, torch.tensor(tail)[:, None]).sum())

    with torch.no_grad():
        right = torch.tensor([[whole(prompt, tail) for tail in TAILS] for prompt in PROMPTS])
        close(torch.cat([ranked([prompt]) for prompt in PROMPTS]), right, "log-probabilities with a cache and without")
        close(ranked(PROMPTS), right, "log-probabilities in a batch and alone")


def prompt(name: str) -> None:
    """The same with virtual tokens in front; and they learn."""
    _virtual(name, "prompt_tuning")


def prefix(name: str) -> None:
    """The same with a prefix in the cache; where a model's cache holds none, that is said."""
    try:
        _virtual(name, "prefix")
    except UserError as error:
        assert name in NO_PREFIX, error  # noqa: PT017
    else:
        assert name not in NO_PREFIX, "a prefix is possible"


NO_PREFIX = ("openai-gpt", "deepseek_v2", "deepseek_v3")


def _virtual(name: str, method: str) -> None:
    adapters = adapted(name, method, num_virtual_tokens=3)
    _texts(adapters)
    _rankings(adapters)
    ids = torch.tensor(PROMPTS[:1])
    language_model_loss(adapters.model, ids, torch.ones_like(ids), ids)[0].backward()
    learns = [bool(p.grad is not None and p.grad.flatten(1).any(1).all()) for _, p in adapters.named_parameters()]
    assert all(learns), "a virtual token has no gradient"


CHECKS: dict[str, Callable[[str], None]] = {
    check.__name__: check
    for check in (placement, roles, merging, experts, loss, learning, causality, generation, ranking, prompt, prefix)
}
OF_TEXTS = ("generation", "ranking", "prompt", "prefix")


def checks_of(name: str) -> list[str]:
    """Returns the checks that a model type goes through."""
    texts = TYPES[name].kind == "generate"
    return [c for c in CHECKS if (texts or c not in OF_TEXTS) and (c != "experts" or name in EXPERTS_OF)]


def verdict(name: str, check: str) -> str:
    """Returns ok, or what is wrong."""
    try:
        CHECKS[check](name)
    except Exception as error:
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return "ok"


def table(found: Mapping[str, Mapping[str, str]]) -> str:
    """Returns the verdicts as Markdown: a row per type, and a line per fault."""
    lines = [f"| model type | {' | '.join(CHECKS)} |", f"| --- |{' --- |' * len(CHECKS)}"]
    for name, verdicts in found.items():
        cells = [("ok" if verdicts[check] == "ok" else "FAULT") if check in verdicts else "–" for check in CHECKS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    faults = [
        f"- {name}, {check}: {said}" for name, row in found.items() for check, said in row.items() if said != "ok"
    ]
    return "\n".join([*lines, "", *faults, f"{len(found)} model types, {len(faults)} faults."])


def about() -> str:
    """Returns what the table is of, and what each check asks."""
    import transformers

    asked = [f"- `{name}`: {' '.join(check.__doc__.split())}" for name, check in CHECKS.items()]  # type: ignore[union-attr]
    head = f"Made by `python experiments/robustness/model_types.py --write`, transformers {transformers.__version__}, fp32."
    return "\n".join(
        [
            "# Model types",
            "",
            head,
            "",
            *asked,
            "",
            "– : the check is for models that write text, or have experts.",
            "",
            "",
        ]
    )


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", choices=[*TYPES, []])
    parser.add_argument("--write", action="store_true", help="write model_types.md beside this file")
    given = parser.parse_args(words)
    warnings.simplefilter("ignore")  # transformers' own, of its tiny configs
    names = given.types or list(TYPES)
    found = {name: {check: verdict(name, check) for check in checks_of(name)} for name in names}
    print(table(found))
    if given.write:
        Path(__file__).with_suffix(".md").write_text(about() + table(found) + "\n")
    return int(any(said != "ok" for row in found.values() for said in row.values()))


if __name__ == "__main__":
    sys.exit(main())
