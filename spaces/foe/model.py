"""A published Fusion of Experts, loaded by its id and run on one example at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from processing import Routing, are_digits, read_results, read_routing
from shared.errors import LoadError
from shared.loading import Loaded, on_device, published
from shared.settings import Settings
from transformers import AutoModel, AutoProcessor

MOST_EXAMPLES = 6
NEW_TOKENS = 64


@dataclass
class Served(Loaded):
    """A loaded model and what its page needs.

    Attributes:
        processor: from `AutoProcessor`.
        kind: of its inputs, "text" or "image".
        results: from its `results.json`, see `processing.read_results`.
        examples: texts from the card's `widget`, to click.
    """

    processor: Any
    kind: str
    results: dict[str, Any] | None
    examples: list[str]

    @property
    def labels(self) -> list[str]:
        """The fused labels, in order; empty for language models."""
        config = self.model.config
        return [] if config.vocabularies else [str(label) for _, label in sorted(config.id2label.items())]

    @property
    def digits(self) -> bool:
        """Whether its inputs are handwritten digits."""
        return self.kind == "image" and are_digits(self.labels)

    @torch.no_grad()
    def ask(self, example: str | Image.Image, budget: float | None = None) -> Routing:
        """Runs the model on one text or picture.

        Args:
            budget: maximum share of the experts' cost; None queries every expert.

        Returns:
            The routing, see `processing.read_routing`.
        """
        arguments = {"text": [example]} if self.kind == "text" else {"images": [example]}
        inputs = self.processor(**arguments).to(self.model.device)
        if self.model.config.vocabularies:
            return self._generate(inputs)
        logits = self.model(**inputs, budget=budget).logits[0].float().cpu()
        return read_routing(self.model.config, self.model.routing_trace(), logits, budget)

    def _generate(self, inputs: Any) -> Routing:
        """The text that the chosen expert generates."""
        config = self.model.config
        tokens = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS)
        routing = read_routing(config, self.model.routing_trace(), None, None)
        if not config.is_encoder_decoder:  # what a decoder generates begins with its prompt
            chosen = next(i for i, expert in enumerate(routing["experts"]) if expert["order"])
            group = config.backbones[config.experts[chosen]["backbone"]]["inputs"]
            tokens = tokens[:, inputs[f"input_ids_{group}" if group else "input_ids"].shape[1] :]
        return routing | {"answer": self.processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()}


def load(settings: Settings) -> Served:
    """Loads a published FoE or one in a folder, with all files from one commit.

    Raises:
        LoadError: with a message for the page.
    """
    with published(settings, _check) as source:
        processor = AutoProcessor.from_pretrained(source.id, **source.options)
        model = AutoModel.from_pretrained(source.id, **source.options).eval()
    kinds = set(processor.kinds)
    if len(kinds) > 1:
        raise LoadError(
            f"{source.id} takes a text and an image together; this page supports models of one or the other."
        )
    model.record_routing = True
    model.config.budget = None  # the budget is set on the page, where "all experts" means no budget
    texts = [row["text"] for row in source.read_widget() if isinstance(row, dict) and isinstance(row.get("text"), str)]
    return Served(
        id=source.id,
        sha=source.sha,
        model=on_device(model),
        processor=processor,
        kind=kinds.pop(),
        results=read_results(source.read_json("results.json")),
        examples=texts[:MOST_EXAMPLES],
    )


def _check(model_id: str, config: Any) -> None:
    """Checks, before any weights are fetched, that a model is a FoE."""
    if not isinstance(config, dict) or config.get("model_type") != "foe":
        raise LoadError(f"{model_id} is not a Fusion of Experts: its config.json does not say model_type: foe.")
