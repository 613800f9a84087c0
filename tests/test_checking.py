"""Checks of JSON files: each returns what is wrong in words, or None; the keys of the config are in test_config."""

import codecs

import pytest

from ovms_rest.checking import Never, as_json, check_keys, check_name, check_values, is_a, read_json

IS_INTEGER = is_a("an integer", int)


def test_check_of_a_type_takes_that_type_only():
    assert IS_INTEGER(1) is None
    assert [IS_INTEGER(value) for value in (True, 1.0, None)] == [
        "expected an integer, got true",
        "expected an integer, got 1.0",
        "expected an integer, got null",
    ]


@pytest.mark.parametrize("name", ["a", "a b", "é.1"])
def test_name_may_have_any_characters_but_slashes_and_controls(name):
    assert check_name(name) is None


@pytest.mark.parametrize("name", ["", "a/b", "a\n", "\x85", 1, None])
def test_invalid_name_is_rejected(name):
    assert check_name(name) == (f"expected a non-empty string without '/' and control characters, got {as_json(name)}")


def test_invalid_values_are_listed_up_to_ten():
    problem = check_values(dict.fromkeys(map(str, range(12)), 0), lambda value: value > 0, "positive")
    assert problem.split("; ")[0] == "the value of 0 must be positive, got 0"
    assert problem.split("; ")[10:] == ["2 more are invalid"]
    assert check_values({"a": 1}, lambda value: value > 0, "positive") is None


def test_required_known_and_unknown_keys_are_checked():
    checks = {"name": check_name, "size": IS_INTEGER, "loader": Never("there are no loaders")}
    problems = check_keys({"size": "1", "sise": 1, "loader": 1, "Loaders": 1}, "model.", checks, ("name",))
    assert list(problems) == [
        "model.name: is missing",
        'model.size: expected an integer, got "1"',
        "model.sise: unknown key; the nearest known one is 'size'",
        "model.loader: is not supported: there are no loaders",
        "model.Loaders: is not supported: there are no loaders",
    ]


def test_long_value_is_cut_and_too_deep_one_described():
    value = 1
    for _ in range(300):
        value = [value]
    assert as_json("x" * 100) == f'"{"x" * 79}...'
    assert as_json(value) == "a value nested too deeply to be shown"


def test_value_stays_in_one_line():
    """The JSON of orjson has all but the first of these as they are."""
    assert as_json({"a\n": "\x7f\x95\u2028"}) == '{"a\\n":"\\x7f\\x95\\u2028"}'


def test_duplicate_keys_are_reported_and_the_last_counts():
    assert read_json(b'{"a": 1, "a": 2, "b": [{"c": 1, "c": 1}]}') == (
        {"a": 2, "b": [{"c": 1}]},
        ["a: duplicate key", "b[0].c: duplicate key"],
    )


def test_duplicate_key_stays_in_one_line_and_is_cut():
    key = "\\n" + "k" * 100
    _, problems = read_json(f'{{"{key}": {{"a": 1, "a": 1}}, "b": 1, "b": 2, "{key}": 1}}'.encode())
    assert problems == ["b: duplicate key", f"\\n{'k' * 59}...: duplicate key"] or problems == [
        f"\\n{'k' * 59}...: duplicate key",
        "b: duplicate key",
    ]


def reason(content):
    """Return why bytes are not valid JSON."""
    with pytest.raises(ValueError, match=r"^is not valid JSON: ") as caught:
        read_json(content)
    return str(caught.value).removeprefix("is not valid JSON: ")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{'model_config_list': []}", b'{"model_config_list": [],}', b'{"a": NaN}', b'{"a": "\xff"}'],
)
def test_invalid_json_is_rejected_with_a_reason(content):
    assert reason(content)


@pytest.mark.parametrize(
    ("content", "sign"),
    [
        (b"// comment\n{}", "//"),
        (b'{"a": 1, // comment\n "b": 2}', "//"),
        (b'{"a": 1 /* comment */}', "/*"),
        (b'{"a": /* comment */ 1}', "/*"),
        (b'{"a": [1,\n# comment\n2]}', "#"),
        (b"{}\n# comment", "#"),
    ],
)
def test_comment_is_reported_as_such(content, sign):
    assert reason(content).startswith(f"{sign} begins a comment, which JSON does not have: ")


def test_comment_sign_in_a_string_is_not_a_comment():
    assert "comment" not in reason(b'{"a": "// #", "b": }')


@pytest.mark.parametrize(("encoding", "mark"), [("utf-16", ""), ("utf-16-le", "\ufeff"), ("utf-16-be", "\ufeff")])
def test_utf_16_is_reported(encoding, mark):
    assert reason(f"{mark}{{}}".encode(encoding)) == "it is UTF-16 by its first two bytes, expected UTF-8"


def test_byte_that_is_not_utf_8_names_its_place():
    """Columns count characters, not bytes."""
    assert reason('{\n "a": "ü'.encode() + b"\xe8") == "line 2 column 9: byte 0xe8 is not UTF-8"


def test_byte_order_mark_of_utf_8_is_skipped():
    assert read_json(codecs.BOM_UTF8 + b"{}") == ({}, [])
