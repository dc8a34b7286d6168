"""Files whose index is not the JSON that the format allows, each beside a twin that opens."""

from __future__ import annotations

import json

import pytest

from sctconv.formats.errors import IndexSchemaError, IndexSyntaxError, LimitError
from sctconv.formats.reader import SctFile


def text(parts, old: str, new: str) -> dict[str, bytes]:
    """The index as text, with one piece replaced."""
    whole = json.dumps(parts.index, sort_keys=True, separators=(",", ":"))
    assert old in whole
    return {"index_text": whole.replace(old, new, 1).encode()}


@pytest.mark.parametrize(
    ("value", "message", "twin"),
    [
        pytest.param("NaN", "NaN is not a JSON number", "null", id="nan"),
        pytest.param("-Infinity", "-Infinity is not a JSON number", "-1", id="infinity"),
        pytest.param("1e999", "the number 1e999 is beyond float64", "1e308", id="float overflows"),
        pytest.param("18446744073709551616", "1844674407\\d+ is beyond 64 bits", "18446744073709551615", id="2^64"),
        pytest.param("-9223372036854775809", "is beyond 64 bits", "-9223372036854775808", id="-2^63-1"),
        pytest.param("9" * 5000, "the integer 9{24} is beyond 64 bits", "9" * 19, id="5000 digits"),
        pytest.param('{"a":1,"a":1}', "one key twice", '{"a":1,"b":1}', id="duplicate key"),
        pytest.param('"\\ud800"', "surrogates not allowed", '"\\ud83d\\ude00"', id="lone surrogate"),
        pytest.param("1,", "not valid JSON", "1", id="comma"),
        pytest.param("'a'", "not valid JSON", '"a"', id="quotes"),
        pytest.param('"\n"', "Invalid control character", '"\\n"', id="raw newline"),
        pytest.param("01", "not valid JSON", "1", id="leading zero"),
    ],
)
def test_json_beyond_what_the_format_allows_is_refused(refused, save, parts, value, message, twin):
    refused(parts, IndexSyntaxError, message, text(parts, '"by hand"', value))
    with SctFile(save(parts, text(parts, '"by hand"', twin))) as file:
        assert "made" in file.index.metadata


DIGITS = "9" * 40


@pytest.mark.parametrize("beside", [None, DIGITS, {DIGITS: DIGITS}, float(f"0.{DIGITS}")], ids=repr)
@pytest.mark.parametrize("number", [10**18 - 1, 10**18, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 10**20])
def test_integers_are_held_to_64_bits_whatever_stands_beside(save, parts, number, beside):
    for value, most in ((number, 1 << 64), (-number, (1 << 63) + 1)):
        content = text(parts, '"by hand"', json.dumps([value, beside]))
        if number < most:
            with SctFile(save(parts, content)) as file:
                assert file.index.metadata["made"] == [value, beside]
        else:
            with pytest.raises(IndexSyntaxError, match="is beyond 64 bits"):
                SctFile(save(parts, content))


@pytest.mark.parametrize("content", [b"\xff{}", b"\xef\xbb\xbf{}", b"{}{}", b"{", b'"\xed\xa0\x80"'])
def test_bytes_that_are_no_json_are_refused(refused, parts, content):
    refused(parts, IndexSyntaxError, "not valid JSON", {"index_text": content})


@pytest.mark.parametrize("brackets", [("[", "]"), ('{"a":', "}")])
def test_deep_nesting_is_refused(refused, save, parts, brackets):
    def nested(depth):
        return text(parts, '"by hand"', brackets[0] * depth + "1" + brackets[1] * depth)

    for depth in (63, 500, 200_000):  # the index and its metadata are two levels more
        refused(parts, LimitError, "nested deeper than 64 levels", nested(depth))
    SctFile(save(parts, nested(62))).close()


@pytest.mark.parametrize("content", [b"[]", b"null", b"1", b'"a"', b"true"])
def test_an_index_that_is_no_object_is_refused(refused, parts, content):
    refused(parts, IndexSchemaError, "the index is .*, not an object", {"index_text": content})
