"""``fusion.yaml``: what a fused model was made of, exactly enough to make it again.

method: foe
base: owner/base@<sha>
experts:
  - owner/expert-a@<sha>
  - {model: owner/expert-b@<sha>, weight: 0.5}
parameters: {mode: output}
dtype: bfloat16

Static merges may also take layers from here and there (``slices``), and a tokenizer of all (``tokenizer``); the recipes
of mergekit are read as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from hf_fusion.errors import FusionError, shown
from hf_fusion.io.files import own_file
from hf_fusion.io.saving import write_file
from hf_fusion.io.yaml_files import read_yaml
from hf_fusion.types import ModelRef

RECIPE_FILE = "fusion.yaml"
RECIPE_ATTRIBUTE = "fusion_recipe"
"""Where a fused model has its recipe."""
SMALLEST = "smallest"
"""The tokenizer of recipes that are matched by number and cut to the smallest vocabulary."""
DTYPES = ("float32", "float16", "bfloat16")
# keys that a recipe of mergekit has and ours has not
MERGEKIT = {"merge_method", "models", "base_model", "modules"}


@dataclass(frozen=True)
class RecipeExpert:
    """One expert of a recipe.

    Attributes:
        model: ``owner/name@sha``, or a folder.
        weight: its share, for methods that weigh their experts.
        parameters: what a static method lets every expert have of its own.
    """

    model: str
    weight: float | None = None
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """All that is its own, by the method's names."""
        return self.parameters | ({} if self.weight is None else {"weight": self.weight})

    def to_plain(self) -> Any:
        """As written to YAML: the name alone where there is nothing else."""
        own = {"model": self.model, "weight": self.weight, "parameters": self.parameters}
        own = {key: value for key, value in own.items() if value not in (None, {})}
        return own if len(own) > 1 else self.model


@dataclass(frozen=True)
class SliceSource:
    """Layers of one model.

    Attributes:
        model: as the recipe's base or experts name it.
        start: its first layer.
        stop: the layer behind its last.
        parameters: the method's, for this model in this slice.
    """

    model: str
    start: int
    stop: int
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Layers of the merged model, made of as many layers of each source.

    Attributes:
        sources: whose layers.
        parameters: the method's, for this slice.
    """

    sources: tuple[SliceSource, ...]
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """How many layers it makes."""
        return self.sources[0].stop - self.sources[0].start

    def to_plain(self) -> dict[str, Any]:
        """As written to YAML."""
        sources = [
            {"model": s.model, "layers": [s.start, s.stop]} | ({"parameters": s.parameters} if s.parameters else {})
            for s in self.sources
        ]
        return {"sources": sources} | ({"parameters": self.parameters} if self.parameters else {})


@dataclass(frozen=True)
class Recipe:
    """A fusion as data.

    Attributes:
        method: name of the method, as `hf_fusion.fuse` takes it.
        experts: what is fused.
        base: ``owner/name@sha`` of the base, where the method or the adapters need one.
        parameters: the method's own options. Every static method also takes ``seed``; ``mismatch`` (`MISMATCHES`), for
            tensors that do not match; and ``untie: true``, which gives the merged model a head of its own where some of
            its models tie theirs to the embeddings.
        dtype: "float32", "float16" or "bfloat16"; None keeps the checkpoints' own.
        slices: of static merges: the merged model's layers, where they are not those of its models one by one.
        tokenizer: of static merges: "union" of all, "base", or the model whose tokenizer the merged one has, or these
            as the ``source`` of a mapping with ``tokens`` and ``pad_to_multiple_of`` (`merging.tokenizers`);
            "smallest": the first's, cut to the smallest vocabulary (see there); None: that of the
            base, or of the first expert.
        chat_template: of static merges: a Jinja template, "auto", a name (`merging.tokenizers`), or the
            model whose template is taken.
    """

    method: str
    experts: tuple[RecipeExpert, ...]
    base: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    slices: tuple[Slice, ...] = ()
    tokenizer: str | dict[str, Any] | None = None
    chat_template: str | None = None

    @property
    def unpinned(self) -> list[str]:
        """Models that are not named by a full commit sha or by their content: paths, names alone, branches."""
        named = [expert.model for expert in self.experts] + ([self.base] if self.base else [])
        return [name for name in named if not is_pinned(name)]

    @property
    def elsewhere(self) -> bool:
        """Whether experts or the base were folders that only the machine that fused them has."""
        return any(ref.is_content for name in self.models for ref in ModelRef.parse_pair(name) if ref)

    @property
    def models(self) -> list[str]:
        """Every model it names: experts, base, sources of layers, of the tokenizer and of the chat template."""
        named = [expert.model for expert in self.experts] + ([self.base] if self.base else [])
        named += [source.model for slice_ in self.slices for source in slice_.sources]
        return named + [name for name in (*_sources(self.tokenizer), self.chat_template) if name]

    def to_dict(self) -> dict[str, Any]:
        """As written to YAML: plain values, without what is not set."""
        content = {
            "method": self.method,
            "base": self.base,
            "experts": [expert.to_plain() for expert in self.experts],
            "slices": [slice_.to_plain() for slice_ in self.slices],
            "parameters": self.parameters,
            "dtype": self.dtype,
            "tokenizer": self.tokenizer,
            "chat_template": self.chat_template,
        }
        return {key: value for key, value in content.items() if value not in (None, {}, [])}

    def to_yaml(self) -> str:
        """The text of ``fusion.yaml``."""
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=10_000)
        return text

    def save(self, path: str | Path) -> None:
        """Write the recipe to a file, all of it or nothing."""
        write_file(path, self.to_yaml())

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from a file, or from ``fusion.yaml`` in a folder.

        Raises:
            FusionError: naming the file, the key and the reason.
        """
        path = recipe_file(path)
        return cls.from_dict(read_yaml(path), str(path))

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
        if MERGEKIT & content.keys():
            raise FusionError(f"{name} is a recipe of mergekit's.", hint=f"hf_fusion.load_recipe({name!r}) reads it")
        known = [f.name for f in fields(cls)]
        if unknown := [key for key in content if key not in known]:
            raise FusionError(f"{name}: {shown(unknown[0])} is not a key of a recipe.", hint=f"use {', '.join(known)}")
        for key, (is_valid, expected) in _VALUES.items():
            if not is_valid(content.get(key)):
                raise FusionError(f"{name}: {key} is {shown(content.get(key))}, expected {expected}.")
        experts = tuple(_expert(entry, f"experts[{i}]", name) for i, entry in enumerate(content["experts"]))
        weighed = [expert for expert in experts if expert.weight is not None]
        if weighed and len(weighed) < len(experts):
            raise FusionError(f"{name}: experts have weights only partly; give one to each or to none.")
        slices = tuple(_slice(entry, f"slices[{i}]", name) for i, entry in enumerate(content.get("slices") or []))
        parameters = dict(content.get("parameters") or {})
        return cls(**{**content, "experts": experts, "slices": slices, "parameters": parameters})


def recipe_file(path: str | Path) -> Path:
    """The file of a recipe: the path itself, or ``fusion.yaml`` where it is a folder."""
    path = Path(path)
    with suppress(OSError):  # longer than any path: reading it says so
        if path.is_dir():
            path = path / RECIPE_FILE
            own_file(path)  # one that the user names may be a link
    return path


def _sources(tokenizer: Any) -> list[str]:
    """The models that a tokenizer is made of."""
    if isinstance(tokenizer, str):
        return [tokenizer]
    found = []
    for key, value in tokenizer.items() if isinstance(tokenizer, Mapping) else ():
        if isinstance(value, Mapping) or key in ("source", "model"):
            found += _sources(value)
    return found


def is_pinned(name: str) -> bool:
    """Whether a model is named by a full commit sha, or by its content; of ``base+adapter``, both."""
    return all(ref.pinned for ref in ModelRef.parse_pair(name) if ref)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and "\n" not in value


def is_number(value: object) -> bool:
    """Whether a plain value is a number that a float holds: not NaN, Inf, true or false."""
    # whole numbers of any length are exact in Python: one that no float reaches is as good as Inf
    return type(value) is float and math.isfinite(value) or type(value) is int and abs(value) < 1 << 1023


def _is_settings(value: object) -> bool:
    return value is None or (isinstance(value, Mapping) and all(isinstance(key, str) for key in value))


# key -> (whether a value will do, what is expected)
_VALUES: dict[str, tuple[Any, str]] = {
    "method": (_is_name, "the name of a method"),
    "experts": (lambda v: isinstance(v, list) and len(v) > 0, "a list of at least one expert"),
    "base": (lambda v: v is None or _is_name(v), "owner/name@sha"),
    "parameters": (_is_settings, "names and values"),
    "slices": (lambda v: v is None or isinstance(v, list), "a list of slices"),
    "tokenizer": (lambda v: v is None or _is_name(v) or isinstance(v, Mapping), "union, base, smallest or a model"),
    "chat_template": (lambda v: v is None or isinstance(v, str), "a template, or the model that has it"),
    "dtype": (lambda v: v is None or v in DTYPES, f"one of {', '.join(DTYPES)}"),
}


def _expert(entry: object, key: str, name: str) -> RecipeExpert:
    """One entry of ``experts``: a name, or a name with what is its own."""
    if _is_name(entry):
        return RecipeExpert(str(entry))
    known = {"model", "weight", "parameters"}
    if not isinstance(entry, Mapping) or not _is_name(entry.get("model")) or set(entry) - known:
        raise FusionError(f"{name}: {key} is {shown(entry)}, expected owner/name@sha or {{model: …, weight: …}}.")
    weight = entry.get("weight")
    if weight is not None and not is_number(weight):
        raise FusionError(f"{name}: {key}.weight is {shown(weight)}, expected a number.")
    if not _is_settings(entry.get("parameters")):
        raise FusionError(f"{name}: {key}.parameters is {shown(entry['parameters'])}, expected names and values.")
    parameters = dict(entry.get("parameters") or {})
    return RecipeExpert(str(entry["model"]), None if weight is None else float(weight), parameters)


def _slice(entry: object, key: str, name: str) -> Slice:
    """One entry of ``slices``: like many layers of one model or more."""
    example = "expected {sources: [{model: …, layers: [first, behind the last]}]}"
    if not isinstance(entry, Mapping) or set(entry) - {"sources", "parameters"}:
        raise FusionError(f"{name}: {key} is {shown(entry)}, {example}.")
    if not isinstance(entry.get("sources"), list) or not entry["sources"]:
        raise FusionError(f"{name}: {key}.sources is {shown(entry.get('sources'))}, {example}.")
    if not _is_settings(entry.get("parameters")):
        raise FusionError(f"{name}: {key}.parameters is {shown(entry['parameters'])}, expected names and values.")
    sources = []
    for source in entry["sources"]:
        if not _is_source(source):
            raise FusionError(f"{name}: {key}.sources holds {shown(source)}, {example}.")
        start, stop = source["layers"]
        sources.append(SliceSource(source["model"], start, stop, dict(source.get("parameters") or {})))
    if len({source.stop - source.start for source in sources}) > 1:
        raise FusionError(f"{name}: {key} takes unlike numbers of layers from its sources.")
    return Slice(tuple(sources), dict(entry.get("parameters") or {}))


def _is_source(value: object) -> bool:
    if not isinstance(value, Mapping) or set(value) - {"model", "layers", "parameters"}:
        return False
    match value.get("layers"):
        case [start, stop] if type(start) is int and type(stop) is int and 0 <= start < stop:
            return _is_name(value.get("model")) and _is_settings(value.get("parameters"))
    return False
