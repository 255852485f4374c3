"""Content of a repo as plain JSON for responses: bounded, encodable, without NaN."""

from __future__ import annotations

import math
from typing import Any

MAX_DEPTH = 32
MAX_VALUES = 100_000
MAX_STRING = 20_000  # characters; longer ones are cut
_MAX_INT = 1 << 63


def plain(value: object) -> Any:
    """The same value where it is such already; else what can be kept of it.

    Args:
        value: as `json.loads` gives it. What lies deeper than 32 levels or comes after 100,000 values is None, as
            are NaN, infinities and numbers of more than 64 bits; half characters become "?".
    """
    left = [MAX_VALUES]
    return _plain(value, MAX_DEPTH, left)


def text(value: str) -> str:
    """A string that can be encoded, cut to 20,000 characters."""
    return value[:MAX_STRING].encode(errors="replace").decode()


def _plain(value: object, depth: int, left: list[int]) -> Any:
    left[0] -= 1
    if left[0] < 0 or depth < 0:
        return None
    if isinstance(value, str):
        return text(value)
    if isinstance(value, dict):
        return {text(str(key)): _plain(item, depth - 1, left) for key, item in value.items() if left[0] > 0}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth - 1, left) for item in value if left[0] > 0]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bool) or value is None:
        return value
    return value if isinstance(value, int) and abs(value) < _MAX_INT else None
