"""``fusion.yaml``: what a fused model was made of, exactly enough to make it again.

method: foe
base: owner/base@<sha>
experts:
  - owner/expert-a@<sha>
  - {model: owner/expert-b@<sha>, weight: 0.5}
parameters: {mode: output}
dtype: bfloat16
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from hf_fusion.errors import FusionError

RECIPE_FILE = "fusion.yaml"
DTYPES = ("float32", "float16", "bfloat16")
_PINNED = re.compile(r"[\w.-]+(/[\w.-]+)?@[0-9a-f]{40}")


@dataclass(frozen=True)
class RecipeExpert:
    """One expert of a recipe.

    Attributes:
        model: ``owner/name@sha``, or a folder.
        weight: its share, for methods that weigh their experts.
    """

    model: str
    weight: float | None = None


@dataclass(frozen=True)
class Recipe:
    """A fusion as data.

    Attributes:
        method: name of the method, as `hf_fusion.fuse` takes it.
        experts: what is fused.
        base: ``owner/name@sha`` of the base, where the method or the adapters need one.
        parameters: the method's own options.
        dtype: "float32", "float16" or "bfloat16"; None keeps the checkpoints' own.
    """

    method: str
    experts: tuple[RecipeExpert, ...]
    base: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    dtype: str | None = None

    @property
    def unpinned(self) -> list[str]:
        """Models that are not named by a full commit sha: folders, names alone, branches."""
        named = [expert.model for expert in self.experts] + ([self.base] if self.base else [])
        return [name for name in named if not _PINNED.fullmatch(name)]

    def to_dict(self) -> dict[str, Any]:
        """As written to YAML: plain values, without what is not set."""
        experts = [
            expert.model if expert.weight is None else {"model": expert.model, "weight": expert.weight}
            for expert in self.experts
        ]
        content = {
            "method": self.method,
            "base": self.base,
            "experts": experts,
            "parameters": self.parameters,
            "dtype": self.dtype,
        }
        return {key: value for key, value in content.items() if value not in (None, {})}

    def to_yaml(self) -> str:
        """The text of ``fusion.yaml``."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=10_000)

    def save(self, path: str | Path) -> None:
        """Write the recipe to a file."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from a file, or from ``fusion.yaml`` in a folder.

        Raises:
            FusionError: naming the file, the key and the reason.
        """
        path = Path(path)
        path = path / RECIPE_FILE if path.is_dir() else path
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise FusionError(f"{path} cannot be read ({error.strerror}).") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise FusionError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
        return cls.from_dict(content, str(path))

    @classmethod
    def from_dict(cls, content: object, name: str = RECIPE_FILE) -> Recipe:
        """Check plain values and make a recipe of them.

        Args:
            content: as YAML gives them.
            name: what errors call the file.

        Raises:
            FusionError: naming the file, the key and the reason.
        """
        if not isinstance(content, Mapping):
            raise FusionError(f"{name} holds no recipe: keys and values are expected.")
        known = [f.name for f in fields(cls)]
        if unknown := [key for key in content if key not in known]:
            raise FusionError(f"{name}: {unknown[0]!r} is not a key of a recipe.", hint=f"use {', '.join(known)}")
        for key, (is_valid, expected) in _VALUES.items():
            if not is_valid(content.get(key)):
                raise FusionError(f"{name}: {key} is {content.get(key)!r}, expected {expected}.")
        experts = tuple(_expert(entry, f"experts[{i}]", name) for i, entry in enumerate(content["experts"]))
        weighed = [expert for expert in experts if expert.weight is not None]
        if weighed and len(weighed) < len(experts):
            raise FusionError(f"{name}: experts have weights only partly; give one to each or to none.")
        return cls(**{**content, "experts": experts, "parameters": dict(content.get("parameters") or {})})


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\n" not in value


# key -> (whether a value will do, what is expected)
_VALUES: dict[str, tuple[Any, str]] = {
    "method": (_is_name, "the name of a method"),
    "experts": (lambda v: isinstance(v, list) and len(v) > 0, "a list of at least one expert"),
    "base": (lambda v: v is None or _is_name(v), "owner/name@sha"),
    "parameters": (
        lambda v: v is None or (isinstance(v, Mapping) and all(isinstance(key, str) for key in v)),
        "names and values",
    ),
    "dtype": (lambda v: v is None or v in DTYPES, f"one of {', '.join(DTYPES)}"),
}


def _expert(entry: object, key: str, name: str) -> RecipeExpert:
    """One entry of ``experts``: a name, or a name with a weight."""
    if _is_name(entry):
        return RecipeExpert(str(entry))
    if not isinstance(entry, Mapping) or not _is_name(entry.get("model")) or set(entry) - {"model", "weight"}:
        raise FusionError(f"{name}: {key} is {entry!r}, expected owner/name@sha or {{model: …, weight: …}}.")
    weight = entry.get("weight")
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool) and math.isfinite(weight)
    if weight is not None and not is_number:
        raise FusionError(f"{name}: {key}.weight is {weight!r}, expected a number.")
    return RecipeExpert(str(entry["model"]), None if weight is None else float(weight))
