"""Values of clients in messages: named, quoted, shortened, and without control characters."""

import json

import orjson
import pytest

from ovms_rest.protocol.words import (
    ABSENT,
    count_of,
    cut,
    describe,
    escape,
    explain_invalid_json,
    explain_json_error,
    join,
    list_names,
    quote,
    show,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((ABSENT, "missing"), (None, "null"), (True, "a boolean"), ("a", "a string")),
        *(([], "an array"), ({}, "an object"), (-1.5, "the number -1.5")),
    ],
)
def test_value_is_described_by_its_json_type(value, text):
    assert describe(value) == text


def test_value_is_shown_as_json_up_to_60_characters():
    assert show({"a": [1, None]}) == '{"a":[1,null]}'
    assert show("x" * 10**6) == f'"{"x" * 59}...'


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity"])
def test_token_that_json_does_not_know_is_shown_as_it_came(text):
    value = json.loads(text)
    assert (show(value), describe(value), show({"a": [value, None]})) == (text, text, f'{{"a":[{text},null]}}')


def test_half_of_a_surrogate_pair_is_shown_escaped():
    assert show("a\ud800\n") == '"a\\ud800\\n"'
    assert show("\ud800" * 100) == '"' + "\\ud800" * 59 + "..."


def test_value_too_deep_for_orjson_is_described():
    value = 1
    for _ in range(300):
        value = [value]
    assert show(value) == "an array"


def test_text_of_more_than_60_characters_is_cut():
    assert (cut("x" * 60), cut("x" * 61)) == ("x" * 60, f"{'x' * 60}...")


@pytest.mark.parametrize("control", ["\n", "\x7f", "\x95", "\u2028"])
@pytest.mark.parametrize(("function", "quotes"), [(show, '""'), (quote, "''"), (cut, ("", ""))])
def test_values_in_messages_stay_in_one_line(function, quotes, control):
    escaped = "\\n" if control == "\n" else control.encode("unicode_escape").decode()
    assert function(f"a{control}b") == f"{quotes[0]}a{escaped}b{quotes[1]}"


def test_names_are_quoted_and_at_most_ten_listed():
    assert quote("it's") == '"it\'s"'
    assert list_names(["a", "b"]) == "'a', 'b'"
    assert list_names(str(index) for index in range(11)).endswith("'9', ...")


def test_noun_of_a_count_is_plural_except_after_1():
    assert [count_of(number, "byte") for number in (0, 1, 2)] == ["0 bytes", "1 byte", "2 bytes"]


def test_shape_is_joined_without_spaces():
    assert (join((1, 3, 224)), join(())) == ("[1,3,224]", "[]")


def test_control_characters_are_escaped():
    assert escape("a\r\n\x1b\u2028\x85\u00e9") == "a\\r\\n\\x1b\\u2028\\x85\u00e9"


@pytest.mark.parametrize("sign", ["//", "/*", "#"])
def test_comment_in_json_is_named(sign):
    text = f'{{"a": 1 {sign} comment\n}}'
    with pytest.raises(orjson.JSONDecodeError) as caught:
        orjson.loads(text)
    assert explain_json_error(text, caught.value).startswith(f"{sign} begins a comment, which JSON does not have: ")


def reason(content):
    """Return what is wrong with the bytes of a text."""
    with pytest.raises(orjson.JSONDecodeError) as caught:
        orjson.loads(content)
    return explain_invalid_json(content, caught.value)


def test_first_byte_that_is_not_utf8_is_shown_with_its_place():
    assert reason(b'{"a": 1,\n"\xc3\xa4\xff\xfe": 2}') == "line 2 column 3: byte 0xff is not UTF-8"
    assert reason(memoryview(b"\xff")) == "line 1 column 1: byte 0xff is not UTF-8"


def test_number_beyond_fp64_is_not_called_invalid():
    expected = "the number -1e999 is beyond the range of FP64: line 1 column 3 (char 2)"
    assert reason(b"[ -1e999]") == expected
    with pytest.raises(orjson.JSONDecodeError) as caught:
        orjson.loads("[ -1e999]")
    assert explain_json_error("[ -1e999]", caught.value) == expected


def test_other_invalid_bytes_get_the_message_of_the_parser():
    assert reason(b"{") == "unexpected end of data: line 1 column 2 (char 1)"
    assert reason(b"").endswith("line 1 column 1 (char 0)")


def test_other_json_error_is_the_parsers():
    assert explain_json_error("{", ValueError("the reason")) == "the reason"
