"""A published Fusion of Experts, loaded by its id and asked one example at a time."""

from __future__ import annotations

import json
import re
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
from PIL import Image
from processing import Routing, are_digits, read_results, read_routing
from transformers import AutoModel, AutoProcessor

MOST_EXAMPLES = 6
NEW_TOKENS = 64
# the first that fits tells what went wrong: error, message
REASONS: list[tuple[type[Exception], str]] = [
    (GatedRepoError, "{id} is gated: accept its terms with the account behind this Space's HF_TOKEN."),
    (
        RepositoryNotFoundError,
        "There is no model {id} that this Space can see. A private one needs the secret HF_TOKEN.",
    ),
    (RevisionNotFoundError, "{id} has no revision {revision}."),
    (HFValidationError, "{id!r} is not a model id; one looks like owner/name."),
    (LocalEntryNotFoundError, "{endpoint} does not answer. Restart the Space once {id} can be fetched from there."),
]


class LoadError(RuntimeError):
    """The model cannot be served; the message says why."""


@dataclass
class Served:
    """A loaded model and what its page needs.

    Attributes:
        id, sha: what was loaded.
        model, processor: from `AutoModel` and `AutoProcessor`.
        kind: "text" or "image", what it takes.
        results: its `results.json`, see `processing.read_results`.
        examples: texts from the card's `widget`, to click.
    """

    id: str
    sha: str
    model: Any
    processor: Any
    kind: str
    results: dict[str, Any] | None
    examples: list[str]

    @property
    def url(self) -> str:
        """Its page on the Hub."""
        return f"{constants.ENDPOINT}/{self.id}"

    @property
    def labels(self) -> list[str]:
        """The fused labels, in order; empty for language models."""
        config = self.model.config
        return [] if config.vocabularies else [str(label) for _, label in sorted(config.id2label.items())]

    @property
    def digits(self) -> bool:
        """Whether it reads handwritten digits."""
        return self.kind == "image" and are_digits(self.labels)

    @property
    def expert_urls(self) -> dict[str, str]:
        """Pages of the experts that came from the Hub, at the revision that was fused."""
        rows = self.model.config.experts
        return {e["name"]: f"{constants.ENDPOINT}/{e['name']}/tree/{e['revision']}" for e in rows if e.get("revision")}

    @torch.no_grad()
    def ask(self, example: str | Image.Image, budget: float | None = None) -> Routing:
        """Runs the model on one text or picture.

        Args:
            budget: share of the experts' cost that may be spent; None asks every expert.

        Returns:
            See `processing.read_routing`.
        """
        given = {"text": [example]} if self.kind == "text" else {"images": [example]}
        inputs = self.processor(**given).to(self.model.device)
        if self.model.config.vocabularies:
            return self._generate(inputs)
        logits = self.model(**inputs, budget=budget).logits[0].float().cpu()
        return read_routing(self.model.config, self.model.routing_trace(), logits, budget)

    def _generate(self, inputs: Any) -> Routing:
        """The continuation by the expert that is chosen."""
        config = self.model.config
        tokens = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS)
        routing = read_routing(config, self.model.routing_trace(), None, None)
        if not config.is_encoder_decoder:  # what a decoder generates begins with its prompt
            chosen = next(i for i, expert in enumerate(routing["experts"]) if expert["order"])
            group = config.backbones[config.experts[chosen]["backbone"]]["inputs"]
            tokens = tokens[:, inputs[f"input_ids_{group}" if group else "input_ids"].shape[1] :]
        return routing | {"answer": self.processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()}


COMMIT = re.compile("[0-9a-f]{40}")


def refuse_code(model_id: str, revision: str | None, sha: str, agreed: bool) -> None:
    """Raises unless whoever runs the page agreed to a model's code, at a commit that they named; a folder needs none.

    Args:
        sha: the commit that was found; "" for a folder.
    """
    if agreed and (not sha or COMMIT.fullmatch(revision or "")):
        return
    pin = f" and MODEL_REVISION={sha}" if sha else ""
    raise LoadError(f"{model_id} runs code of its own on this page: read it, then set TRUST_REMOTE_CODE=true{pin}.")


def load(model_id: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Served:
    """Loads a published FoE; everything comes from one commit.

    Args:
        trust_remote_code: whether its code may run, at a commit that `revision` names.

    Raises:
        LoadError: with a message for the page.
    """
    try:
        folder = Path(snapshot_download(model_id, revision=revision, allow_patterns=["*.json", "README.md"]))
        sha = folder.name
        config = _read_json(folder / "config.json")
        if not isinstance(config, dict) or config.get("model_type") != "foe":
            raise LoadError(f"{model_id} is not a Fusion of Experts: its config.json does not say model_type foe.")
        refuse_code(model_id, revision, sha, trust_remote_code)
        processor = AutoProcessor.from_pretrained(model_id, revision=sha, trust_remote_code=True)
        model = AutoModel.from_pretrained(model_id, revision=sha, trust_remote_code=True).eval()
    except LoadError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        reason = next((text for kind, text in REASONS if isinstance(error, kind)), "{id} could not be loaded: {error}")
        fields = {"id": model_id, "revision": revision or "main", "endpoint": constants.ENDPOINT}
        raise LoadError(reason.format(error=f"{type(error).__name__}: {first}", **fields)) from error
    kinds = set(processor.kinds)
    if len(kinds) > 1:
        raise LoadError(f"{model_id} takes text and images together; this page can give it only one of them.")
    model.record_routing = True
    model.config.budget = None  # the page's budget decides, and "all experts" means all
    return Served(
        id=model_id,
        sha=sha,
        model=model.to("cuda") if torch.cuda.is_available() else model,
        processor=processor,
        kind=kinds.pop(),
        results=read_results(_read_json(folder / "results.json")),
        examples=_widget_texts(folder / "README.md"),
    )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _widget_texts(card: Path) -> list[str]:
    """Example texts from the card's `widget`, the Hub's own place for them."""
    if not card.is_file():
        return []
    rows = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict().get("widget")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return [row["text"] for row in rows if isinstance(row.get("text"), str)][:MOST_EXAMPLES]
