"""The heads of models that can be fused, and the Auto class of each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

# head → Auto class
AUTO_CLASSES: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "image-classification": AutoModelForImageClassification,
    "semantic-segmentation": AutoModelForSemanticSegmentation,
    "features": AutoModel,
}


def head_of(model: Any, heads: Iterable[str] = tuple(AUTO_CLASSES), fused: str = "fused") -> str:
    """The head of a model, among those that a family supports.

    Args:
        model: a class of transformers.
        heads: keys of `AUTO_CLASSES`.
        fused: participle for the error message: "routed".

    Raises:
        ValueError: no supported Auto class loads this class, for example because it is custom code.
    """
    for head in heads:
        known = AUTO_CLASSES[head]._model_mapping.get(type(model.config), ())
        if type(model) in (known if isinstance(known, (tuple, list)) else (known,)):
            return head
    raise ValueError(
        f"{type(model).__name__} cannot be {fused}: it is none of {', '.join(heads)}, "
        "or it is custom code, which cannot travel inside another model"
    )


def labels_of(model: Any) -> list[str]:
    """The names of a model's classes, in order."""
    return [model.config.id2label[i] for i in sorted(model.config.id2label)]


__all__ = ["AUTO_CLASSES", "head_of", "labels_of"]
