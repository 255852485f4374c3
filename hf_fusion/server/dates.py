"""Dates as the clients parse them."""

from __future__ import annotations

import time
from datetime import datetime, timezone


def now() -> str:
    """The time as the clients parse it: ``2026-01-31T12:00:00.123Z``."""
    return stamp(time.time())


def stamp(seconds: float) -> str:
    """A time in seconds as the clients parse it."""
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"
