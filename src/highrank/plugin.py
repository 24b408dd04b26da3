"""The door for plugins: all that a method or a task of one's own needs of HighRank, wherever it is kept inside."""

from highrank.base.errors import UserError
from highrank.base.registry import load, register_method, register_task
from highrank.data.sources import Source, find
from highrank.data.task import DataConfig, Example, FileTask, LabelledText, Task, label_of, one_of
from highrank.model.method import Method, Site, kaiming_uniform_
from highrank.model.transformers_internals import (
    by_name,
    cache_name,
    cache_of,
    decoder_of,
    kept_shapes,
    setting,
    text_config,
    with_cache,
)
from highrank.model.weight_adapters import FullAdapters
from highrank.model.whole_model import VirtualTokens, WholeModelMethod, is_start, make_room

__all__ = [
    "DataConfig",
    "Example",
    "FileTask",
    "FullAdapters",
    "LabelledText",
    "Method",
    "Site",
    "Source",
    "Task",
    "UserError",
    "VirtualTokens",
    "WholeModelMethod",
    "by_name",
    "cache_name",
    "cache_of",
    "decoder_of",
    "find",
    "is_start",
    "kaiming_uniform_",
    "kept_shapes",
    "label_of",
    "load",
    "make_room",
    "one_of",
    "register_method",
    "register_task",
    "setting",
    "text_config",
    "with_cache",
]
