"""Backbones: from a model's config entry to a model and what it reads with, a tokenizer or an image processor."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from highrank.base.errors import UserError
from highrank.base.hub import hub
from highrank.model import quantised
from highrank.model.images import check_image_config, check_processor
from highrank.model.language import check_causal
from highrank.model.tiny import ENCODERS, TINY, tiny_config, tiny_image_processor, tiny_tokenizer
from highrank.model.torch_internals import has_bf16_tiles
from highrank.model.transformers_internals import is_encoder_decoder, stacks_of, text_config, tied_weights
from highrank.model.weights import WeightSource, find_source, reading

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def on_cpu(accelerator: str) -> bool:
    """Whether a Lightning accelerator is the CPU, on this machine."""
    return accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())


def fastest_dtype(accelerator: str) -> str:
    """Returns the dtype in which a Lightning accelerator computes fastest: bfloat16, but on a CPU without AMX float32.

    AVX512-BF16 alone does not make up for its conversions: matrices of the default model take 1.6 times as long in bf16.
    """
    return "float32" if on_cpu(accelerator) and not has_bf16_tiles() else "bfloat16"


@dataclass
class Backbone:
    """A model with its tokenizer and where they came from."""

    model: Any
    tokenizer: Any
    """Of a model that reads images, its image processor."""
    source: WeightSource
    update_lost: float | None = None
    """Of merged weights: the share of Σ |ΔW| in entries that rounding to the model's dtype leaves at the base's value."""


def model_config(spec: Mapping[str, Any], path: str | None) -> Any:
    """Returns the model's Hugging Face config without its weights: from `path`, the shipped shape, or the Hub.

    Raises:
        UserError: if none of them gives it.
    """
    from transformers import AutoConfig

    if path is not None:
        if not (Path(path) / "config.json").is_file():
            raise UserError(f"model: a local path is a folder with config.json, got path={path}")
        return _read_config(path)
    if spec["name"].startswith("tiny_"):
        tiny = spec["name"].removeprefix("tiny_")
        if tiny not in TINY:
            names = ", ".join(f"tiny_{name}" for name in TINY)
            raise UserError(f"model: unknown tiny model, got model.name={spec['name']}; it is one of: {names}")
        return AutoConfig.for_model(**tiny_config(tiny))
    if spec.get("shape"):
        with reading(f"model: shape must be a config that transformers knows, got model.shape={spec['shape']}"):
            return AutoConfig.for_model(**spec["shape"])
    with hub() as reason:
        try:
            if not spec.get("hub"):
                raise ValueError("no hub name")
            return AutoConfig.from_pretrained(spec["hub"], revision=spec.get("revision"), trust_remote_code=False)
        except (OSError, ValueError) as error:
            hub_name = spec.get("hub") or ""
            named = f"hf:{hub_name}" if hub_name.rpartition("/")[2] == spec["name"] else spec["name"]
            raise UserError(
                f"model: its config.json is needed, got model={named} and no answer from cache or Hub "
                f"({reason or type(error).__name__}); give a folder with path=<folder>"
            ) from error


def _reading_part(part: str, folder: Path | str) -> Any:
    return reading(
        f"model: a folder must hold a readable {part}, got path={folder}", "; give a whole copy of the model"
    )


def _read_config(folder: Path | str) -> Any:
    from transformers import AutoConfig

    with _reading_part("config.json", folder):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _auto_class(config: Any, kind: str) -> Any:
    """Returns the class of a model for a kind of task: as a decoder where it can be one, else as encoder and decoder in one."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS

    if kind == "classify_images":
        return transformers.AutoModelForImageClassification
    if kind != "generate":
        return transformers.AutoModelForSequenceClassification
    in_one = is_encoder_decoder(config) and config.model_type not in DECODERS
    return transformers.AutoModelForSeq2SeqLM if in_one else transformers.AutoModelForCausalLM


def _for_task(config: Any, kind: str, num_labels: int) -> Any:
    _check_what_it_reads(config, kind)
    if is_encoder_decoder(config) and kind != "generate":
        raise UserError(
            f"model: an encoder and a decoder in one model are not supported for a {kind} task, got {config.model_type}; "
            "they write texts: give a text-generating task, or an encoder such as model=minilm_l6"
        )
    if kind == "generate":
        if config.model_type in ENCODERS:
            raise UserError(
                f"model: a text-generating task needs a causal language model, got {config.model_type}; "
                "try model=smollm2_135m, or a classification task"
            )
        return config
    config.num_labels = num_labels
    config.problem_type = "regression" if kind == "regress" else "single_label_classification"
    return config


def _check_what_it_reads(config: Any, kind: str) -> None:
    """Refuses texts for a model of images, and images for a model of texts."""
    from transformers.models.auto import modeling_auto as auto

    sees = config.model_type in auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    reads = any(
        config.model_type in names
        for names in (
            auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
            auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        )
    )
    if kind == "classify_images" and not sees:
        raise UserError(
            f"model: a task of images needs a model that classifies images, got {config.model_type}; try model=tiny_vit or "
            "model=hf:google/vit-base-patch16-224-in21k"
        )
    if kind != "classify_images" and sees and not reads:
        raise UserError(
            f"model: a task of texts needs a model of texts, got {config.model_type}, which reads images; try "
            "model=smollm2_135m, or task=images"
        )
    if kind == "classify_images":
        check_image_config(config)


def empty_model(config: Any, kind: str = "generate", num_labels: int = 2) -> Any:
    """Returns the model on the meta device: shapes and names, no weights."""
    model_type = getattr(config, "model_type", None)
    with (
        reading(f"model: the config must describe a model for a {kind} task, got model_type={model_type}"),
        torch.device("meta"),
    ):
        model = _auto_class(config, kind).from_config(_for_task(config, kind, num_labels))
    if kind == "classify_images" and not head_modules(model):
        raise UserError(
            f"model: the head of a model that classifies images must stand apart from its encoder, got {model_type}, in which "
            "it cannot be told; take another, such as vit, deit, beit, dinov2 or swin"
        )
    return model


def load_backbone(
    spec: Mapping[str, Any], path: str | None, kind: str = "generate", num_labels: int = 2, seed: int = 0
) -> Backbone:
    """Returns model (in `spec.dtype`, evaluation mode) and tokenizer, or image processor, from the first source that has them.

    With `spec.shuffled` the entries of every weight matrix are permuted: same numbers, no knowledge, a control. With
    `spec.quantize` the linear layers below the head are quantised, whatever the weights' source.
    `seed` draws what the source does not hold: a new classification head, which a model of images gets where its own has
    other classes too.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    sees = kind == "classify_images"

    if spec.get("quantize"):
        quantised.check(spec["quantize"])
    source = find_source(spec, path)
    dtype = DTYPES[spec["dtype"]]
    with torch.random.fork_rng(devices=[]):
        if source.kind == "random":
            torch.manual_seed(0)
            config = _for_task(model_config(spec, path), kind, num_labels)
            model = _auto_class(config, kind).from_config(config).to(dtype)
            tokenizer = tiny_image_processor() if sees else tiny_tokenizer(config.model_type in ENCODERS)
        else:
            torch.manual_seed(seed)
            config = _for_task(_read_config(source.location), kind, num_labels)
            with _reading_part("model", source.location):
                model, loading_info = _auto_class(config, kind).from_pretrained(
                    source.location,
                    config=config,
                    dtype=dtype,
                    attn_implementation=spec.get("attention"),
                    use_safetensors=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # reported and refused below, by name
                )
            _check_loaded(model, loading_info, source.location, new_head=sees)
            if sees:
                with _reading_part("preprocessor_config.json", source.location):
                    tokenizer = AutoImageProcessor.from_pretrained(
                        source.location,
                        backend="pil",  # whatever else is installed: others scale a little differently
                        trust_remote_code=False,
                    )
            else:
                with _reading_part("tokenizer", source.location):
                    tokenizer = AutoTokenizer.from_pretrained(source.location, trust_remote_code=False)
                check_pieces(tokenizer, Path(source.location))
        if spec.get("shuffled"):
            shuffle_weights(model)
    if spec.get("quantize"):
        quantised.quantise(model, spec["quantize"])
    if not sees:
        prepare_tokenizer(tokenizer, model)
    model.eval()
    if sees:
        check_processor(model, tokenizer)
    if kind == "generate":
        check_causal(model)
    return Backbone(model, tokenizer, source)


def _check_loaded(model: Any, loading_info: Mapping[str, Any], folder: str, new_head: bool = False) -> None:
    """Refuses weights that the folder lacks or holds in another shape, since transformers draws those at random.

    A classification model may lack its head, which is trained in full, and with `new_head` have one of another shape; tied
    weights are stored once.
    """
    heads = tuple(f"{name}." for name in head_modules(model))
    tied = tied_weights(model)
    missing = sorted(key for key in loading_info["missing_keys"] if not key.startswith(heads) and key not in tied)
    if missing:
        raise UserError(
            f"model: the folder must hold every weight of the model, got path={folder} without {_first(missing)}; "
            "give a whole copy, or one whose config.json fits its weights"
        )
    wrong = sorted(
        f"{key} {list(got)} for {list(wanted)}"
        for key, got, wanted in loading_info["mismatched_keys"]
        if not (new_head and key.startswith(heads))
    )
    if wrong:
        raise UserError(
            f"model: weights must have the shapes that config.json gives, got path={folder} with {_first(wrong)}; "
            "give a copy whose config.json and number of labels fit its weights"
        )


def _first(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_pieces(tokenizer: Any, folder: Path) -> None:
    """Raises UserError if a tokenizer.model without a word on how to read it is not read as SentencePiece does.

    transformers 5.23 reads such a file without the space in front of a text: every number would change, and none say so.
    """
    file = folder / "tokenizer.model"
    if not file.is_file() or any((folder / f"tokenizer{end}").is_file() for end in ("_config.json", ".json")):
        return
    import transformers
    from sentencepiece import SentencePieceProcessor

    text = "One, two and 3 words"
    processor = SentencePieceProcessor(model_file=str(file))
    pieces = [processor.id_to_piece(i) for i in processor.encode(text)]
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)
    if tokens != pieces:
        raise UserError(
            f"model: a tokenizer.model must be read as SentencePiece reads it, got {tokens} instead of {pieces} for "
            f"{text!r} with transformers {transformers.__version__} in {folder}; give the model's tokenizer_config.json "
            "too, or use transformers>=5.24"
        )


def prepare_tokenizer(tokenizer: Any, model: Any) -> None:
    """Makes sure that there is a pad token: the tokenizer's own, else its unknown, else its end-of-text token.

    Raises:
        UserError: if it has none of them.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(
            f"model: a tokenizer needs a pad, unknown or end-of-text token, got none in {type(tokenizer).__name__}; "
            "name one in its tokenizer_config.json"
        )
    for config in (model.config, text_config(model.config)):  # a decoder that classifies finds a row's last token by it
        config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


@torch.no_grad()
def shuffle_weights(model: nn.Module) -> None:
    """Permutes the entries within every weight matrix of `model`, seeded."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))


def modules_on_text(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules outside the head, but those that a language model does not run on text: a part that sees, attention
    to an encoder that is not there."""
    used = {module for stack in stacks_of(model) for module in stack.modules()}
    heads, unused = head_modules(model), {*model.base_model.modules()} - used
    crosses = is_encoder_decoder(model.config)
    for name, module in model.named_modules():
        if module not in unused and (crosses or "encoder_attn" not in name) and name.split(".")[0] not in heads:
            yield name, module


def head_modules(model: Any) -> list[str]:
    """Returns the names of a classification model's own modules on top of its encoder, which train in full.

    A model that writes text has none, nor has an encoder by itself, or one whose head is its embeddings again.
    """
    if model.can_generate() or model.base_model is model:
        return []
    below = {id(parameter) for parameter in model.base_model.parameters()}
    heads = {name: [id(p) for p in child.parameters()] for name, child in model.named_children()}
    return [name for name, own in heads.items() if own and below.isdisjoint(own)]
