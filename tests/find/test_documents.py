"""The Markdown files are true: links lead somewhere, the files, commands, options and keys that they name are there."""

import re
import runpy
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from highrank.base.registry import available
from highrank.cli import COMMANDS
from highrank.config.words import compose_run
from highrank.find.completion import offered

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/**/*.md")])
FOLDERS = "src", "methods", "tasks", "configs", "docs", "tests", "experiments"
PLACEHOLDER = re.compile(r"[$<]|\.\.\.|^key=|^cases=")
"""In a word that stands for a reader's own, or that completion leaves to the reader."""
KEY = re.compile(r"[a-z]\w*(\.\w+)*=")
TAKE_KEYS = "run", "eval", "merge", "export"


def named(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


def without_code(text):
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(page):
    """Returns the names that GitHub gives the headings of a page."""
    headings = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@named(PAGES)
def test_links_lead_to_a_file_and_a_heading_of_it(page):
    text = without_code(page.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text):
        path, _, anchor = "".join(link).partition("#")
        if re.match(r"https://", path):
            continue
        target = page.parent / path if path else page
        assert target.is_file(), f"{page.name}: {path}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {path}#{anchor}"


@named(PAGES)
def test_files_named_in_code_are_there(page):
    for code in re.findall(r"`([^`\n]+)`", page.read_text()):
        for path in re.findall(rf"(?<![\w/.])(?:{'|'.join(FOLDERS)})/[\w./*-]+(?![\w./*<{{-])", code):
            found = [*ROOT.glob(path.rstrip("/.")), *(ROOT / "tests").glob(path.rstrip("/."))]
            assert found, f"{page.name}: {path}"


def commands(page):
    """Yields the words of the commands in a page's blocks and in its text."""
    text = page.read_text()
    blocks = "\n".join(re.findall(r"^ *```bash\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
    inline = re.findall(r"`([^`]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE))
    for line in [*blocks.splitlines(), *inline]:
        begun = re.match(r"\s*(?:[A-Z_]+=\S+ )*(python run\.py|highrank) +(.+)", line, re.DOTALL)
        if begun:
            words = shlex.split(re.split(r"[;|>]|&& ", begun[2])[0], comments=True)
            optional = [word.strip("[]") if re.match(r"\[--|[^=\[]+\]$", word) else word for word in words]
            yield (["run"] if begun[1] == "python run.py" else []) + optional


def words_offered(line):
    return {offer.word for offer in offered(line)}


def check_key(command, before, word):
    """Holds that a key could be typed where it stands; `eval` knows the run's task, and so takes those of any."""
    key = word.partition("=")[0]
    tasks = ["task=wordmath"]
    if command == "eval" and key.startswith("task.") and not any(each.startswith("task=") for each in before):
        tasks = [f"task={name}" for name in available("tasks")]
    start = shlex.join(["highrank", "run", *(each for each in before if "=" in each)])
    lines = [
        f"{start} {task} {key}" if key.startswith("task.") and command == "eval" else f"{start} {key}" for task in tasks
    ]
    assert any(f"{key}=" in words_offered(line) for line in lines), f"{command}: {key} is no key, in {word}"


@named(PAGES)
def test_commands_options_and_keys_are_there(page):
    for command, *words in commands(page):
        assert command in COMMANDS or PLACEHOLDER.search(command), f"no such command: {command}"
        line = shlex.join(["highrank", command])
        ours = {"-m", "--help"} | (
            words_offered(f"{line} --") if any(word.startswith("--") for word in words) else set()
        )
        chosen = [name for word in words if word.startswith("method=") for name in word.partition("=")[2].split(",")]
        if not available("methods").keys() >= set(chosen):
            continue  # a plugin's, whose fields its own page has
        for at, word in enumerate(words):
            if word.startswith("-"):
                assert word in ours, f"{command}: {word} is no option"
            elif KEY.match(word) and command in TAKE_KEYS and not PLACEHOLDER.search(word):
                check_key(command, words[:at], word)


def runs():
    """Returns the single runs that the documents name and that stand for themselves."""
    found = {
        tuple(words) for page in PAGES if page.parent.name == "docs" for words in commands(page) if words[0] == "run"
    }
    own = re.compile(PLACEHOLDER.pattern + "|^-|^start_from=")
    return sorted(words[1:] for words in found if not any(own.search(word) for word in words))


@pytest.mark.parametrize("words", runs(), ids=" ".join)
def test_runs_compose(words):
    compose_run(words)


def test_badges_say_what_the_repository_says():
    made = runpy.run_path(str(ROOT / "docs" / "badges.py"))["badges"]()
    assert {path.name: path.read_text() for path in ROOT.glob("docs/images/badge_*")} == made, (
        "make them again: docs/badges.py"
    )
    assert set(re.findall(r"docs/images/(badge_\w+\.svg)", (ROOT / "README.md").read_text())) == made.keys()


def test_pictures_are_small():
    for path in [*ROOT.glob("docs/images/*"), ROOT / "experiments/hira/fig1_fig7_rank/results/rank_by_r.png"]:
        assert path.stat().st_size < 150_000, path.name


def test_citation():
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert said["cff-version"] == "1.2.0"
    assert (said["type"], said["version"], said["license"]) == ("software", project["version"], project["license"])
    assert said["abstract"] == project["description"]
    assert {"message", "title", "authors"} <= said.keys()
    readme = (ROOT / "README.md").read_text()
    for paper, names in zip(said["references"], (2, 5), strict=True):
        assert {"type", "title", "authors", "year", "url"} <= paper.keys()
        assert [author.keys() for author in paper["authors"]] == [{"family-names", "given-names"}] * names
        assert paper["title"] in readme
        assert paper["authors"][0]["family-names"] in readme
        assert paper["url"] in readme
