"""`highrank methods`, `tasks`, `models`, `protocols`, `experiments`: lists from the files, and one name's page."""

import re
import shlex

import pytest

from highrank.base import registry
from highrank.base.fields import dataclass_from
from highrank.base.source import Source
from highrank.config.presets import preset_texts
from highrank.config.words import _options, compose_run, key_of, packaged_configs, parse, register_configs
from highrank.find import catalogue

METHODS = sorted(registry.available("methods"))


def listed(out):
    return [line.split("\t") for line in out.splitlines()[1:]]


@pytest.mark.parametrize(
    ("command", "known"),
    [("methods", METHODS), ("tasks", sorted(registry.available("tasks")))],
)
def test_a_list_has_every_plugin_with_its_fields(command, known, highrank):
    status, out, _ = highrank(command)
    rows = listed(out)
    assert status == 0
    assert [row[0] for row in rows] == known
    assert all(row[1] for row in rows)


def test_the_list_of_methods_says_what_they_compute(highrank, terminal):
    _, out, _ = highrank("methods")
    assert "W' = W + R ⊙ (A B)" in out
    assert "r=16, R=w0, R_rank=null, official_numerics=false" in out
    assert "highrank methods NAME says more" in out


@pytest.mark.parametrize("group", ["model", "protocol", "experiment"])
def test_a_list_has_every_preset_with_what_it_is(group, highrank):
    rows = listed(highrank(f"{group}s")[1])
    names = [row[0] for row in rows if not row[0].startswith(("tiny_", "hf:"))]
    assert names == [name for name, _ in preset_texts(group)]
    assert all(re.search(r"\w{3}", row[-1 if group != "model" else 1]) for row in rows)


def test_presets_are_those_that_hydra_finds():
    register_configs()
    with packaged_configs():
        for group in ("protocol", "experiment", "trainer"):
            assert sorted(name for name, _ in preset_texts(group)) == sorted(_options(group))


def test_a_methods_page_has_formula_fields_paper_count_and_example(highrank):
    status, out, _ = highrank("methods", "hira")
    assert status == 0
    assert "    W' = W + R ⊙ (A B),    with R = W by default" in out
    assert "r\tint\t16\tRank of A B.\t>= 1\n" in out
    assert "one of w0, random_uniform, random_scaled, w0_trunc, w0_smooth, ones; " in out
    assert "\nSource: Huang et al., " in out
    assert "trains: 3,317,760 (2.4071 %), on smollm2_135m with placement=fc_qkv\n" in out
    assert "in PEFT: HIRA\n" in out
    assert "example: highrank run method=hira r=16\n" in out


def test_a_method_without_place_on_the_default_model_says_so(highrank):
    _, out, _ = highrank("methods", "bitfit")
    assert "It has no fields." in out
    assert "trains: not on the default model: bitfit: the model has no biases to train" in out


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_example_has_fields_that_it_takes(name):
    source = Source(registry.available("methods")[name])
    first, *fields = catalogue.example(name, source.fields(source.config))
    assert first == f"method={name}"
    given = {key_of(word): parse(word).value() for word in fields}
    dataclass_from(registry.load("methods", name).config, given, name)


def test_an_example_with_a_field_that_must_be_given_is_a_run():
    words = catalogue.example("sum", Source("highrank.methods.sum").fields("SumConfig"))
    assert list(compose_run(shlex.split(shlex.join(words))).method_cfg.parts) == ["hira", "lora"]


def test_a_member_of_a_task_is_asked_for_as_it_is_typed(highrank):
    status, out, _ = highrank("tasks", "glue/stsb")
    assert status == 0
    assert "kind: numbers" in out
    assert "measured: pearson, spearman" in out
    assert "example: highrank run task=glue/stsb" in out
    status, out, err = highrank("tasks", "glue/stbs")
    assert (status, out) == (2, "")
    assert "task glue: unknown member, got member=stbs" in err


@pytest.mark.parametrize("name", sorted(registry.available("tasks")))
def test_a_tasks_page_has_its_records_fields_and_a_run_as_example(name, highrank):
    status, out, _ = highrank("tasks", name)
    assert status == 0
    assert "Metric" in out
    assert "task.n_train\tint" in out
    (example,) = re.findall("^example: highrank run (.*)", out, re.MULTILINE)
    assert compose_run(shlex.split(example)).task.name == name


def test_a_models_page_counts_its_parameters_and_parts(highrank, terminal):
    _, out, _ = highrank("models", "tiny_llama")
    assert "13,008" in out
    assert "q × 2, k × 2, v × 2, o × 2, gate × 2, up × 2, down × 2" in out
    _, out, _ = highrank("models", "minilm_l6")
    assert "highrank run model=minilm_l6 task=glue/cola" in out


def test_a_protocols_page_has_its_values_by_kind_of_task(highrank):
    _, out, _ = highrank("protocols", "hira")
    assert "num_beams\t4\tBeams of the search; 1 is greedy.\n" in out
    assert "max_length of commonsense tasks\t256\t" in out


def test_an_experiments_page_has_its_axes_and_the_one_for_two_cores(highrank):
    _, out, _ = highrank("experiments", "hira/table5_placement")
    assert "sweep: placement: [fc, qv, qkv, qk, v, q, k]\n" in out
    assert "all of 7 placement: highrank run -m experiment=hira/table5_placement\n" in out
    assert "experiment=hira/table5_placement scale=small" in out


@pytest.mark.parametrize(
    ("command", "name", "near"),
    [
        ("methods", "hra", "did you mean 'hira'"),
        ("tasks", "gsm", "did you mean 'gsm8k'"),
        ("models", "smollm", "did you mean 'smollm2_135m'"),
        ("protocols", "cleen", "did you mean 'clean'"),
        ("experiments", "hira/table5", "did you mean 'hira/table5_placement'"),
        ("protocols", "zzz", "it is one of: clean, hira"),
    ],
)
def test_a_name_that_is_none_is_said_with_the_nearest(command, name, near, highrank):
    status, out, err = highrank(command, name)
    assert (status, out) == (2, "")
    assert f"{command}: unknown name, got {name}; {near}" in err


def test_more_than_a_name_is_refused(highrank):
    assert "use: highrank methods [NAME]" in highrank("methods", "hira", "lora")[2]


def test_a_plugin_that_cannot_be_read_or_imported_leaves_the_others(highrank, tmp_path, monkeypatch):
    (tmp_path / "plugin_no_python.py").write_text("class (:\n")
    (tmp_path / "plugin_raises.py").write_text(
        '"""raises: nothing.\n\n    W\' = W\n"""\nraise RuntimeError("no such GPU")\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    known = {**registry.available("methods"), "no_python": "plugin_no_python", "raises": "plugin_raises"}
    monkeypatch.setattr(registry, "available", lambda group: known)
    status, out, _ = highrank("methods")
    rows = {row[0]: row[1] for row in listed(out)}
    assert (status, len(rows)) == (0, len(METHODS) + 2)
    assert "must be there and be Python, got SyntaxError" in rows["no_python"]
    assert rows["raises"] == "W' = W"
    status, _, err = highrank("methods", "raises")
    assert status == 2
    assert "method raises: the plugin must import, got RuntimeError from plugin_raises: no such GPU" in err
