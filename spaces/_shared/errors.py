"""Errors whose messages are shown on the page."""

from __future__ import annotations


class LoadError(RuntimeError):
    """The model cannot be served; the message says why."""


class InputError(ValueError):
    """A visitor's input is invalid; the message is for them."""
