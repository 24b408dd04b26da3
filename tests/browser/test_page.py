"""What a person sees in the report's page, on a desk and on a phone."""

import pytest

pytestmark = pytest.mark.browser
WIDTHS = [1280, 390]


@pytest.fixture(scope="module")
def page(sweep, tmp_path_factory):
    """Returns the address of the sweep's report."""
    from highrank.cli import main

    folder = tmp_path_factory.mktemp("report")
    assert main(["report", str(sweep), "--out", str(folder)]) == 0
    return (folder / "index.html").as_uri()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_stands_alone_and_fits(browser, page, width):
    browser.open(page, width)
    assert browser.find("h1")
    assert browser("return document.documentElement.scrollWidth") <= width
    assert browser.errors() == []
    assert browser.origins() == set()
    tables = browser.find("table")
    assert tables
    # a table or wide figure may scroll within its frame; nothing else sticks out
    out = """
      const within = (node) => node.closest('.scroll, nav, figure.panels, svg');
      return [...document.body.querySelectorAll('*')].filter((node) =>
        !within(node) && node.getBoundingClientRect().right > innerWidth + 1).map((node) => node.outerHTML.slice(0, 80))
    """
    assert browser(out) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_figures_are_drawn(browser, page, width):
    browser.open(page, width)
    figures = browser.find("figure")
    assert figures
    for figure in figures:
        (drawing,) = figure.find_elements("tag name", "svg")
        size = drawing.rect
        assert size["width"] > 200
        assert size["height"] > 100
        assert browser("return arguments[0].getBBox().width", drawing) > 0
        assert figure.find_element("tag name", "figcaption").text


@pytest.mark.parametrize("width", WIDTHS)
def test_a_click_sorts_a_table(browser, page, width):
    browser.open(page, width, height=900)
    if width > 600:
        browser.keep("report")
    table = browser.find("table")[0]
    column = next(place for place, head in enumerate(heads(table)) if "key" not in (head.get_attribute("class") or ""))
    seen = []
    for order in ("descending", "ascending"):
        button = heads(table)[column].find_element("tag name", "button")
        browser("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", button)
        button.click()
        assert heads(table)[column].get_attribute("aria-sort") == order
        values = [float(value) for value in data(table, column) if value]
        assert values == sorted(values, reverse=order == "descending")
        seen.append(rows(table))
    assert sorted(seen[0]) == sorted(seen[1])
    names = next(place for place, head in enumerate(heads(table)) if place != column)
    button = heads(table)[names].find_element("tag name", "button")
    browser("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", button)
    button.click()
    assert data(table, names) == sorted(data(table, names))
    assert heads(table)[column].get_attribute("aria-sort") is None
    assert browser.errors() == []


def heads(table):
    return table.find_elements("css selector", "thead th")


def data(table, column):
    cells = table.find_elements("css selector", f"tbody.arms tr > :nth-child({column + 1})")
    return [cell.get_attribute("data-value") for cell in cells]


def rows(table):
    return [row.text for row in table.find_elements("css selector", "tbody.arms tr")]
