"""Makes the site: README, docs, experiments, a page per method, and the API reference of the docstrings:

    python docs/website.py FOLDER

All of it is pdoc's: its Markdown, its frame, its style. A page keeps its place in the repository, a README is its folder's
`index.html`, and a file that is linked and is no page is copied. What the reference knows is linked where it is named in
code, `highrank.load`. Diagrams are drawn by Mermaid, which a page that has one fetches; without a network their text
stands there. A warning is an error, and so is a link, an anchor or such a name that leads nowhere.
"""

import functools
import importlib
import inspect
import os
import pkgutil
import re
import runpy
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pdoc
from pdoc.render_helpers import to_html

import highrank
import highrank.model

ROOT = Path(__file__).resolve().parents[1]
METHODS = runpy.run_path(str(ROOT / "docs" / "methods.py"))
PAPERS = "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "experiments/**/*.md"
"""The files that are pages."""
GROUPS = {
    "Start": ("README.md", "docs/guide.md", "docs/finding.md", "docs/library.md"),
    "Compare": (
        "docs/methods.md",
        "docs/tasks.md",
        "docs/sweeps.md",
        "docs/report.md",
        "docs/dashboard.md",
        "docs/analysis.md",
    ),
    "Use": ("docs/export.md", "docs/serving.md", "docs/devices.md", "docs/resume.md", "docs/security.md"),
}
"""The first groups of the navigation; the other pages of docs/ come after them, then experiments and methods."""
REFERENCE = "reference/highrank.html"


def texts() -> dict[str, str]:
    """Returns place in the repository -> Markdown, of every page; a method's is made of its file."""
    found = {
        path.relative_to(ROOT).as_posix(): path.read_text() for pattern in PAPERS for path in sorted(ROOT.glob(pattern))
    }
    for names in METHODS["FAMILIES"].values():
        found |= {f"methods/{name}.py": METHODS["own_page"](name) for name in names}
    return found


def address(place: str) -> str:
    """Returns where a page stands in the site."""
    folder, name = os.path.split(place)
    return os.path.join(folder, "index.html" if name == "README.md" else f"{Path(name).stem}.html")


def between(start: str, target: str) -> str:
    """Returns the relative link from one file of the site to another."""
    return os.path.relpath(target, os.path.dirname(start) or ".")


def title(text: str) -> str:
    return text.partition("\n")[0].removeprefix("# ").replace("`", "")


def label(place: str, text: str) -> str:
    """Returns what the navigation calls a page."""
    return Path(place).stem if place.startswith("methods/") else title(text)


def contents(html: str) -> str:
    """Returns the list of the headings below a page's title, of what pdoc's Markdown gives."""
    below = re.search(r"<li>.*?(<ul>.*</ul>)\s*</li>", getattr(html, "toc_html", None) or "", re.DOTALL)
    return below[1] if below else ""


def navigation(pages: Mapping[str, str]) -> dict[str, list[str]]:
    """Returns the groups of the navigation: title -> pages."""
    placed = {place for places in GROUPS.values() for place in places}
    groups = {name: list(places) for name, places in GROUPS.items()}
    groups["More"] = [place for place in pages if "/" not in place or place.startswith("docs/")]
    groups["More"] = [place for place in groups["More"] if place not in placed]
    groups["Experiments"] = [place for place in pages if place.startswith("experiments/")]
    for family, names in METHODS["FAMILIES"].items():
        groups[family] = [f"methods/{name}.py" for name in names]
    return groups


def linked(html: str, place: str, pages: Mapping[str, str], folder: Path) -> str:
    """Returns a page's HTML with its links led to the site; files that they name are copied."""
    here = address(place)

    def link(found: re.Match[str]) -> str:
        attribute, target, anchor = found[1], unquote(found[2]), found[3] or ""
        inside = os.path.normpath(os.path.join(os.path.dirname(place), target))
        if inside in pages:
            target = between(here, address(inside))
        elif (ROOT / inside).is_file():
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / inside, folder / inside)
            target = between(here, inside)
        return f'{attribute}="{target}{anchor}"'

    def name(found: re.Match[str]) -> str:
        thing = pkgutil.resolve_name(found[1])
        module, inside = (
            (thing.__name__, "") if inspect.ismodule(thing) else (thing.__module__, f"#{thing.__qualname__}")
        )
        target = os.path.join("reference", *module.split(".")) + f".html{inside}"
        return f'<a href="{between(here, target)}">{found[0]}</a>'

    html = re.sub(r'\b(href|src)="(?!\w+:)([^"#]+)(#[^"]*)?"', link, html)
    return re.sub(r"<code>(highrank(?:\.\w+)+)(?:\([^<]*\))?</code>(?!</a>)", name, html)


def write_pages(folder: Path) -> None:
    pages = texts()
    groups = navigation(pages)
    template = pdoc.render.env.get_template("page.html.jinja2")
    for place, text in pages.items():
        html, here = to_html(text), address(place)
        shown = {
            group: [(label(each, pages[each]), between(here, address(each)), each == place) for each in places]
            for group, places in groups.items()
        }
        page = template.render(
            title=title(text),
            html=linked(html, place, pages, folder),
            contents=contents(html),
            groups=shown,
            reference=between(here, REFERENCE),
            mermaid='class="mermaid"' in html,
        )
        (folder / here).parent.mkdir(parents=True, exist_ok=True)
        (folder / here).write_text(page)


def read(file: Path) -> tuple[list[str], set[str]]:
    """Returns a page's links, and the names that links can lead to."""
    html = re.sub(r"<script.*?</script>", "", file.read_text(), flags=re.DOTALL)
    return re.findall(r'\b(?:href|src)="([^"]*)"', html), set(re.findall(r'\b(?:id|name)="([^"]+)"', html))


def unlink(folder: Path) -> None:
    """Makes text of the links within a page of the reference to what is not on it: names in docstrings that torch hands down."""
    for file in folder.rglob("*.html"):
        names = read(file)[1]
        keep = functools.partial(lambda found, names: found[0] if found[1] in names else found[2], names=names)
        file.write_text(re.sub(r'<a href="#([^"]+)">(.*?)</a>', keep, file.read_text()))


def broken(folder: Path) -> Iterator[str]:
    """Yields the links within a site that lead nowhere."""
    pages = {file: read(file) for file in sorted(folder.rglob("*.html"))}
    for file, (links, _) in pages.items():
        for link in links:
            path, _, anchor = unquote(link).partition("#")
            target = Path(os.path.normpath(file.parent / path)) if path else file
            if re.match(r"\w+:", link) or (not anchor and target.is_file()):
                continue
            if target not in pages or anchor not in pages[target][1]:
                yield f"{file.relative_to(folder)}: its links must lead somewhere, got {link}"


def open_library() -> list[str]:
    """Puts what `highrank` gives only when it is asked for on its page of the reference; returns the names."""
    entries = {name: getattr(highrank, name) for name in highrank._LIBRARY}
    vars(highrank).update(entries)
    highrank.__all__ = [*entries, *_modules(highrank), "methods"]
    if find_spec("triton") is None:  # it comes with PyTorch's builds for a GPU
        highrank.model.__all__ = [name for name in _modules(highrank.model) if name != "triton_kernels"]
    return list(entries)


def import_all() -> None:
    """Imports all of `highrank` while warnings are none of ours: other packages' first words are no fault of the site."""
    for module in pkgutil.walk_packages(highrank.__path__, "highrank."):
        if module.name != "highrank.model.triton_kernels":
            importlib.import_module(module.name)


def _modules(package: Any) -> list[str]:
    return [module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")]


def main(folder: Path) -> None:
    pdoc.render.configure(docformat="google", template_directory=ROOT / "docs" / "templates")
    entries = open_library()
    import_all()
    warnings.simplefilter("error")
    # What torch gives every subclass of Tensor has no source.
    warnings.filterwarnings("ignore", message=r"Cannot determine where highrank\.model\.quantised\.QuantisedWeight\.")
    # The methods are found among the names of highrank, the tasks are not.
    pdoc.pdoc("highrank", "highrank.tasks", output_directory=folder / "reference")
    said = {
        "highrank": entries,
        "highrank/model/adapters": [
            f"Adapters.{name}" for name in ("save", "merge", "unmerge", "disabled", "delta_weight", "parameter_groups")
        ],
        "highrank/methods": ["Methods"],
    }
    for page, names in said.items():
        known = read(folder / "reference" / f"{page}.html")[1]
        if missing := [name for name in names if name not in known]:
            sys.exit(f"{page}: the reference must have an entry for each name of the library, got none for {missing}")
    unlink(folder / "reference")
    write_pages(folder)
    if lost := list(broken(folder)):
        sys.exit("\n".join(lost))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: website.py FOLDER")
    main(Path(sys.argv[1]).resolve())
