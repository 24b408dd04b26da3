"""From primitives to a config dataclass, its types checked."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from highrank.base.errors import UserError, suggest

TINIEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""The least and the greatest that an fp32 number holds at its full precision."""


def dataclass_from(cls: type, values: Mapping[str, Any], owner: str, trained: bool = False) -> Any:
    """Returns an instance of a config dataclass from primitives, types checked and converted by OmegaConf.

    What the class itself asks for in `__post_init__` was asked before where it was `trained` with.

    Raises:
        UserError: for a key that the dataclass lacks, a value of another type, or a number that is not finite or that a tensor cannot hold.
    """
    schema: Any = OmegaConf.structured(cls)
    OmegaConf.set_readonly(schema, False)
    known = [f.name for f in dataclasses.fields(cls)]
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{owner} has no field {key!r}; it has: {', '.join(known) or 'none'}{_mean(key, known)}")
        try:
            schema = OmegaConf.merge(schema, {key: value})
        except OmegaConfBaseException as error:
            field = next(f for f in dataclasses.fields(cls) if f.name == key)
            kind = getattr(field.type, "__name__", str(field.type))
            raise UserError(f"{owner}: {key} must be of type {kind}, got {key}={value}") from error
        if isinstance(schema[key], float) and not math.isfinite(schema[key]):
            raise UserError(f"{owner}: {key} must be a finite number, got {key}={value}")
        if isinstance(schema[key], float) and schema[key] and not TINIEST <= abs(schema[key]) <= LARGEST:
            raise UserError(f"{owner}: {key} must be a number that fp32 holds, got {key}={value}")
        if isinstance(schema[key], int) and not -(2**63) <= schema[key] < 2**63:
            raise UserError(f"{owner}: {key} must be a number of 64 bits, got {key}={value}")
    missing = sorted(OmegaConf.missing_keys(schema))
    if missing:
        raise UserError(f"{owner}: {missing[0]} must be given, got none; it has: {', '.join(known)}")
    try:
        return OmegaConf.to_object(schema)
    except (UserError, OSError):
        if not trained:
            raise
    instance: Any = object.__new__(cls)
    for key in known:
        value = schema[key]
        object.__setattr__(instance, key, OmegaConf.to_object(value) if OmegaConf.is_config(value) else value)
    return instance


def _mean(key: str, known: Sequence[str]) -> str:
    near = suggest(key, known)
    return near if "mean" in near else ""
