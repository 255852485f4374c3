"""Silences transformers' progress bars and reports where this package shows or raises them itself."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within this context transformers shows no progress bars and does not report missing keys."""
    from transformers.utils import logging as verbosity

    level, bars = verbosity.get_verbosity(), verbosity.is_progress_bar_enabled()
    verbosity.set_verbosity_error()
    _show_bars(False)
    try:
        yield
    finally:
        verbosity.set_verbosity(level)
        if bars:
            _show_bars(True)


def _show_bars(shown: bool) -> None:
    """Turns transformers' bars on or off, without its warning if HF_HUB_DISABLE_PROGRESS_BARS is set."""
    from transformers.utils import logging as verbosity

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (verbosity.enable_progress_bar if shown else verbosity.disable_progress_bar)()
