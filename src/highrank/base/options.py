"""Parses a command's words: options, folders and key=value."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from highrank.base.errors import UserError


class Words(argparse.ArgumentParser):
    """Parses a command's words; what is wrong with them is a UserError with the usage."""

    def __init__(self, command: str, usage: str):
        super().__init__(prog=command, usage=f"highrank {command} {usage}", add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; use: {self.usage}")

    def options(self, words: Sequence[str], folders: str) -> Any:
        """Returns the options of a command that takes folders only, as `folders`."""
        self.add_argument(folders, nargs="+", type=Path)
        return self.parse_args(list(words))

    def split(self, words: Sequence[str]) -> tuple[Any, list[str], list[str]]:
        """Returns the options, the folders, and the key=value words; a word that names a folder is one."""
        self.add_argument("given", nargs="*")
        options = self.parse_intermixed_args(list(words))
        rest = [word for word in options.given if re.match(r"[\w.+]+=", word) and not Path(word).is_dir()]
        folders = [word for word in options.given if word not in rest]
        if not folders:
            self.error(f"a folder is needed, got {' '.join(words) or 'nothing'}")
        return options, folders, rest

    def one(self, words: Sequence[str]) -> tuple[Any, str, list[str]]:
        options, folders, rest = self.split(words)
        if len(folders) > 1:
            self.error(f"one folder is needed, got {' '.join(folders)}")
        return options, folders[0], rest
