"""Random models of a few thousand parameters, with a tokenizer or an image processor built in code."""

from typing import Any

TINY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "phi3": {"pad_token_id": 0},
    "gpt2": {},
    "t5": {"decoder_start_token_id": 0},
    "bert": {},
    "roberta": {"max_position_embeddings": 1026},
    "distilbert": {},
    "vit": {"image_size": 32, "patch_size": 8},
}
"""Random models of a few thousand parameters, `model=tiny_<name>`, for tests and mechanics."""

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt2")
ENCODERS = ("bert", "roberta", "distilbert")
IMAGE_ENCODERS = ("vit",)


def tiny_config(model_type: str) -> dict[str, Any]:
    """Returns config fields of a random two-layer model, hidden 16, vocabulary of 260 byte tokens, or images of 32 × 32."""
    if model_type == "gpt2":
        sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 1024}
    elif model_type == "t5":
        sizes = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 32, "n_positions": 1024}
    elif model_type == "distilbert":
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 1024}
    else:
        sizes = {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        }
        if model_type in IMAGE_ENCODERS:
            return {"model_type": model_type, **sizes, **TINY[model_type]}
        sizes["max_position_embeddings"] = 1024
        if model_type not in ENCODERS:
            sizes["num_key_value_heads"] = 1
    tokens = {"vocab_size": 260, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {"model_type": model_type, **tokens, **sizes, **TINY[model_type]}


def tiny_tokenizer(encoder: bool = False) -> Any:
    """Returns a byte-level tokenizer of 260 tokens, built in code."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(specials + alphabet)}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    if encoder:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    else:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=1024,
    )


def tiny_image_processor() -> Any:
    """Returns what scales images to the size of a tiny model and their pixels to [-1, 1]."""
    from transformers import ViTImageProcessorPil

    size = TINY["vit"]["image_size"]
    return ViTImageProcessorPil(size={"height": size, "width": size})
