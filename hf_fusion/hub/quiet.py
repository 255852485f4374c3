"""transformers without its own bars and reports, where both are ours to show, or to raise."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and no report of missing keys from transformers: both are ours to show, or to raise."""
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
    """Turn transformers' bars on or off, without its warning where HF_HUB_DISABLE_PROGRESS_BARS decides."""
    from transformers.utils import logging as verbosity

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (verbosity.enable_progress_bar if shown else verbosity.disable_progress_bar)()
