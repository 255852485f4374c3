"""Loads published models: all files from one commit, code only with consent, and errors with a reason for the page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from shared.errors import LoadError
from shared.settings import Settings

COMMIT = re.compile("[0-9a-f]{40}")
TEXTS = ("*.json", "README.md")  # files that are read before the weights
# type of error → message; the first that matches is used
REASONS: list[tuple[type[Exception], str]] = [
    (GatedRepoError, "{id} is gated: accept its terms with the account that this Space's HF_TOKEN belongs to."),
    (
        RepositoryNotFoundError,
        "There is no model {id} that this Space can read. If it is private, add a token as the secret HF_TOKEN.",
    ),
    (RevisionNotFoundError, "{id} has no revision {revision}: correct MODEL_REVISION."),
    (HFValidationError, "{id!r} is neither a folder nor a model id; an id looks like owner/name."),
    (
        LocalEntryNotFoundError,
        "{endpoint} does not answer. Restart the Space when it is reachable again, to load {id}.",
    ),
]


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        id: of the model, or a folder.
        sha: commit of the model; "" for a folder.
        folder: with its JSON files and card.
    """

    id: str
    sha: str
    folder: Path

    @property
    def options(self) -> dict[str, Any]:
        """Options of `from_pretrained`: the same commit, whose code may run."""
        return {"trust_remote_code": True} | ({"revision": self.sha} if self.sha else {})

    def read_json(self, name: str) -> Any:
        """The content of a JSON file beside the model; None if it does not exist or is not JSON."""
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def read_widget(self) -> list[Any]:
        """The examples under `widget` in the card's metadata, as the Hub defines it."""
        card = self.folder / "README.md"
        if not card.is_file():
            return []
        head = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
        widget = head.get("widget")
        return widget if isinstance(widget, list) else []


@dataclass
class Loaded:
    """A loaded model.

    Attributes:
        id: of the model, or a folder.
        sha: commit of the model; "" for a folder.
        model: loaded by its Auto class.
    """

    id: str
    sha: str
    model: Any

    @property
    def url(self) -> str:
        """Its page on the Hub; "" for a folder."""
        return f"{constants.ENDPOINT}/{self.id}" if self.sha else ""

    @property
    def expert_urls(self) -> dict[str, str]:
        """Pages of the experts that are on the Hub, at the commit that was fused."""
        rows = self.model.config.experts
        return {e["name"]: f"{constants.ENDPOINT}/{e['name']}/tree/{e['revision']}" for e in rows if e.get("revision")}


@contextmanager
def published(settings: Settings, check: Callable[[str, Any], None], files: Sequence[str] = TEXTS) -> Iterator[Source]:
    """Finds a published model or one in a folder; its weights are loaded within this context.

    Args:
        settings: its code runs only if they trust it, and code of a repo only at a commit that they name.
        check: takes an id and the content of config.json (None without one), and raises `LoadError` for a model that
            the page cannot show.
        files: patterns of the files that are fetched first.

    Raises:
        LoadError: with a message for the page, also for errors within the context.
    """
    model_id, revision, template = settings.model_id, settings.revision, settings.template
    try:
        is_folder = Path(model_id).is_dir()
        folder = Path(
            model_id if is_folder else snapshot_download(model_id, revision=revision, allow_patterns=list(files))
        )
        source = Source(model_id, "" if is_folder else folder.name, folder)
        check(model_id, source.read_json("config.json"))
        refuse_code(model_id, revision, source.sha, settings.trusted)
        if template and "{}" not in template:
            raise LoadError(f"PROMPT_TEMPLATE is {template!r}; put {{}} where the prompt goes.")
        yield source
    except LoadError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        reason = next((text for kind, text in REASONS if isinstance(error, kind)), "{id} could not be loaded: {error}")
        fields = {"id": model_id, "revision": revision or "main", "endpoint": constants.ENDPOINT}
        raise LoadError(reason.format(error=f"{type(error).__name__}: {first}", **fields)) from error


def refuse_code(model_id: str, revision: str | None, sha: str, agreed: bool) -> None:
    """Raises unless the settings allow the model's code, at a commit that they name; a folder needs no commit.

    Args:
        model_id: for the message.
        revision: in the settings.
        sha: the resolved commit; "" for a folder.
        agreed: whether the settings trust the code.

    Raises:
        LoadError: the code is not allowed.
    """
    if agreed and (not sha or COMMIT.fullmatch(revision or "")):
        return
    pin = f" and MODEL_REVISION={sha}" if sha else ""
    raise LoadError(
        f"{model_id} comes with code that would run in this Space: read it, then set TRUST_REMOTE_CODE=true{pin}."
    )


def on_device(model: Any) -> Any:
    """The model, on the GPU if there is one."""
    return model.to("cuda") if torch.cuda.is_available() else model
