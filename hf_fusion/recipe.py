"""``fusion.yaml``: what a fused model was made from, so that it can be made again.

method: foe
base: owner/base@<sha>
experts:
  - owner/expert-a@<sha>
  - {model: owner/expert-b@<sha>, weight: 0.5}
parameters: {mode: output}
dtype: bfloat16

Static merges may also combine layers of several models (``slices``) and their tokenizers (``tokenizer``). mergekit's
recipes are read as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Annotated, Any

import yaml

from hf_fusion.errors import FusionError
from hf_fusion.io.files import own_file
from hf_fusion.io.saving import write_file
from hf_fusion.io.yaml_files import read_yaml
from hf_fusion.schema import Before, Expected, KeyPath, OneOf, Settings, read_class
from hf_fusion.types import ModelRef

RECIPE_FILE = "fusion.yaml"
RECIPE_ATTRIBUTE = "fusion_recipe"
"""The attribute of a fused model that contains its recipe."""
SMALLEST = "smallest"
"""Value of ``tokenizer`` for matching token ids and truncating to the smallest vocabulary."""
DTYPES = ("float32", "float16", "bfloat16")


def _without_unset(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if value not in (None, {}, [])}


def _is_name(value: str) -> bool:
    return bool(value.strip()) and "\n" not in value


def is_span(layers: tuple[int, int]) -> bool:
    """Whether these are a first layer and the layer after the last."""
    return 0 <= layers[0] < layers[1]


ModelName = Annotated[str, Expected("owner/name@sha, or a folder", _is_name)]
Layers = Annotated[tuple[int, int], Expected("[first layer, layer after the last]", is_span)]


@dataclass(frozen=True)
class RecipeExpert:
    """One expert of a recipe.

    Attributes:
        model: ``owner/name@sha``, or a folder.
        weight: its weight, for methods that weight their experts.
        parameters: the method's parameters for this expert only.
    """

    model: ModelName
    weight: float | None = None
    parameters: Settings = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """Its parameters and its weight, by the method's names."""
        return self.parameters | ({} if self.weight is None else {"weight": self.weight})

    def to_plain(self) -> Any:
        """The expert as plain values.

        Returns:
            The model's name if nothing else is set; otherwise a dict with what is set.
        """
        plain = _without_unset(vars(self))
        return plain if len(plain) > 1 else self.model


_Expert = Annotated[
    RecipeExpert,
    Before(lambda value, where: {"model": value} if isinstance(value, str) else value),
    Expected("owner/name@sha or {model: …, weight: …}"),
]


@dataclass(frozen=True)
class SliceSource:
    """Layers of one model.

    Attributes:
        model: as the recipe's base or experts name it.
        layers: the first layer, and the layer after the last.
        parameters: the method's parameters for this model in this slice.
    """

    model: ModelName
    layers: Layers
    parameters: Settings = field(default_factory=dict)

    @property
    def start(self) -> int:
        """The first layer."""
        return self.layers[0]

    @property
    def stop(self) -> int:
        """The layer after the last."""
        return self.layers[1]


@dataclass(frozen=True)
class Slice:
    """Layers of the merged model, made from the same number of layers of each source.

    Attributes:
        sources: the models and their layers.
        parameters: the method's parameters for this slice.
    """

    sources: Annotated[
        tuple[SliceSource, ...], Expected("a list of {model: …, layers: [first layer, layer after the last]}", bool)
    ]
    parameters: Settings = field(default_factory=dict)

    def check(self, where: KeyPath) -> None:
        """Raises a `FusionError` if its sources have different numbers of layers."""
        if len({source.stop - source.start for source in self.sources}) > 1:
            raise FusionError(f"{where} takes different numbers of layers from its sources")

    @property
    def layers(self) -> int:
        """Number of layers in the slice."""
        return self.sources[0].stop - self.sources[0].start

    def to_plain(self) -> dict[str, Any]:
        """The slice as plain values for YAML."""
        sources = [_without_unset({**vars(source), "layers": [*source.layers]}) for source in self.sources]
        return _without_unset({"sources": sources, "parameters": self.parameters})


@dataclass(frozen=True)
class Recipe:
    """A fusion as data.

    Attributes:
        method: name of the method, as for `hf_fusion.fuse`.
        experts: the experts to fuse.
        base: ``owner/name@sha`` of the base, if the method or the adapters need one.
        parameters: options of the method. Every static method also takes ``seed``; ``mismatch`` (`MISMATCHES`), for
            tensors that do not match; and ``untie: true``, which gives the merged model a separate head if some of
            its models tie theirs to the embeddings.
        dtype: "float32", "float16" or "bfloat16"; None keeps those of the checkpoints.
        slices: for static merges: the layers of the merged model, if they are not those of its models one by one.
        tokenizer: for static merges: "union" of all, "base", or the model whose tokenizer the merged model gets; or one
            of these as the ``source`` of a mapping with ``tokens`` and ``pad_to_multiple_of`` (`merging.tokenizers`);
            "smallest": that of the first model, truncated to the smallest vocabulary; None: that of the base, or of
            the first expert.
        chat_template: for static merges: a Jinja template, "auto", a name (`merging.tokenizers`), or the
            model whose template is taken.
        stages: for static merges: recipes of models that this one, or another stage, names as base, expert or source;
            by these names. In a file, they may be documents with a ``name`` before the recipe.
    """

    method: Annotated[str, Expected("the name of a method", _is_name)]
    experts: Annotated[tuple[_Expert, ...], Expected("a list of at least one expert", bool)]
    base: ModelName | None = None
    parameters: Settings = field(default_factory=dict)
    dtype: Annotated[str, OneOf(DTYPES)] | None = None
    slices: Annotated[tuple[Slice, ...], Before(lambda value, where: () if value is None else value)] = ()
    tokenizer: Annotated[str, Expected("union, base, smallest or a model", _is_name)] | dict[Any, Any] | None = None
    chat_template: str | None = None
    stages: Annotated[
        dict[str, Recipe], Before(lambda value, where: value or {}), Expected("recipes by the name of their result")
    ] = field(default_factory=dict)

    @property
    def unpinned(self) -> list[str]:
        """Models that are named neither by a full commit sha nor by their content: paths, branches, bare ids."""
        named = [expert.model for expert in self.experts] + ([self.base] if self.base else [])
        named += [name for stage in self.stages.values() for name in stage.unpinned]
        return [name for name in named if not is_pinned(name) and name not in self.stages]

    @property
    def elsewhere(self) -> bool:
        """Whether experts or the base were folders on the machine that fused them, named by their content."""
        refs = [ref for name in self.models for ref in ModelRef.parse_pair(name) if ref]
        return any(ref.is_content and ref.id not in self.stages for ref in refs)

    @property
    def models(self) -> list[str]:
        """Every model it names: experts, base, sources of layers, of the tokenizer and of the chat template."""
        named = [expert.model for expert in self.experts] + ([self.base] if self.base else [])
        named += [source.model for slice_ in self.slices for source in slice_.sources]
        named += [name for name in (*_sources(self.tokenizer), self.chat_template) if name]
        return named + [name for stage in self.stages.values() for name in stage.models]

    @property
    def all_stages(self) -> list[Recipe]:
        """The recipe itself, then those of its stages."""
        return [self, *self.stages.values()]

    @property
    def outer_experts(self) -> list[str]:
        """The experts that are not made by the recipe itself: its own, then those of its stages, each once."""
        names = [expert.model for stage in self.all_stages for expert in stage.experts]
        known = dict.fromkeys(name for name in names if not self._has_stage(name))
        return [name for name in known if not self.stages or name != self.base]  # stages may merge the base, too

    @property
    def outer_base(self) -> str | None:
        """The base, unless it is the result of a stage."""
        return None if self.base is None or self._has_stage(self.base) else self.base

    def _has_stage(self, name: str) -> bool:
        return any(ref is not None and self.is_stage(ref) for ref in ModelRef.parse_pair(name))

    def is_stage(self, ref: ModelRef) -> bool:
        """Whether a reference names the result of a stage.

        Args:
            ref: with or without the digest of the stage's content.

        Returns:
            Whether its id is the name of a stage.
        """
        return ref.id in self.stages

    def renamed(self, change: Callable[[str], str]) -> Recipe:
        """The recipe with other names for its models; those of its stages are not changed.

        Args:
            change: old name -> new name; also called with other values of ``tokenizer`` and ``chat_template``.

        Returns:
            A new recipe.
        """

        def in_slice(slice_: Slice) -> Slice:
            return replace(slice_, sources=tuple(replace(s, model=change(s.model)) for s in slice_.sources))

        return replace(
            self,
            base=self.base and change(self.base),
            experts=tuple(replace(expert, model=change(expert.model)) for expert in self.experts),
            slices=tuple(map(in_slice, self.slices)),
            tokenizer=_renamed_sources(self.tokenizer, change) if self.tokenizer else None,
            chat_template=change(self.chat_template) if self.chat_template else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values.

        Returns:
            The content of ``fusion.yaml``, without what is not set.
        """
        content: dict[str, Any] = {
            "method": self.method,
            "base": self.base,
            "experts": [expert.to_plain() for expert in self.experts],
            "slices": [slice_.to_plain() for slice_ in self.slices],
            "parameters": self.parameters,
            "dtype": self.dtype,
            "tokenizer": self.tokenizer,
            "chat_template": self.chat_template,
            "stages": {name: stage.to_dict() for name, stage in self.stages.items()},
        }
        return _without_unset(content)

    def to_yaml(self) -> str:
        """The recipe as YAML.

        Returns:
            The text of ``fusion.yaml``.
        """
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=10_000)
        return text

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self.to_yaml())}</pre>"

    def save(self, path: str | Path) -> None:
        """Writes the recipe to a file, atomically.

        Args:
            path: path of the file.
        """
        write_file(path, self.to_yaml())

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Reads a recipe.

        Args:
            path: a file, or a folder with ``fusion.yaml``.

        Returns:
            The recipe.

        Raises:
            FusionError: the recipe is invalid; the error names the file, the key and the reason.
        """
        path = recipe_file(path)
        return cls.from_dict(read_yaml(path), str(path))

    @classmethod
    def from_dict(cls, content: object, name: str = RECIPE_FILE) -> Recipe:
        """Checks plain values and builds a recipe from them.

        Args:
            content: plain values, as read from YAML.
            name: name of the file, for errors.

        Returns:
            The recipe.

        Raises:
            FusionError: the recipe is invalid; the error names the file, the key and the reason.
        """
        if isinstance(content, Mapping) and "merge_method" in content:
            raise FusionError(f"{name} is a mergekit recipe", hint=f"read it with hf_fusion.load_recipe({name!r})")
        recipe = read_class(cls, content, KeyPath(name))
        for stage in (recipe, *recipe.stages.values()):
            stage._check(name)
        return recipe

    def _check(self, name: str) -> None:
        """Raises for what the types of its fields do not say."""
        if 0 < sum(expert.weight is not None for expert in self.experts) < len(self.experts):
            raise FusionError(
                f"{name}: only some of the experts have a weight", "give each expert a weight, or none of them"
            )
        for index, slice_ in enumerate(self.slices):
            slice_.check(KeyPath(name, f"slices[{index}]"))
        if nested := next((own for own, stage in self.stages.items() if stage.stages), None):
            raise FusionError(f"{name}: the stage {nested} has stages", "list all stages side by side")


def recipe_file(path: str | Path) -> Path:
    """The file of a recipe: the path itself, or ``fusion.yaml`` in it if it is a folder."""
    path = Path(path)
    with suppress(OSError):  # longer than any path: reading it says so
        if path.is_dir():
            path = path / RECIPE_FILE
            own_file(path)  # one that the user names may be a link
    return path


def _sources(tokenizer: object) -> list[str]:
    """The models whose tokenizers a tokenizer is made from."""
    if isinstance(tokenizer, str):
        return [tokenizer]
    found = []
    for key, value in tokenizer.items() if isinstance(tokenizer, Mapping) else ():
        if isinstance(value, Mapping) or key in ("source", "model"):
            found += _sources(value)
    return found


def _renamed_sources(tokenizer: Any, change: Callable[[str], str]) -> Any:
    if isinstance(tokenizer, str):
        return change(tokenizer)
    return {
        key: _renamed_sources(value, change)
        if isinstance(value, Mapping) or (key in ("source", "model") and isinstance(value, str))
        else value
        for key, value in tokenizer.items()
    }


def is_pinned(name: str) -> bool:
    """Whether a model is named by a full commit sha or by its content; for ``base+adapter``, whether both are."""
    return all(ref.pinned for ref in ModelRef.parse_pair(name) if ref)
