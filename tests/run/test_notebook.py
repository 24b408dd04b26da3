"""docs/quickstart.ipynb runs, and says what it shows; in this process, since a kernel costs 25 packages and ten seconds.

Made anew with Jupyter: jupyter nbconvert --to notebook --execute --inplace docs/quickstart.ipynb
"""

import json
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

DOCS = Path(__file__).parents[2] / "docs"
CELLS = json.loads((DOCS / "quickstart.ipynb").read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def shown(cell):
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def assert_says(found, expected):
    """Compares two texts: words and whole numbers exactly, those with a point within 5 % and 0.05."""
    assert NUMBER.sub("#", found) == NUMBER.sub("#", expected)
    for a, b in zip(NUMBER.findall(found), NUMBER.findall(expected), strict=True):
        assert a == b or ("." in a and float(a) == pytest.approx(float(b), rel=0.05, abs=0.05)), found


def test_the_notebook_says_what_it_shows(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    import matplotlib.pyplot as plt

    plt.close("all")
    names: dict = {}
    for cell in CODE:
        out = StringIO()
        with redirect_stdout(out):
            exec(compile("".join(cell["source"]), "quickstart.ipynb", "exec"), names)
        assert_says(out.getvalue(), shown(cell))
    assert len(plt.get_fignums()) == 1
    for axes in names["figure"].axes:
        assert len(axes.lines) == len(names["trained"]) == 3
    plt.close("all")


def test_the_notebook_is_executed_small_and_its_links_hold():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert {output["name"] for output in outputs if "name" in output} == {"stdout"}
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 1
    assert (DOCS / "quickstart.ipynb").stat().st_size < 100_000
    said = "".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\((.*?)\)", said)
    assert links
    assert all((DOCS / link).is_file() for link in links)
