"""HighRank: parameter-efficient fine-tuning methods, each in one file, compared fairly.

    import highrank

    adapters = highrank.attach(model, "hira", placement="fc_qkv", r=16)
    model, tokenizer, adapters = highrank.load("outputs/.../RUN")
    adapters = highrank.load_adapter(model, "folder")
    highrank.methods()

What is behind these names is in `highrank.library`, read when one of them is first used: importing `highrank` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from highrank.library import Loaded as Loaded
    from highrank.library import attach as attach
    from highrank.library import load as load
    from highrank.library import load_adapter as load_adapter

__version__ = "0.1.0"

_LIBRARY = ("attach", "load", "load_adapter", "Loaded")


def __getattr__(name: str) -> Any:
    if name in _LIBRARY:
        return getattr(importlib.import_module("highrank.library"), name)
    if name == "methods":
        return importlib.import_module("highrank.methods")
    raise AttributeError(f"module 'highrank' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LIBRARY, "methods"})
