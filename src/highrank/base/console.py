"""The terminal."""

from rich.console import Console

console = Console()


def say(line: str) -> None:
    """Prints one line at once and as it is, however long."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
