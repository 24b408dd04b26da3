"""Draws the README's badges of what the repository itself says: `python docs/badges.py` writes docs/images/badge_*.svg.

They are files, not a service: the license and what was tried do not change between commits, and whether the last check
passed is said where checks run. A test compares them.
"""

import re
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDE = 6.2
"""Pixels of a letter."""


def said() -> dict[str, str]:
    """Returns what the badges say: left -> right."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tried = (ROOT / "docs" / "compatibility.md").read_text()
    versions = re.findall(r"on Python (3\.\d+)|\| Python \| (3\.\d+)\.\d+ \|.*\| holds \|", tried)
    pythons = sorted({"".join(version) for version in versions}, key=lambda version: int(version[2:]))
    return {"license": project["license"], "python": " | ".join(pythons), "checks": ".ci/run"}


def drawn(left: str, right: str) -> str:
    sizes = [round(WIDE * len(text)) + 10 for text in (left, right)]
    words = "".join(
        f'<text x="{at}" y="14" textLength="{size - 10}">{escape(text)}</text>'
        for text, at, size in ((left, 5, sizes[0]), (right, sizes[0] + 5, sizes[1]))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{sum(sizes)}" height="20" role="img" '
        f'aria-label="{escape(left)}: {escape(right)}">'
        f'<rect width="{sum(sizes)}" height="20" rx="3" fill="#0a6aa8"/>'
        f'<path d="M3 0h{sizes[0] - 3}v20H3a3 3 0 0 1-3-3V3a3 3 0 0 1 3-3z" fill="#444"/>'
        f'<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">{words}</g></svg>\n'
    )


def badges() -> dict[str, str]:
    return {f"badge_{left}.svg": drawn(left, right) for left, right in said().items()}


if __name__ == "__main__":
    for name, text in badges().items():
        (ROOT / "docs" / "images" / name).write_text(text)
