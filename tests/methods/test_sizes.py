"""What a message names in the place of a size that does not fit is taken by every adapted weight, for every method."""

import dataclasses
import re
from functools import cache

import pytest

from highrank.base.errors import UserError
from highrank.base.registry import available, load
from highrank.model.adapters import attach
from highrank.model.backbones import load_backbone
from highrank.model.sizes import check_shapes, nearest_divisors

pytestmark = pytest.mark.contract

SHAPES = [(24, 16), (48, 36), (12, 96), (60, 20)]
"""(n, k) whose common divisors are 1, 2 and 4, where each alone, and each side alone, has more."""
WANTED = (2, 3, 5, 6, 7, 9, 16, 18, 20, 24, 36, 10**4)
METHODS = [name for name in sorted(available("methods")) if load("methods", name).family.changes_weights]
NAMED = {
    "abba": {"r1"},
    "boft": {"block_num", "block_size", "butterfly_factor"},
    "boha": {"b"},
    "c3a": {"block_size"},
    "diablo": {"N"},
    "fourierft": {"n_frequency"},
    "gralora": {"K"},
    "hira": {"R_rank"},
    "lora": {"r"},
    "lora_xs": {"r"},
    "miss": {"mini_r", "r"},
    "oft": {"block_num", "block_size"},
    "shira": {"r"},
    "svft": {"d"},
}
"""The fields that sizes limit. A new method's are found by the test, which then wants them here."""
MORE = {
    "boft": ({"block_size": 4, "butterfly_factor": 3}, {"block_size": 0, "block_num": 2}),
    "boha": ({"r": 720, "b": 2},),
    "gralora": ({"r": 720, "K": 2},),
    "lora": ({"init": "olora"}, {"init": "pissa"}),
}
VALUES = re.compile(r"(?:the nearest that do[\w ]*: |at most \w+=)(\d+)(?: or (\d+))?$")


def configs(name):
    cls = load("methods", name)
    for fields in (*cls.examples, *MORE.get(name, ())):
        yield cls.config(**fields)


def refusals(cls, cfg, field):
    """Yields each config that the weights refuse for this field, with the message."""
    for value in WANTED:
        try:
            other = dataclasses.replace(cfg, **{field: value})
        except UserError:
            continue
        try:
            check_shapes(cls, SHAPES, other)
        except UserError as error:
            if f"got {field}={value} for a weight" in str(error):
                yield other, str(error)


@cache
def refused(name):
    """Returns field -> (config, message) of a method whose fields hold whole numbers."""
    cls, found = load("methods", name), {}
    for cfg in configs(name):
        for field in dataclasses.fields(cfg):
            if isinstance(getattr(cfg, field.name), int) and not isinstance(getattr(cfg, field.name), bool):
                for case in refusals(cls, cfg, field.name):
                    found.setdefault(field.name, []).append(case)
    return found


@pytest.mark.parametrize("name", [name for name in METHODS if name != "sum"])
def test_a_named_value_is_taken_by_every_weight(name):
    cls = load("methods", name)
    assert refused(name).keys() == NAMED.get(name, set())
    for field, cases in refused(name).items():
        named = 0
        for cfg, message in cases:
            assert message.startswith(f"{name}: {field} must "), message
            given = VALUES.search(message)
            assert given or re.search(rf"no {field} does for every adapted weight( with \w+=\d+, which .*)?$", message)
            for value in given.groups() if given else ():
                if value is not None:
                    named += 1
                    check_shapes(cls, SHAPES, dataclasses.replace(cfg, **{field: int(value)}))
        assert named, f"{name}: no message names a {field}"


@pytest.mark.parametrize("name", [name for name in METHODS if name != "sum"])
def test_the_largest_that_fits_is_named_where_size_is_the_limit(name):
    cls = load("methods", name)
    for field, cases in refused(name).items():
        for cfg, message in cases:
            if most := re.search(r"at most \w+=(\d+)$", message):
                more = dataclasses.replace(cfg, **{field: int(most[1]) + 1})
                with pytest.raises(UserError, match=f"got {field}="):
                    check_shapes(cls, SHAPES, more)


def test_a_sum_names_what_its_part_takes():
    cls = load("methods", "sum")
    with pytest.raises(UserError, match=r"^boha: b must .*got b=3 .*every adapted weight: 1$"):
        check_shapes(cls, SHAPES, cls.config(parts={"lora": {}, "boha": {"r": 3, "b": 3}}))
    check_shapes(cls, SHAPES, cls.config(parts={"lora": {}, "boha": {"r": 3, "b": 1}}))


def test_one_weight_is_asked_for_its_own_divisors():
    cls = load("methods", "oft")
    with pytest.raises(
        UserError, match=r"got block_size=7 for a weight of shape \(24, 16\); the nearest that do: 4 or 8$"
    ):
        cls.validate(16, 24, cls.config(block_size=7))


def test_no_value_is_named_that_none_takes():
    cls = load("methods", "oft")
    with pytest.raises(UserError, match=r"; no block_size does for every adapted weight$"):
        check_shapes(cls, [(8, 9), (8, 16)], cls.config(block_size=4))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "miss",
            {"r": 10**4, "type": "mini", "mini_r": 5},
            "no r does .* with mini_r=5, which must divide out_features$",
        ),
        (
            "boft",
            {"block_size": 5, "butterfly_factor": 9},
            "no block_size does .* with butterfly_factor=9, which must ",
        ),
    ],
    ids=["miss", "boft"],
)
def test_another_field_that_is_in_the_way_is_named(name, fields, message):
    cls = load("methods", name)
    with pytest.raises(UserError, match=message):
        check_shapes(cls, SHAPES, cls.config(**fields))


@pytest.mark.parametrize("name", ["bottleneck", "compacter"])
def test_a_named_value_of_a_bottleneck_is_taken(name):
    cls = load("methods", name)
    model = lambda: load_backbone({"name": "tiny_llama", "dtype": "float32"}, None).model  # noqa: E731
    for field in ("reduction", "n") if name == "compacter" else ("reduction",):
        for value in (3, 5, 7, 64):
            fields = {"reduction": 4, field: value}
            with pytest.raises(UserError, match=rf"^{name}: {field} must .*nearest that do: \d+") as error:
                attach(model(), [], cls, cls.config(**fields))
            for near in re.findall(r"\d+", str(error.value).rpartition(": ")[2]):
                attach(model(), [], cls, cls.config(**{**fields, field: int(near)}))


def test_nearest_divisors():
    assert nearest_divisors(5, 24, 16) == "4 or 8"
    assert nearest_divisors(64, 24, 16) == "8"
    assert nearest_divisors(5, 24, 16, takes=lambda d: d != 4) == "2 or 8"
    assert nearest_divisors(5, 24, 16, takes=lambda d: d > 8) == ""
