"""docs/methods.md: every method is on it, and every special case that it draws is a test."""

import ast
import re
import runpy
from pathlib import Path

import pytest

from highrank.base.registry import available, load
from highrank.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "docs" / "methods.py"))


def test_the_page_is_made_of_the_methods_as_they_are(script):
    assert (ROOT / "docs" / "methods.md").read_text() == script["page"](), "make it again: docs/methods.py"


def test_every_method_has_one_place(script):
    placed = [name for names in script["FAMILIES"].values() for name in names]
    shipped = {name for name, module in available("methods").items() if module.startswith("highrank.")}
    assert sorted(placed) == sorted(shipped)


def test_every_special_case_is_a_test(script):
    for inner, outer, _, where in script["CASES"]:
        file, _, test = where.partition("::")
        text = (ROOT / "tests" / "methods" / file).read_text()
        functions = {
            f.name: ast.get_source_segment(text, f) for f in ast.parse(text).body if isinstance(f, ast.FunctionDef)
        }
        assert {inner, outer} <= available("methods").keys()
        assert test in functions, where
        for name in (inner, outer):  # the method that a file tests may be made by a helper of it
            assert f'"{name}"' in functions[test] or file == f"test_{name}.py", (name, where)


@pytest.mark.parametrize(
    "name", [name for name in available("methods") if load("methods", name).family.changes_weights]
)
def test_a_method_states_its_formula_count_rank_and_source(script, name):
    text = script["said"](name)
    assert script["formula"](text)
    assert "Trainable: " in text
    assert script["rank"](text)
    assert "\nSource: " in text


@pytest.mark.parametrize("name", ["hira", "sum", "p_tuning"])
def test_a_methods_own_page_says_what_the_command_says(script, name, capsys):
    assert main(["methods", name]) == 0
    page, said = script["own_page"](name), capsys.readouterr().out
    plain = " ".join(re.sub(r"\[(arXiv [\d.]+)\]\(https[^)]*\)", r"\1", page).split())
    assert script["said"](name).partition(".")[0] in page
    for paragraph in script["said"](name).split("\n\n")[1:]:
        assert " ".join(paragraph.split()) in plain
    for line in said.splitlines():
        if "\t" in line and not line.startswith("field\t"):
            field, *_, rules = line.split("\t")
            assert f"| `{field}` |" in page
            assert rules.replace("|", "\\|") in page
    for fact in ("trains", "learning rate", "can be merged", "in PEFT", "example"):
        value = re.search(rf"^{fact}: (.*)$", said, re.MULTILINE)[1]
        assert value in page


def test_a_methods_own_page_names_its_special_cases(script):
    page = script["own_page"]("hira")
    assert "- It is a special case of [`boha`](boha.py): one block" in page
    assert "- [`hyperadapt`](hyperadapt.py) is a special case of it: r = 2" in page
    assert "[arXiv 2509.18629](https://arxiv.org/abs/2509.18629)" in script["own_page"]("hyperadapt")
