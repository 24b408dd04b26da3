"""A module's source says what importing it says: fields with their defaults, and which values are refused."""

import dataclasses

import pytest

from highrank.base import registry
from highrank.base.errors import UserError
from highrank.base.fields import dataclass_from
from highrank.base.source import Source
from highrank.config.run_config import RunConfig
from highrank.config.words import parse
from highrank.data.protocol import Protocol

PLUGINS = [(group, name) for group in ("methods", "tasks") for name in sorted(registry.available(group))]


def typed(field):
    """Returns a field's default, as Hydra reads what the source says of it."""
    return (
        field.default
        if field.type.startswith("str") and field.default != "null"
        else parse(f"x={field.default}").value()
    )


def default(field):
    """Returns a field's default; ... for one that must be given."""
    made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return ... if made is dataclasses.MISSING else made


@pytest.mark.parametrize(("group", "name"), PLUGINS)
def test_fields_and_defaults_are_those_of_the_class(group, name):
    source = Source(registry.available(group)[name])
    read = source.fields(source.config)
    config = registry.load(group, name).config
    assert source.config == config.__name__
    assert {f.name: ... if f.default is None else typed(f) for f in read} == {
        f.name: default(f) for f in dataclasses.fields(config)
    }
    assert all(f.meaning for f in read)


@pytest.mark.parametrize(("group", "name"), PLUGINS)
def test_every_choice_is_taken_and_another_one_is_not(group, name):
    """A choice may need a second field; the message then asks for that, not for another choice."""
    source = Source(registry.available(group)[name])
    config = registry.load(group, name).config
    for field in source.fields(source.config):
        for choice in field.choices:
            said = ""
            try:
                dataclass_from(config, {field.name: choice}, name)
            except UserError as error:
                said = str(error)
            assert "one of" not in said
        if field.choices and field.type == "str":
            with pytest.raises(UserError, match=field.name):
                dataclass_from(config, {field.name: "nothing_of_these"}, name)


def test_what_is_asked_of_a_value_is_told_in_the_words_of_the_message():
    hira = {f.name: f for f in Source("highrank.methods.hira").fields("HiRAConfig")}
    assert hira["r"].rules == (">= 1",)
    assert hira["R"].choices == ["w0", "random_uniform", "random_scaled", "w0_trunc", "w0_smooth", "ones"]
    assert hira["R_rank"].rules == ("belongs to R=w0_trunc", ">= 1")
    gralora = {f.name: f for f in Source("highrank.methods.gralora").fields("GraLoRAConfig")}
    assert gralora["K"].rules == (">= 1", "must divide r")  # of a loop over names and bounds
    assert gralora["hybrid_r"].rules == (">= 0",)
    hilora = {f.name: f for f in Source("highrank.methods.hilora").fields("HiLoRAConfig")}
    assert hilora["r1"].rules == hilora["r2"].rules == (">= 0", "r1 and r2 must not both be 0")
    mora = {f.name: f for f in Source("highrank.methods.mora").fields("MoRAConfig")}
    assert mora["type"].choices == ["1", "6"]


def test_core_keys_and_a_protocol_are_read_as_plugins_are():
    core = {f.name: f for f in Source("highrank.config.build").fields("RunConfig", "_check_core")}
    assert list(core) == [f.name for f in dataclasses.fields(RunConfig)]
    assert core["schedule"].choices == ["constant", "linear", "cosine"]
    assert core["eval_test"].choices == ["false", "true"]
    assert core["batch_size"].rules == (">= 1",)
    protocol = {f.name: f for f in Source("highrank.data.protocol").fields("Protocol")}
    assert list(protocol) == [f.name for f in dataclasses.fields(Protocol)]
    assert protocol["too_long"].choices == ["drop", "cut"]
    assert "strict" in protocol["answer_rule"].choices  # names in another file


def test_a_module_that_is_not_there_or_no_python_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken_plugin.py").write_text("class Broken(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"got SyntaxError.* in broken_plugin"):
        Source("broken_plugin")
    with pytest.raises(UserError, match=r"in nowhere\.at_all"):
        Source("nowhere.at_all")
    (tmp_path / "bare_plugin.py").write_text("")
    bare = Source("bare_plugin")
    assert (bare.doc, bare.config, bare.fields("Config"), bare.constant("X")) == ("", None, [], [])
