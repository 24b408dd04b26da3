"""From an example to tokens and labels, under a protocol."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from highrank.base.errors import UserError
from highrank.data.chat import conversation_tokens, prompt_tokens
from highrank.data.images import read_image
from highrank.data.protocol import Protocol
from highrank.data.task import Example, LabelledImage, LabelledText, Record, Task

IGNORED = -100
"""Label of a position that carries no loss."""


@dataclass(frozen=True)
class Encoded:
    """Tokens of one example; `labels` holds a target per token (IGNORED elsewhere), or the one class or value."""

    input_ids: list[int]
    labels: list[int] | float
    token_type_ids: list[int] | None = None
    cut: str = ""
    """What the cut-off took: "" nothing, "cut" some tokens, "marker_lost" the end of the prompt, which asks for the answer,
    "answer_lost" the whole target."""

    @property
    def targets(self) -> list[int]:
        """The labels of a text, one per token."""
        assert isinstance(self.labels, list)
        return self.labels


@dataclass(frozen=True, kw_only=True)
class EncodedImage(Encoded):
    """An image, which has pixels for tokens: read anew for each batch, since those of a whole set may be more than memory
    holds."""

    image: Any
    processor: Any
    """The model's own, which scales pixels as the model was trained on."""

    def pixels(self) -> Tensor:
        """Returns the pixels (channels, height, width) that the model takes."""
        pixels: Tensor = self.processor(read_image(self.image), return_tensors="pt")["pixel_values"][0]
        return pixels


def within(protocol: Protocol, positions: int) -> Protocol:
    """Returns the protocol with its cut-offs lowered to what a model has positions for."""
    if protocol.max_target_length is None:
        return replace(protocol, max_length=min(protocol.max_length, positions))
    target = min(protocol.max_target_length, positions - 1)
    return replace(protocol, max_length=min(protocol.max_length, positions - target), max_target_length=target)


def prompt_text(example: Example, protocol: Protocol, evaluation: bool = False) -> str:
    """Returns the text that a model is given before it answers."""
    plain, with_input = protocol.template, protocol.template_with_input
    if evaluation:
        plain = protocol.eval_template or plain
        with_input = protocol.eval_template_with_input or (None if protocol.eval_template else with_input)
    if example.input and with_input is not None:
        return with_input.format(instruction=example.instruction, input=example.input)
    instruction = f"{example.instruction}\n{example.input}" if example.input else example.instruction
    return plain.format(instruction=instruction)


def encode_prompt(example: Example, protocol: Protocol, tokenizer: Any, evaluation: bool = True) -> list[int]:
    """Returns the tokens that a model is given before it answers."""
    if example.messages:
        return prompt_tokens(example, tokenizer)
    bos = protocol.eval_bos if evaluation and protocol.eval_bos is not None else protocol.bos
    return _opened(tokenizer, prompt_text(example, protocol, evaluation), bos)


def _opened(tokenizer: Any, text: str, bos: bool) -> list[int]:
    """Returns a text's tokens, opened by the tokenizer's own special tokens if `bos`, and never closed by them: some
    tokenizers end every text, but what follows a prompt is its answer, and a target's end is the protocol's matter."""
    ids, end = tokenizer(text, add_special_tokens=bos, verbose=False).input_ids, [tokenizer.eos_token_id]
    closed = bos and ids[-1:] == end and tokenizer(text, add_special_tokens=False, verbose=False).input_ids[-1:] != end
    return ids[:-1] if closed else ids


def give_tokens(task: Task, protocol: Protocol, tokenizer: Any) -> None:
    """Tells a task how many tokens its examples have in a run, prompt and room for an answer."""
    new = protocol.max_new_tokens or task.max_new_tokens
    task.tokens = partial(_num_tokens, protocol=protocol, tokenizer=tokenizer, new=new)


def _num_tokens(example: Example, protocol: Protocol, tokenizer: Any, new: int) -> int:
    texts = {prompt_text(example, protocol, evaluation) for evaluation in (False, True)}
    prompt = max(len(_opened(tokenizer, text, True)) for text in texts)
    answer = len(tokenizer(example.output, add_special_tokens=False, verbose=False).input_ids) + protocol.eos
    return prompt + max(new, answer)


def encode(record: Record, protocol: Protocol, tokenizer: Any, evaluation: bool = False) -> Encoded | None:
    """Returns the tokens of prompt and target, or None if the protocol drops the example for its length; of an image its
    pixels, for which the model's image processor stands in the tokenizer's place.

    Unless the protocol tokenises them as one text, prompt and target are tokenised apart, so that the border is where
    it will be when the model answers.

    Raises:
        UserError: if the protocol ends targets with an end-of-text token that the tokenizer lacks.
    """
    if isinstance(record, LabelledText):
        return encode_text(record, protocol, tokenizer)
    if isinstance(record, LabelledImage):
        return EncodedImage([], record.label, image=record.image, processor=tokenizer)
    if record.messages:
        return _encode_conversation(record, protocol, tokenizer, evaluation)
    if protocol.eos and tokenizer.eos_token_id is None:
        raise UserError(f"protocol {protocol.name}: eos=true needs a tokenizer with an end-of-text token, got none")
    prompt = encode_prompt(record, protocol, tokenizer, evaluation)
    if protocol.joint:
        text = prompt_text(record, protocol, evaluation) + record.output
        target = _opened(tokenizer, text, protocol.bos)
        prompt, target = target[: len(prompt)], target[len(prompt) :]
    else:
        target = tokenizer(record.output, add_special_tokens=False, verbose=False).input_ids
    target = target + [tokenizer.eos_token_id] * protocol.eos
    prompt_length, target_length = len(prompt), len(target)
    if protocol.max_target_length is not None:
        prompt, target = prompt[: protocol.max_length], target[: protocol.max_target_length]
    else:
        prompt = prompt[: protocol.max_length]
        target = target[: protocol.max_length - len(prompt)]
    cut = ""
    if len(prompt) + len(target) < prompt_length + target_length:
        if protocol.too_long == "drop":
            return None
        cut = "answer_lost" if target_length and not target else "marker_lost" if len(prompt) < prompt_length else "cut"
    ids = prompt + target
    return Encoded(ids, [IGNORED] * len(prompt) + target if protocol.mask_prompt else list(ids), cut=cut)


def encode_question(record: Record, protocol: Protocol, tokenizer: Any) -> Encoded:
    """Returns what a model is shown of a record in evaluation: a prompt to go on from, or a text or an image with its label."""
    if isinstance(record, Example):
        return Encoded(encode_prompt(record, protocol, tokenizer), [])
    row = encode(record, protocol, tokenizer)
    assert row is not None  # no protocol drops what has a label
    return row


def _encode_conversation(record: Example, protocol: Protocol, tokenizer: Any, evaluation: bool) -> Encoded | None:
    """Returns the tokens of a conversation; the loss is on the assistant's turns, in evaluation on the last."""
    ids, learned = conversation_tokens(record, tokenizer, answer_only=evaluation)
    limit, cut = protocol.max_length + (protocol.max_target_length or 0), ""
    if len(ids) > limit:
        if protocol.too_long == "drop":
            return None
        ids, learned = ids[:limit], learned[:limit]
        cut = "cut" if any(learned) else "answer_lost"
    everything = not protocol.mask_prompt
    return Encoded(
        ids, [t if is_learned or everything else IGNORED for t, is_learned in zip(ids, learned, strict=True)], cut=cut
    )


def encode_text(record: LabelledText, protocol: Protocol, tokenizer: Any) -> Encoded:
    """Returns an encoder's input; texts too long for the protocol or the tokenizer's model are cut, as encoders'
    tokenizers do, the longer one first."""
    texts = (record.text,) if record.text_pair is None else (record.text, record.text_pair)
    limit = min(protocol.max_length, tokenizer.model_max_length)
    tokens = tokenizer(*texts, truncation=True, max_length=limit)
    cut = len(tokens.input_ids) == limit and len(tokenizer(*texts, verbose=False).input_ids) > limit
    return Encoded(tokens.input_ids, record.label, tokens.get("token_type_ids"), "cut" if cut else "")


def num_targets(row: Encoded) -> int:
    """Returns over how many targets the example's loss is taken: its supervised tokens but the first, or its label."""
    return sum(label != IGNORED for label in row.labels[1:]) if isinstance(row.labels, list) else 1
