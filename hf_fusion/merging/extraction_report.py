"""What an extracted adapter keeps of its fine-tune: by module, as JSON, as a model card, and in notebooks."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from hf_fusion.hub.readme import escape_markdown
from hf_fusion.models.fused_html import facts_table
from hf_fusion.types import ModelRef

FACTS_FILE = "extraction.json"
CARD_MARK = "<!-- written by hf-fusion extract-lora -->"
"""Line of a card by which it is recognised: one that was written by hand is not replaced."""


@dataclass(frozen=True)
class ExtractedPart:
    """A module or tensor that differs from the base's, or that the base does not have.

    Attributes:
        name: path of a module that is adapted or saved in full; name of a tensor that is left out.
        kind: "lora"; "bias" of an adapted module (PEFT's ``lora_bias``); "saved" in full (``modules_to_save``);
            or "left out".
        parameters: its number of values in the fine-tune.
        rank: of its LoRA; 0 for other kinds.
        change: ‖Δ‖ / ‖θ0‖, where Δ = θ - θ0; None if the base has no such tensor, or one of another shape.
        error: ‖Δ - Δ'‖ / ‖Δ‖ of the stored change Δ': 0 where it is exact, 1 where it is left out.
        squared: ‖Δ‖²; 0 if unknown.
        note: why it is left out, or what must be done before the adapter is loaded.
    """

    name: str
    kind: Literal["lora", "bias", "saved", "left out"]
    parameters: int
    rank: int = 0
    change: float | None = None
    error: float = 0.0
    squared: float = 0.0
    note: str = ""

    def row(self) -> dict[str, Any]:
        """The part as a row of a table."""
        return {
            "module": self.name,
            "stored as": self.kind,
            "rank": self.rank or None,
            "change": self.change,
            "error": None if self.kind == "saved" else self.error,
            "note": self.note,
        }


@dataclass(frozen=True)
class Extraction:
    """The result of `extract_lora`.

    Attributes:
        folder: of the adapter.
        model: the fine-tune, with its commit.
        base: its base, with its commit.
        parts: all modules and tensors that differ, or that the base does not have.
        nbytes: bytes of the adapter's weights.
        seconds: duration, including reading and writing.
    """

    folder: Path
    model: str
    base: str
    parts: tuple[ExtractedPart, ...]
    nbytes: int
    seconds: float

    @property
    def error(self) -> float:
        """‖Δ - Δ'‖ / ‖Δ‖ over all tensors of the base, those that are left out included."""
        total = sum(part.squared for part in self.parts)
        return math.sqrt(sum(part.error**2 * part.squared for part in self.parts) / total) if total else 0.0

    @property
    def ranks(self) -> dict[str, int]:
        """Module path -> rank."""
        return {part.name: part.rank for part in self.parts if part.kind == "lora"}

    @property
    def errors(self) -> dict[str, float]:
        """Module path -> relative error of its LoRA."""
        return {part.name: part.error for part in self.parts if part.kind == "lora"}

    @property
    def left_out(self) -> list[str]:
        """Tensors that differ and are not in the adapter."""
        return [part.name for part in self.parts if part.kind == "left out"]

    @property
    def warnings(self) -> list[str]:
        """What an adapter cannot hold, or was not asked to hold, and what its base needs first; one sentence each."""
        found: dict[str, list[str]] = {}
        for part in self.parts:
            if part.note:
                found.setdefault(part.note, []).append(part.name)
        return [f"{note}: {', '.join(names[:5])}{_more(names)}" for note, names in found.items()]

    def facts(self) -> dict[str, Any]:
        """All of it as plain data."""
        parts = [{key: value for key, value in asdict(part).items() if key != "squared"} for part in self.parts]
        return {"model": self.model, "base": self.base, "relative_error": self.error, "modules": parts}

    def _repr_html_(self) -> str:
        return facts_table(
            {
                "folder": self.folder,
                "model": self.model,
                "base": self.base,
                "relative error": round(self.error, 6),
                "linear layers": len(self.ranks),
                "saved in full": [part.name for part in self.parts if part.kind == "saved"],
                "left out": self.left_out,
                "MB": round(self.nbytes / 1e6, 1),
            }
        )


def _more(names: list[str]) -> str:
    return f" and {len(names) - 5} more" if len(names) > 5 else ""


def facts_json(extraction: Extraction) -> str:
    """Content of `FACTS_FILE`."""
    return json.dumps(extraction.facts(), indent=1) + "\n"


def card(extraction: Extraction, license_id: str | None, task: str | None) -> str:
    """The adapter's model card: from what it was extracted, and the error of each module."""
    base, model = ModelRef.parse(extraction.base), ModelRef.parse(extraction.model)
    metadata: dict[str, Any] = {"library_name": "peft", "tags": ["hf-fusion-expert", "lora"]}
    metadata |= {"base_model": base.id, "base_model_relation": "adapter"} if base.is_repo and not base.is_folder else {}
    metadata |= {"license": license_id} if license_id else {}
    metadata |= {"pipeline_tag": task} if task else {}
    names = [
        escape_markdown(ref.id if ref.is_repo and not ref.is_folder else Path(ref.id).name) for ref in (model, base)
    ]
    lines = [f"---\n{yaml.safe_dump(metadata, sort_keys=False).strip()}\n---", CARD_MARK]
    lines += [f"# {names[0]} as a LoRA adapter of {names[1]}"]
    lines += [
        f"Extracted from the weights of {names[0]} by singular value decomposition of what differs from {names[1]}."
        f" The adapter's relative error ‖Δ − Δ'‖ / ‖Δ‖ over all weights is **{extraction.error:.4g}**."
    ]
    lines += [f"- {escape_markdown(warning)}" for warning in extraction.warnings]
    table = ["| module | stored as | rank | change | error |", "|---|---|--:|--:|--:|"]
    for part in extraction.parts:
        cells = [escape_markdown(part.name), part.kind, str(part.rank or ""), *map(_number, (part.change, part.error))]
        table.append(f"| {' | '.join(cells)} |")
    lines += ["Change is ‖Δ‖ / ‖θ0‖, error is ‖Δ − Δ'‖ / ‖Δ‖.", "\n".join(table)]
    return "\n\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


__all__ = ["ExtractedPart", "Extraction"]
