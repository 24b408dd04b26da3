"""What is asked of a file's content, and how what is wrong with it is said."""

import pytest

from highrank.base.shapes import amount, plain, read_json, shaped

SHAPE = {
    "a": int,
    "b?": {"c": float, ...: amount},
    "d?": [{"e": frozenset(("x", "y"))}],
    "f?": (None, {"g": str}),
    ...: plain,
}
WHOLE = {
    "a": 1,
    "b": {"c": -0.5, "h": 2.0},
    "d": [{"e": "x"}, {"e": "y", "more": []}],
    "f": None,
    "z": [1, {"k": None}],
}


def test_what_has_the_shape_is_returned_as_it_is():
    assert shaped(WHOLE, SHAPE) is WHOLE
    assert shaped({"a": 1}, SHAPE) == {"a": 1}
    assert shaped({"a": 1, "f": {"g": ""}}, SHAPE)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "[], which must be a mapping"),
        ({}, "no a"),
        ({"a": True}, "a=true, which must be a whole number"),
        ({"a": 1.5}, "a=1.5, which must be a whole number"),
        ({"a": 1, "b": {}}, "no b.c"),
        ({"a": 1, "b": {"c": "1"}}, 'b.c="1", which must be a number'),
        ({"a": 1, "b": {"c": 1, "h": -1}}, "b.h=-1, which must be a number from 0 on"),
        ({"a": 1, "b": {"c": 1, "h": float("nan")}}, "b.h=NaN, which must be a number from 0 on"),
        ({"a": 1, "d": {}}, "d={}, which must be a list"),
        ({"a": 1, "d": [{"e": "x"}, {"e": "z"}]}, 'd[1].e="z", which must be one of x, y'),
        ({"a": 1, "f": {"g": None}}, "f.g=null, which must be a text"),
        (
            {"a": 1, "z": {1: 2}},
            'z={"1": 2}, which must be a text, a number, true, false, null, or lists and mappings of these',
        ),
        ({"a": 1, "f": "no"}, 'f="no", which must be null or a mapping'),
        ({"a": 1, 2: 3}, "the key 2, which must be a text"),
        ({"a": "x" * 100}, f'a="{"x" * 58}…, which must be a whole number'),
    ],
)
def test_the_first_place_that_is_wrong_is_named(content, said):
    with pytest.raises(ValueError) as error:
        shaped(content, SHAPE)
    assert str(error.value) == said


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 50_000, b"3", b'{"a": "x"}'])
def test_a_file_that_is_no_json_or_has_another_shape(tmp_path, text):
    (tmp_path / "file.json").write_bytes(text)
    with pytest.raises(ValueError):
        read_json(tmp_path / "file.json", SHAPE)
    (tmp_path / "file.json").write_bytes(b'{"a": 3}')
    assert read_json(tmp_path / "file.json", SHAPE) == {"a": 3}
