"""What we use of transformers beyond its documented calls; tests/model/test_internals.py names the hook that moved.

Decoders take their key-value cache as `cache` from transformers 5.24 on, before that as `past_key_values`.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from highrank.base.errors import UserError

CACHE_NAMES = ("cache", "past_key_values")


@functools.cache
def _argument_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def by_name(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call of `module`, all by name."""
    return {**dict(zip(_argument_names(type(module).forward), args, strict=False)), **kwargs}


def cache_name(module: Any) -> str:
    """Returns the name of the argument by which a decoder, or a language model, takes its cache.

    Raises:
        UserError: if it takes none under a name that is known here.
    """
    names = _argument_names(type(module).forward)
    argument = next((name for name in CACHE_NAMES if name in names), None)
    if argument is None:
        raise UserError(
            f"model: a decoder takes its key-value cache as {' or '.join(CACHE_NAMES)}, got {type(module).__name__} "
            f"with {', '.join(names)}; train a method that acts on weights"
        )
    return argument


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """Returns the cache among a decoder's arguments, or the one in a model's output; None if there is none."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def kept_shapes(cache: Any) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Returns, per layer, heads and numbers of the keys and of the values that a cache holds; zeros where it holds none."""
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    return [(_heads_and_length(keys), _heads_and_length(values)) for keys, values in pairs]


def _heads_and_length(kept: Any) -> tuple[int, int]:
    return (0, 0) if kept is None else (kept.shape[1], kept.shape[3])


def with_cache(module: Any, arguments: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """Returns a decoder's arguments with this cache among them."""
    others = {key: value for key, value in arguments.items() if key not in CACHE_NAMES}
    return {**others, cache_name(module): cache}


def without_cache(output: Any) -> Any:
    """Returns a model's output with no cache in it."""
    return type(output)(**{key: value for key, value in output.items() if key not in CACHE_NAMES})


def text_config(config: Any) -> Any:
    """Returns the part of a config that tells of the text decoder; the config itself if it tells of nothing else."""
    return config.get_text_config(decoder=True)


def setting(config: Any, name: str) -> Any:
    """Returns a value of a config, or None where it has none or another one for each layer."""
    try:
        return getattr(config, name, None)
    except Exception as error:  # transformers' own, which is no AttributeError
        if "PerLayer" in type(error).__name__:
            return None
        raise


def decoder_of(model: Any) -> Any:
    """Returns the module below the head that holds the blocks and takes tokens or embeddings: a language model's decoder
    (it is not always `base_model`), or an encoder."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if not hasattr(decoder, "get_input_embeddings"):  # a head that is called decoder
        decoder = getattr(model, "base_model", model)
    if decoder is model and hasattr(model, "lm_head"):  # whose base is known by another name than its own
        decoder = next((child for child in model.children() if hasattr(child, "get_input_embeddings")), model)
    return decoder


def bodies_of(model: Any) -> list[Any]:
    """Returns the modules below a language model's head of which it calls one with tokens: the base of a model that sees
    and reads, but the decoder inside the base of others (OPT)."""
    return [body for body in dict.fromkeys((model.base_model, decoder_of(model))) if body is not model]


def is_encoder_decoder(config: Any) -> bool:
    """Whether a config is that of an encoder and a decoder in one model, of which the one reads what the other answers."""
    return bool(getattr(config, "is_encoder_decoder", False))


def stacks_of(model: Any) -> list[Any]:
    """Returns the modules below the head that hold the blocks: a decoder or an encoder, or first the one and then the other."""
    if is_encoder_decoder(model.config):
        return list(dict.fromkeys([model.get_encoder(), model.get_decoder()]))  # Whisper's classifier has one
    return [decoder_of(model)]


def block_names(model: Any) -> set[str]:
    """Returns the names of the classes that a model wants on one device each: its blocks."""
    return set(getattr(model, "_no_split_modules", None) or ())


def tied_weights(model: Any) -> set[str]:
    """Returns the names of parameters that a checkpoint stores under another name."""
    return set(getattr(model, "all_tied_weights_keys", None) or ())


def is_experts(module: Any) -> bool:
    """Whether a module holds experts in the form that transformers gives most of them, with a gate."""
    parameters = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    form = all(hasattr(module, name) for name in ("_apply_gate", "is_transposed", "is_concatenated"))
    return form and all(isinstance(matrix, nn.Parameter) and matrix.dim() == 3 for matrix in parameters)


def gated(experts: Any, gate_and_up: Tensor) -> Tensor:
    """Returns what an expert's down matrix reads, from the joint output (T, 2 n) of its gate and up: (T, n)."""
    inner: Tensor = experts._apply_gate(gate_and_up)
    return inner
