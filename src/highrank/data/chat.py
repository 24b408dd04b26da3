"""Conversations: rows of `messages` in the tokenizer's own chat template, and which of their tokens are learned.

A template that marks what the assistant says with `{% generation %}` is taken at its word. With any other, an assistant's
turn is what the conversation up to it has beyond the prompt that asks for it, up to the token that ends it.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from jinja2 import TemplateError

from highrank.base.errors import UserError
from highrank.data.sources import as_text
from highrank.data.task import Example

ROLES = ("system", "user", "assistant", "tool")
DATE = "26 Jul 2024"
"""The day that templates with a date are told, so that a prompt is the same on every day."""


def messages_of(value: Any, name: str) -> tuple[tuple[str, str], ...]:
    """Returns the turns of a row's conversation, a list of {role, content}, as (role, content).

    Raises:
        ValueError: naming what is no turn.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} must be a list of messages, got {name}={str(value)[:80]}")
    turns = []
    for i, message in enumerate(value):
        here = f"{name}[{i}]"
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise ValueError(f"{here} must have role and content, got {str(message)[:80]}")
        more = [key for key, entry in message.items() if key not in ("role", "content") and entry is not None]
        if more:
            raise ValueError(
                f"{here} must have nothing but role and content, got {more[0]}; leave it out, or into content"
            )
        if message["role"] not in ROLES:
            raise ValueError(f"{here}.role is one of {', '.join(ROLES)}, got role={str(message['role'])[:80]}")
        turns.append((message["role"], as_text(message["content"], f"{here}.content")))
    return tuple(turns)


def prompt_of(example: Example, tokenizer: Any) -> str:
    """Returns the conversation before the answer as the template writes it, up to where the answer begins."""
    return str(_written(example, tokenizer, example.messages, add_generation_prompt=True, tokenize=False))


def prompt_tokens(example: Example, tokenizer: Any) -> list[int]:
    """Returns the tokens of `prompt_of`."""
    return _tokens(example, tokenizer, example.messages, add_generation_prompt=True)


def conversation_tokens(example: Example, tokenizer: Any, answer_only: bool = False) -> tuple[list[int], list[bool]]:
    """Returns the tokens of the whole conversation, and which are learned: the assistant's turns behind the first
    `example.given`, or with `answer_only` the last.

    Raises:
        UserError: if the tokenizer has no template, the template refuses the conversation, or it writes the beginning of
            a conversation otherwise than the whole, so that what the assistant says cannot be told from the rest.
    """
    turns = (*example.messages, ("assistant", example.output))
    first = len(example.messages) if answer_only else example.given
    ids = _tokens(example, tokenizer, turns)
    if re.search(r"\{%-?\s*generation\b", str(tokenizer.get_chat_template())):
        encoding = _written(example, tokenizer, turns, return_dict=True, return_assistant_tokens_mask=True)
        start = len(_begins(example, tokenizer, ids, turns, first, True)) if first else 0
        return ids, [bool(mask) and at >= start for at, mask in enumerate(encoding["assistant_masks"])]
    learned, special = [False] * len(ids), special_tokens(tokenizer)
    for i in range(first, len(turns)):
        if turns[i][0] != "assistant":
            continue
        start = len(_begins(example, tokenizer, ids, turns, i, True))
        end = len(_begins(example, tokenizer, ids, turns, i + 1, False))
        ends = [
            at + 1 for at in range(start, end) if ids[at] in special
        ]  # what is behind, a line end, is the template's
        learned[start : max(ends, default=end)] = [True] * (max(ends, default=end) - start)
    return ids, learned


def stop_tokens(example: Example, tokenizer: Any) -> list[int]:
    """Returns the tokens at which an answer is over: the tokenizer's end of text, and the template's end of a turn."""
    ids, learned = conversation_tokens(example, tokenizer, answer_only=True)
    last = max(at for at, is_learned in enumerate(learned) if is_learned)
    ends = [token for token in ids[last : last + 2] if token in special_tokens(tokenizer)][:1]
    return sorted({token for token in (*ends, tokenizer.eos_token_id) if token is not None})


def special_tokens(tokenizer: Any) -> set[int]:
    """Returns the tokens that are no text."""
    added = {token for token, added_token in tokenizer.added_tokens_decoder.items() if added_token.special}
    return added | set(tokenizer.all_special_ids)


def _begins(
    example: Example, tokenizer: Any, ids: Sequence[int], turns: Sequence[tuple[str, str]], n: int, asks: bool
) -> list[int]:
    """Returns the tokens of the first n turns, which must be those with which the whole conversation begins."""
    begin = _tokens(example, tokenizer, turns[:n], add_generation_prompt=asks)
    if list(ids[: len(begin)]) != begin:
        same = next((i for i, (a, b) in enumerate(zip(begin, ids, strict=False)) if a != b), min(len(begin), len(ids)))
        raise UserError(
            f"chat template: the beginning of a conversation must be written as within the whole, got another after "
            f"{tokenizer.decode(ids[max(0, same - 8) : same])!r} for the first {n} messages of {example.id}; use a template "
            "that marks the assistant's turns with {% generation %}, or rows with one assistant's turn"
        )
    return begin


def _tokens(example: Example, tokenizer: Any, turns: Sequence[tuple[str, str]], **how: Any) -> list[int]:
    return list(_written(example, tokenizer, turns, return_dict=True, **how)["input_ids"])


def _written(example: Example, tokenizer: Any, turns: Sequence[tuple[str, str]], **how: Any) -> Any:
    if not tokenizer.chat_template:
        raise UserError(
            f"chat template: a conversation needs a tokenizer that has one, got none in {type(tokenizer).__name__} for "
            f"{example.id}; take an instruction-tuned model, give the tokenizer's folder a chat_template.jinja, or write "
            "rows with instruction and output"
        )
    write = partial(tokenizer.apply_chat_template, date_string=DATE, **how)
    try:
        return write([{"role": role, "content": content} for role, content in turns])
    except TemplateError as error:
        said = f"{', '.join(role for role, _ in turns)} ({error})"
        raise UserError(f"chat template: it must take a conversation's roles, got {said} in {example.id}") from error
