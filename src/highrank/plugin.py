"""What plugins import: all that a method or a task of one's own needs of HighRank, wherever it is kept inside."""

from highrank.base.errors import UserError
from highrank.base.fields import dataclass_from
from highrank.base.files import path_field, shown
from highrank.base.registry import later_field, load, register_method, register_task
from highrank.data.chat import messages_of
from highrank.data.images import check_image
from highrank.data.sources import Source, as_text, find, text_of
from highrank.data.task import DataConfig, Example, FileTask, LabelledImage, LabelledText, Task, label_of, one_of
from highrank.model.method import Method, Site, kaiming_uniform_
from highrank.model.peft_form import PeftForm
from highrank.model.sizes import DoesNotFit, nearest_divisors
from highrank.model.transformers_internals import (
    by_name,
    cache_name,
    cache_of,
    decoder_of,
    kept_shapes,
    setting,
    text_config,
    with_cache,
    without_cache,
)
from highrank.model.weight_adapters import FullAdapters
from highrank.model.whole_model import VirtualTokens, WholeModelMethod, is_start, make_room

__all__ = [
    "DataConfig",
    "DoesNotFit",
    "Example",
    "FileTask",
    "FullAdapters",
    "LabelledImage",
    "LabelledText",
    "Method",
    "PeftForm",
    "Site",
    "Source",
    "Task",
    "UserError",
    "VirtualTokens",
    "WholeModelMethod",
    "as_text",
    "by_name",
    "cache_name",
    "cache_of",
    "check_image",
    "dataclass_from",
    "decoder_of",
    "find",
    "is_start",
    "kaiming_uniform_",
    "kept_shapes",
    "label_of",
    "later_field",
    "load",
    "make_room",
    "messages_of",
    "nearest_divisors",
    "one_of",
    "path_field",
    "register_method",
    "register_task",
    "setting",
    "shown",
    "text_config",
    "text_of",
    "with_cache",
    "without_cache",
]
