"""Where a method does not apply: what methods raise, and why those of a family are not for suites of a kind."""

from __future__ import annotations


class NotApplicable(Exception):
    """A method cannot be run on this suite, split or task: its message is the cells' reason, and nothing has failed."""
