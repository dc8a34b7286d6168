"""JSON as the format has it: written in one way only, parsed so that every reader sees the same."""

from __future__ import annotations

import json
import math
import re
from typing import Any, Final

from .errors import IndexSyntaxError, LimitError
from .layout import MAX_NESTING

_DIGITS: Final = bytes.maketrans(b"123456789", b"000000000")
_LONG: Final = b"0" * 19  # an integer of fewer digits is within 64 bits
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")  # its JSON escape


def canonical_json(item: Any) -> bytes:
    """JSON with sorted keys, no white space, UTF-8, no NaN or infinity: the same object gives the same bytes.

    Raises:
        IndexSyntaxError: it holds what such JSON cannot: NaN, infinity or a lone surrogate.
    """
    try:
        return json.dumps(item, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise IndexSyntaxError(f"not to be written as JSON ({str(error)[:200]})") from None


def parse_json(data: bytes) -> Any:
    """Parses JSON strictly, so that every reader sees the same and all of it can be written again.

    Raises:
        IndexSyntaxError: it is not JSON in UTF-8, a key stands twice in an object, a number is NaN, infinite or an
            integer beyond 64 bits, or a string holds a lone surrogate.
        LimitError: it is nested deeper than `MAX_NESTING`.
    """
    try:
        item = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_int=_integer if _LONG in data.translate(_DIGITS) else int,
            parse_float=_finite,
        )
        _check_nesting(item)
        if _SURROGATE.search(data):
            json.dumps(item, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise LimitError(f"the index is nested deeper than {MAX_NESTING} levels") from None
    except ValueError as error:  # UnicodeError and JSONDecodeError are ValueErrors
        raise IndexSyntaxError(f"the index is not valid JSON ({str(error)[:200]})") from None
    return item


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    item = dict(pairs)
    if len(item) != len(pairs):
        raise ValueError("an object has one key twice")
    return item


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _integer(text: str) -> int:
    if len(text) > 20 or not -(1 << 63) <= (value := int(text)) < 1 << 64:
        raise ValueError(f"the integer {text[:24]} is beyond 64 bits")
    return value


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"the number {text[:24]} is beyond float64")
    return value


def _check_nesting(item: Any) -> None:
    level = [item]
    for _ in range(MAX_NESTING + 1):
        level = [part for part in level if type(part) is dict or type(part) is list]
        if not level:
            return
        level = [value for part in level for value in (part.values() if type(part) is dict else part)]
    raise LimitError(f"the index is nested deeper than {MAX_NESTING} levels")
