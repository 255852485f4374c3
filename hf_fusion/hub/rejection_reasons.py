"""The reasons why an expert is rejected."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from hf_fusion.errors import printable

_MOST_SHOWN = 1_000  # characters of a reason


class ReasonKind(str, Enum):
    """Kinds of reasons against an expert."""

    ARCHITECTURE = "architecture"
    BASE = "base"
    BASE_REVISION = "base revision"
    SHAPES = "shapes"
    LABELS = "labels"
    TOKENIZER = "tokenizer"
    LICENSE = "license"
    PICKLE = "pickle"
    CUSTOM_CODE = "custom code"
    GATES = "gates"
    GATED = "gated"
    LORA = "lora"
    NOT_FINITE = "not finite"
    UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Reason:
    """One reason against an expert.

    Attributes:
        kind: what sort of problem it is.
        detail: what was found; made printable, since it may quote untrusted files.
        remedy: how to resolve it, or None; made printable as well.
    """

    kind: ReasonKind
    detail: str
    remedy: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "detail", printable(self.detail, _MOST_SHOWN))
        object.__setattr__(self, "remedy", self.remedy and printable(self.remedy, _MOST_SHOWN))

    def __str__(self) -> str:
        return f"{self.kind.value}: {self.detail}"
