"""The text of an answer, token by token, and where it stops."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # stands for bytes that are not a character yet

Decode = Callable[[Sequence[int]], str]
"""Token ids → text without special tokens."""


class AnswerText:
    """Grows by tokens; ends at the first stop string, which is not part of it.

    Args:
        decode: of the tokenizer.
        stops: strings that end the answer.

    Attributes:
        text: what is decoded so far, until the stop string.
        stopped: whether a stop string was found.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, tuple(stops)
        self._ids: list[int] = []
        self._start = self._read = 0  # the ids before `_read` are in the text; decoding goes on from `_start`
        self._sent = 0
        self.text, self.stopped = "", False

    def add(self, token: int) -> None:
        """Adds a token. Only the last few are decoded, since a token may look different after another."""
        self._ids.append(token)
        before, now = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        if len(now) > len(before) and not now.endswith(UNFINISHED):
            self._start, self._read = self._read, len(self._ids)
            self._extend(self.text + now[len(before) :])

    def close(self) -> str:
        """The whole text: what the tokenizer decodes from all ids, until the stop string."""
        if not self.stopped:
            whole = self._decode(self._ids)
            self._extend(whole if whole.startswith(self.text[: self._sent]) else self.text)
        return self.text

    def unsent(self, last: bool = False) -> str:
        """What was not returned before; the beginning of a stop string only when it cannot become one.

        Args:
            last: whether nothing follows.
        """
        end = len(self.text) - (0 if last or self.stopped else self._held())
        part = self.text[self._sent : max(end, self._sent)]
        self._sent += len(part)
        return part

    def _extend(self, text: str) -> None:
        longest = max(map(len, self._stops), default=1)
        first = max(0, len(self.text) - longest + 1)
        found = [place for stop in self._stops if (place := text.find(stop, first)) >= 0]
        self.text, self.stopped = (text[: min(found)], True) if found else (text, False)

    def _held(self) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        lengths = [n for stop in self._stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])]
        return max(lengths, default=0)


__all__ = ["AnswerText", "Decode"]
