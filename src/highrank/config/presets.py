"""Where presets lie; imports nothing that takes time, since completing a word needs it."""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import PurePath

CONFIGS = "highrank.configs"


def preset_texts(group: str) -> Iterator[tuple[str, str]]:
    """Yields the name and the text of every YAML of a config group, those in folders as `folder/name`."""
    folders = [("", files(CONFIGS) / group)]
    while folders:
        start, folder = folders.pop(0)
        for entry in sorted(folder.iterdir(), key=lambda each: each.name):
            if entry.is_dir() and not entry.name.startswith("_"):
                folders.append((f"{start}{entry.name}/", entry))
            elif entry.name.endswith(".yaml"):
                yield start + PurePath(entry.name).stem, entry.read_text(encoding="utf-8")
