"""The heads of models: a table of architectures, tasks, PEFT task types and Auto classes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError, suggestion

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Head:
    """A type of head.

    Attributes:
        auto: name of its Auto class.
        tasks: pipeline tags, the most common one first.
        suffixes: of the names of architectures with this head.
        peft: PEFT's ``task_type``, or None.
    """

    auto: str
    tasks: tuple[str, ...]
    suffixes: tuple[str, ...]
    peft: str | None = None

    @property
    def has_labels(self) -> bool:
        """Whether its outputs are named classes."""
        return self.auto.endswith(("Classification", "Segmentation"))

    def auto_class(self) -> Any:
        """The Auto class itself (imports transformers)."""
        import transformers

        return getattr(transformers, self.auto)


# in order of lookup: "Model" last, since "LMHeadModel" ends with it
HEADS = (
    Head(
        "AutoModelForSequenceClassification",
        ("text-classification",),
        ("ForSequenceClassification",),
        "SEQ_CLS",
    ),
    Head("AutoModelForTokenClassification", ("token-classification",), ("ForTokenClassification",), "TOKEN_CLS"),
    Head("AutoModelForImageClassification", ("image-classification",), ("ForImageClassification",)),
    Head("AutoModelForSemanticSegmentation", ("image-segmentation",), ("ForSemanticSegmentation",)),
    Head("AutoModelForCausalLM", ("text-generation",), ("ForCausalLM", "LMHeadModel"), "CAUSAL_LM"),
    Head(
        "AutoModelForSeq2SeqLM",
        ("text2text-generation", "summarization", "translation"),
        ("ForConditionalGeneration",),
        "SEQ_2_SEQ_LM",
    ),
    Head(
        "AutoModel",
        ("feature-extraction", "sentence-similarity", "image-feature-extraction"),
        ("Model",),
        "FEATURE_EXTRACTION",
    ),
)
WRITERS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
"""Auto classes of language models."""
TASKS = tuple(task for head in HEADS for task in head.tasks)


def head_of_task(task: str) -> Head:
    """The head for a pipeline tag.

    Raises:
        FusionError: the task is not supported.
    """
    for head in HEADS:
        if task in head.tasks:
            return head
    raise FusionError(f"task {task!r} is not supported", hint=suggestion(task, TASKS))


def head_of_architecture(architecture: str | None) -> Head | None:
    """The head of a class name such as ``BertForSequenceClassification``; None if it is unknown."""
    return next((head for head in HEADS if (architecture or "").endswith(head.suffixes)), None)


def architectures(config: dict[str, Any]) -> list[str]:
    """The class names in a ``config.json``; may be empty."""
    named = config.get("architectures")
    return [str(name) for name in named] if isinstance(named, list) else []


def auto_class_of(config: dict[str, Any]) -> str:
    """Name of the most specific Auto class for a model: from ``auto_map``, else from its architecture."""
    heads: list[str] = [name for name in config.get("auto_map") or () if name not in ("AutoConfig", "AutoModel")]
    known = [name for name in heads if any(head.auto == name for head in HEADS)]
    if known:
        return known[0]
    head = head_of_architecture(next(iter(architectures(config)), None))
    return head.auto if head else "AutoModel"


def head_of_adapter(config: dict[str, Any]) -> Head | None:
    """The head that an adapter was trained with, from ``task_type`` or ``auto_mapping`` of its config."""
    task_type = config.get("task_type")
    named = next((head for head in HEADS if task_type and head.peft == task_type), None)
    mapping = config.get("auto_mapping") or {}
    return named or head_of_architecture(mapping.get("base_model_class") if isinstance(mapping, dict) else None)


def model_class_of(name: str | None) -> type[PreTrainedModel] | None:
    """The model class of that name in transformers; None for other names, including Auto classes."""
    import transformers

    found = getattr(transformers, name, None) if name else None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def default_task(architecture: str | None) -> str | None:
    """The most common pipeline tag of an architecture, or None."""
    head = head_of_architecture(architecture)
    return head.tasks[0] if head else None


def label_names(config: dict[str, Any]) -> tuple[str, ...]:
    """Class names in a ``config.json`` by index; empty if there are none, or only ``LABEL_0``, …"""
    id2label = config.get("id2label")
    if not isinstance(id2label, dict):
        return ()
    try:
        names = tuple(str(name) for _, name in sorted(id2label.items(), key=lambda item: int(item[0])))
    except ValueError:
        return ()
    return () if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def normalise_label(label: str) -> str:
    """Normalises a label name for comparison: lower case, with spaces and dashes as underscores."""
    return re.sub(r"[\s_\-]+", "_", label.strip().lower())
