"""What a person sees in TensorBoard after a sweep."""

import json

import pytest

pytestmark = pytest.mark.browser


@pytest.fixture
def plan(sweep):
    """Returns the sweep's plan, with the cells that are done."""
    found = json.loads((sweep / "sweep.json").read_text())
    done = [cell for cell in found["cells"] if results(sweep, cell["run"])["status"] == "done"]
    return {**found, "cells": done}


def results(sweep, run):
    file = sweep / run / "results.json"
    return json.loads(file.read_text()) if file.is_file() else {"status": "missing"}


def table(browser):
    """Returns the HPARAMS table as it stands on the screen: {first column: {header: text}}."""
    box = "return arguments[0].map((cell) => [cell.getBoundingClientRect(), cell.innerText.trim()])"
    cells = browser(box, browser.find("vaadin-grid-cell-content"))
    placed = [(place["y"], place["x"], text) for place, text in cells if text]
    left = {x: text for _, x, text in placed if text in ("Trial ID", "Show Metrics")}
    if not left:
        return {}
    trial = min(left)
    top = next(y for y, x, text in placed if x == trial)
    headers = {x: text for y, x, text in placed if abs(y - top) < 20}
    runs = {y: text for y, x, text in placed if x == trial and y > top}
    return {
        run: {headers[x]: text for y, x, text in placed if y == at and x in headers and x != trial}
        for at, run in runs.items()
    }


def test_hparams(browser, tensorboard, sweep, plan):
    browser.open(f"{tensorboard}#hparams", width=2400, height=400 + 40 * len(plan["cells"]))
    runs = {cell["run"] for cell in plan["cells"]}
    shown = browser.wait(lambda: found if runs <= set(found := table(browser)) else None)
    for cell in plan["cells"]:
        row, final = shown[cell["run"]], results(sweep, cell["run"])
        rounded = 1e-4  # five digits are shown
        for key in sorted(plan["axes"])[:5]:  # TensorBoard shows five until a person ticks more
            value = cell["axes"].get(key)
            try:
                assert float(row[key]) == pytest.approx(float(value), rel=rounded)
            except (KeyError, ValueError):
                assert row.get(key) == value
        for metric in set(final["metrics"]["final"]) - {"sets"}:
            assert float(row[metric]) == pytest.approx(final["metrics"]["final"][metric], rel=rounded)
        assert float(row["trainable"]) == pytest.approx(final["params"]["trainable"], rel=rounded)
        assert float(row["total_s"]) == pytest.approx(final["time"]["total_s"], rel=rounded)
    assert browser.errors() == []
    assert browser.origins() == {tensorboard.rstrip("/")}

    browser.open(f"{tensorboard}#hparams", width=1400, height=560)
    browser.wait(lambda: table(browser))
    browser.keep("tensorboard")


def test_custom_scalars(browser, tensorboard, sweep, plan):
    browser.open(f"{tensorboard}#custom_scalars", width=1400, height=3000)
    sets = results(sweep, plan["cells"][0]["run"])["metrics"]["final"]["sets"]

    def charts():
        cards = browser.find("tf-custom-scalar-multi-line-chart-card")
        return {card.text.partition("\n")[0]: card for card in cards if "Matches (" in card.text}

    def lines(title):
        inside = "return arguments[0].shadowRoot.querySelector('tf-line-chart-data-loader').shadowRoot"
        inside += ".querySelector('vz-line-chart2').shadowRoot.querySelectorAll('.line-plot:not(.ghost) path.line')"
        return browser(f"{inside}.length", charts()[title])

    wanted = {"loss", "macro average", *sets, "trainable", "total_s"}
    browser.wait(lambda: wanted <= set(charts()))
    for title in ("loss", "macro average", "trainable"):
        browser.wait(lambda title=title: lines(title) >= len(plan["cells"]))
    assert browser.errors() == []
    assert browser.origins() == {tensorboard.rstrip("/")}


def test_training_curves(browser, tensorboard, plan):
    browser.open(f"{tensorboard}?tagFilter=train%2Floss#timeseries", width=1400)
    (card,) = browser.wait(lambda: browser.find("scalar-card"))
    browser.wait(lambda: all(cell["run"] in card.text for cell in plan["cells"]))
    assert card.find_elements("css selector", "line-chart")[0].is_displayed()
    assert browser.errors() == []
    assert browser.origins() == {tensorboard.rstrip("/")}
