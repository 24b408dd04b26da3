"""Tables: drawn on a terminal, plain lines for whatever reads on."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from highrank.base.console import console


def show(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """Prints rows; where nobody looks, as lines of tab-separated values below the columns' names, without the title."""
    if not console.is_terminal:
        for row in [columns, *rows]:
            print("\t".join(" ".join(str(value).split()) for value in row))
        return
    console.print(drawn(columns, rows, title))


def show_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Prints what is known of one thing, a line each: `name: value` where nobody looks."""
    if console.is_terminal:
        console.print(drawn(["", ""], facts))
        return
    for name, value in facts:
        print(f"{name}: {value}")


def drawn(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> Table:
    """Returns rows as a table for a terminal; a cell may be a rich text."""
    table = Table(*columns, title=title, title_justify="left", show_header=any(columns))
    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*(value if isinstance(value, Text) else Text(str(value)) for value in row))
    return table
