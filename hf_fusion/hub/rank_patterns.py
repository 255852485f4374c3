"""Looks up an adapter's ``rank_pattern`` and ``alpha_pattern`` as PEFT does, within limits of time and memory."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from hf_fusion.errors import FusionError, shown

MOST_SECONDS = 2.0
"""Maximum time for matching all patterns of an adapter with all of its modules."""
MOST_CHARACTERS = 1_000
# Repeated groups can take exponential time; recursion, lookarounds, back references and fuzzy counts can take memory
# without a limit. Patterns of modules do not need them.
_COSTLY = re.compile(r"\)[*+?{]|\(\?(?!:)|\\[1-9gkKLNpPRX]|\{(?!\d{1,3}(,\d{0,3})?\})")
_PLAIN = re.compile(r"[\w.-]+")


class Patterns:
    """The patterns of one adapter.

    Args:
        config: content of its ``adapter_config.json``.
        name: the adapter's name, for errors.
    """

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self.config, self.name = config, name
        self._left = MOST_SECONDS

    def value(self, key: str, path: str, default: Any) -> Any:
        """The value of the first pattern that matches the end of a module's path, else the default.

        Args:
            key: "rank_pattern" or "alpha_pattern".
            path: of the module.
            default: for modules that no pattern matches.

        Raises:
            FusionError: a pattern is not valid, or takes too long; or its value is not a number.
        """
        began = time.monotonic()
        for pattern, value in (self.config.get(key) or {}).items():
            if self._matches(key, pattern, path, self._left - (time.monotonic() - began)):
                if not isinstance(value, (int, float)) or isinstance(value, bool):
                    raise FusionError(f"adapter {self.name}: {key}[{shown(pattern)}]={shown(value)} is not a number")
                default = value
                break
        self._left -= time.monotonic() - began
        return default

    def _matches(self, key: str, pattern: str, path: str, left: float) -> bool:
        import regex  # a dependency of transformers; unlike re, it has a timeout

        if _PLAIN.fullmatch(pattern) and f".{path}".endswith(f".{pattern}"):
            return True
        try:
            if left <= 0 or len(pattern) > MOST_CHARACTERS or _COSTLY.search(pattern):
                raise TimeoutError
            return bool(regex.match(rf"(.*\.)?({pattern})$", path, timeout=left))
        except (regex.error, RecursionError):
            why = "the invalid pattern"
        except TimeoutError:
            why = "a pattern that may take too long:"
        raise FusionError(f"adapter {self.name}: {key} has {why} {shown(pattern)}", "name the modules by their paths")
