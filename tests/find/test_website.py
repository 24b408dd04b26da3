"""docs/website.py: pages keep their places, links lead to them, and one that leads nowhere is found. CI makes the whole site."""

import runpy
from pathlib import Path

import pytest

pytest.importorskip("pdoc", reason="no pdoc: pip install -e '.[test]'")
ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "# Start",
    "docs/guide.md": "# Guide",
    "experiments/README.md": "# Tables",
    "methods/hira.py": "# HiRA",
}


@pytest.fixture(scope="module")
def website():
    return runpy.run_path(str(ROOT / "docs" / "website.py"))


@pytest.mark.parametrize(
    ("place", "link", "leads"),
    [
        ("README.md", "docs/guide.md#placement", "docs/guide.html#placement"),
        ("docs/guide.md", "../README.md", "../index.html"),
        ("docs/guide.md", "../methods/hira.py", "../methods/hira.html"),
        ("docs/guide.md", "../experiments/README.md", "../experiments/index.html"),
        ("docs/guide.md", "#here", "#here"),
        ("docs/guide.md", "https://arxiv.org/abs/1#x", "https://arxiv.org/abs/1#x"),
        ("README.md", "docs/nowhere.md", "docs/nowhere.md"),
    ],
)
def test_links_lead_to_pages(website, tmp_path, place, link, leads):
    assert website["linked"](f'<a href="{link}">x</a>', place, PAGES, tmp_path) == f'<a href="{leads}">x</a>'


def test_a_file_that_is_no_page_is_copied(website, tmp_path):
    html = '<img src="images/report.png"><a href="../LICENSE">x</a>'
    assert website["linked"](html, "docs/guide.md", PAGES, tmp_path) == html
    assert (tmp_path / "docs/images/report.png").read_bytes() == (ROOT / "docs/images/report.png").read_bytes()
    assert (tmp_path / "LICENSE").is_file()


@pytest.mark.parametrize(
    ("code", "leads"),
    [
        ('highrank.attach(model, "hira")', "highrank/library.html#attach"),
        ("highrank.report.dashboard", "highrank/report/dashboard.html"),
        ("highrank.base.errors.UserError", "highrank/base/errors.html#UserError"),
    ],
)
def test_names_in_code_lead_to_the_reference(website, tmp_path, code, leads):
    html = f"<code>{code}</code>"
    assert website["linked"](html, "docs/guide.md", PAGES, tmp_path) == f'<a href="../reference/{leads}">{html}</a>'


def test_a_name_that_is_none_is_an_error(website, tmp_path):
    with pytest.raises(AttributeError, match="atach"):
        website["linked"]("<code>highrank.atach(model)</code>", "docs/guide.md", PAGES, tmp_path)


def test_links_that_lead_nowhere_are_found(website, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "index.html").write_text(
        '<h1 id="top">x</h1><a href="#top"> <a href="docs/a.html#b"> <a href="https://x.y/#z">'
    )
    (tmp_path / "docs" / "a.html").write_text(
        '<h2 id="b">x</h2><a href="../index.html#no"> <img src="c.png"> <script>href="d"</script>'
    )
    assert list(website["broken"](tmp_path)) == [
        "docs/a.html: its links must lead somewhere, got ../index.html#no",
        "docs/a.html: its links must lead somewhere, got c.png",
    ]


def test_every_page_is_in_the_navigation_once(website):
    found = [path.relative_to(ROOT).as_posix() for pattern in website["PAPERS"] for path in ROOT.glob(pattern)]
    groups = website["navigation"](found)
    placed = [place for places in groups.values() for place in places]
    assert sorted(place for place in placed if place.endswith(".md")) == sorted(found)
    assert len(placed) == len(set(placed))
