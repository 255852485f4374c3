"""Owners on the embedded Hub: each test gets a name nobody else uses."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from huggingface_hub import HfApi

_numbers = itertools.count()


class Owner:
    """A user of the embedded Hub and its client."""

    def __init__(self, name: str, api: HfApi) -> None:
        self.name, self.api = name, api

    def push(self, name: str, folder: Path, **options) -> str:
        """Upload a folder to ``owner/name`` and give back its commit."""
        repo = f"{self.name}/{name}"
        self.api.create_repo(repo, exist_ok=True, **options)
        return self.api.upload_folder(repo_id=repo, folder_path=folder).oid


@pytest.fixture
def owner(hub) -> Owner:
    """A user and its client."""
    name = f"owner{next(_numbers)}"
    return Owner(name, HfApi(endpoint=hub.endpoint, token=hub.token(name)))


@pytest.fixture
def anyone(hub) -> HfApi:
    """A client without a token."""
    return HfApi(endpoint=hub.endpoint, token=False)
