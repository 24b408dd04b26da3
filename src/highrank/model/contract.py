"""What is asked of a method's class when it registers, and of its adapters when they are attached; one clear line each."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from highrank.base.errors import UserError
from highrank.model.peft_form import PeftForm


def check_class(method: Any, base: type, *needed: str) -> None:
    """Checks what can be known of a method without making an adapter; `needed` are what it must define beyond `base`.

    Raises:
        UserError: for the first attribute that is not what the contract says.
    """

    def need(ok: bool, attribute: str, rule: str) -> None:
        if not ok:
            raise UserError(f"method {method.name}: {attribute} {rule}, got {attribute}={getattr(method, attribute)!r}")

    if not (inspect.isclass(method.config) and dataclasses.is_dataclass(method.config)):
        raise UserError(f"method {method.name}: its config is a dataclass, got config={method.config!r}; decorate it")
    for name in needed:
        if next(c for c in method.__mro__ if name in vars(c)) is base:
            raise UserError(f"method {method.name}: the class must define {name}, got none in {method.__qualname__}")
    if not isinstance(inspect.getattr_static(method, "num_trainable"), classmethod | staticmethod):
        raise UserError(
            f"method {method.name}: num_trainable must be a classmethod, got a plain function; put @classmethod above it"
        )
    family, fields = method.family, [field.name for field in dataclasses.fields(method.config)]
    need(inspect.isclass(family) and hasattr(family, "put_on"), "family", "is a class of adapters (leave it out)")
    need(_is_number(method.default_lr) and method.default_lr > 0, "default_lr", "is a positive number")
    need(_are_names(method.no_decay), "no_decay", 'is a tuple of parameter names, as ("a",)')
    factors = method.lr_factors
    factors_fit = isinstance(factors, Mapping) and _are_names(list(factors)) and all(map(_is_number, factors.values()))
    need(factors_fit, "lr_factors", 'maps parameter names to numbers, as {"B": 16.0}')
    examples = method.examples
    listed = isinstance(examples, Sequence) and len(examples) > 0 and all(isinstance(e, Mapping) for e in examples)
    need(listed, "examples", 'is a tuple of at least one mapping of fields, as ({"r": 2},)')
    need(method.peft is None or isinstance(method.peft, PeftForm), "peft", "is a PeftForm or None")
    named = {"examples": [key for example in examples for key in example], "peft": method.peft and method.peft.fields}
    for attribute, keys in named.items():
        if unknown := [key for key in keys or () if key not in fields]:
            raise UserError(
                f"method {method.name}: {attribute} name fields of its config, got {unknown[0]}; it has: "
                f"{', '.join(fields) or 'none'}"
            )


def check_adapter(method: Any, adapter: nn.Module, declared: int, place: str) -> None:
    """Compares a fresh adapter with what its class says of it: how many numbers train, and names of parameters.

    Raises:
        UserError: if they differ.
    """
    named = dict(adapter.named_parameters())
    actual = sum(parameter.numel() for parameter in named.values())
    if declared != actual:
        sizes = ", ".join(f"{name} {tuple(parameter.shape)}" for name, parameter in named.items())
        raise UserError(
            f"method {method.name}: num_trainable must be what trains, got {declared} for {actual} at {place} "
            f"({sizes or 'no parameters'}); correct the formula"
        )
    for attribute in ("no_decay", "lr_factors"):
        if unknown := [name for name in getattr(adapter, attribute) if name not in named]:
            raise UserError(
                f"method {method.name}: {attribute} names parameters, got {unknown[0]}; it has: {', '.join(named)}"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_names(value: object) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(name, str) for name in value)
