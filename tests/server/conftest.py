"""Users of the Hub, with unique names for each test."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from huggingface_hub import HfApi

_numbers = itertools.count()


@pytest.fixture
def user(hub) -> Callable[[], tuple[str, HfApi]]:
    """A function that makes a new user and gives back its name and its client."""

    def new() -> tuple[str, HfApi]:
        name = f"user{next(_numbers)}"
        return name, HfApi(endpoint=hub.endpoint, token=hub.token(name))

    return new


@pytest.fixture
def alice(user) -> tuple[str, HfApi]:
    """One user and its client."""
    return user()
