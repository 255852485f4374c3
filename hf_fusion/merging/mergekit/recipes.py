"""mergekit's recipes, read as they are: their keys, their defaults and their conventions, as a `Recipe`.

What mergekit 0.1.4 reads without using it (``int8_mask``, ``density`` of a method that has none, …) is named in the
log; what it uses and this cannot is an error that names the key. Two things differ on purpose: everything is computed
in single precision whatever ``dtype`` says, and other tensors than embeddings whose sizes differ are refused by a table
instead of being left out. Embeddings are cut to the smallest vocabulary where no tokenizer is asked for. How their
``parameters`` are read, with gradients and ``filter``, see `mergekit.filters`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from hf_fusion.errors import FusionError, shown, suggestion
from hf_fusion.merging.mergekit.filters import by_filters, chained, read_parameters
from hf_fusion.merging.methods import MERGE_METHODS, METHODS_LISTING
from hf_fusion.merging.settings import Setting
from hf_fusion.recipe import DTYPES, SMALLEST, Layers, Recipe, RecipeExpert, Slice, SliceSource
from hf_fusion.schema import Before, Expected, KeyPath, Settings, read_class, refuse_unknown
from hf_fusion.types import ModelRef

logger = logging.getLogger(__name__)

# mergekit's modules of architectures with two stacks -> what their tensors' names contain
_MODULES = {"encoder": ("encoder.",), "decoder": ("decoder.",), "shared": ("shared.", "lm_head.")}


# ---------------------------------------------------------------- what a file holds


def model_name(value: object, where: KeyPath) -> str:
    """A model as mergekit names it: ``path``, ``path@revision`` or ``model+lora``, or those as a mapping.

    Args:
        value: as YAML gives it.
        where: its key path.
    """
    wanted = "expected owner/name, owner/name@revision, model+lora or a folder"
    if isinstance(value, str) and value.strip() and "\n" not in value:
        if value.count("@") > 1 + ("+" in value) or value.count("+") > 1:
            raise FusionError(f"{where} is {shown(value)}, {wanted}")
        return value
    if isinstance(value, Mapping):
        known = ("path", "revision") if "path" in value else ("model", "lora")
        refuse_unknown(value, known, where)
        first, second = (value.get(key) for key in known)
        if known[0] == "path" and isinstance(first, str) and isinstance(second, (str, type(None))):
            return str(ModelRef(first, second or None))
        if known[0] == "model" and first is not None:
            return "+".join(model_name(part, where.inner(key)) for key, part in value.items() if part is not None)
    raise FusionError(f"{where} is {shown(value)}, {wanted}")


def _or_none(value: object, where: KeyPath) -> str | None:
    return model_name(value, where) if value else None


def _tokenizer_source(value: object, where: KeyPath) -> str | None:
    """``model:PATH`` is how mergekit once wrote a model here."""
    return (
        None if value is None else model_name(value.removeprefix("model:") if isinstance(value, str) else value, where)
    )


def _token(value: Any, where: KeyPath) -> Any:
    """One of ``tokens``: where its embedding comes from, with the model's name as ours."""
    source = value.get("source") if isinstance(value, Mapping) else None
    if source is None:
        return value
    if isinstance(source, Mapping) and "kind" in source:
        known = {"model": model_name(source["model"], where.inner("source", "model"))} if "model" in source else {}
        return {**value, "source": {**source, **known}}
    return {**value, "source": model_name(source, where.inner("source"))}


Model = Annotated[str, Before(model_name), Expected("owner/name, owner/name@revision, model+lora or a folder")]
MaybeModel = Annotated[str | None, Before(_or_none)]
MaybeDtype = Annotated[
    str | None,
    Before(lambda value, where: value.removeprefix("torch.") if isinstance(value, str) else value),
    Expected(f"one of {', '.join(DTYPES)}", lambda value: value in (None, *DTYPES)),
]
Token = Annotated[dict[Any, Any], Before(_token), Expected("{source: …, force: …}")]


@dataclass(frozen=True)
class _Model:
    """One of ``models``."""

    model: Model
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class _LayerRange:
    """One of the ``sources`` of a slice."""

    model: Model
    layer_range: Layers
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class _Slice:
    """One of ``slices``."""

    sources: Annotated[list[_LayerRange], Expected("a list of {model: …, layer_range: …}", bool)]
    parameters: Settings = field(default_factory=dict)
    base_model: MaybeModel = None
    residual_weight: Any = None


Models = Annotated[list[_Model], Before(lambda value, where: value or [])]
Slices = Annotated[list[_Slice], Before(lambda value, where: value or [])]


@dataclass(frozen=True)
class _Module:
    """One of ``modules``, or all that a file without them holds."""

    models: Models = field(default_factory=list)
    slices: Slices = field(default_factory=list)
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class _Tokenizer:
    """What ``tokenizer`` holds."""

    source: Annotated[str, Before(_tokenizer_source)] = "union"
    tokens: Annotated[dict[str, Token], Before(lambda value, where: value or {})] = field(default_factory=dict)
    pad_to_multiple_of: Any = None


@dataclass(frozen=True)
class _File:
    """A recipe of mergekit's."""

    merge_method: Annotated[str, Expected("the name of a method")]
    base_model: MaybeModel = None
    models: Models = field(default_factory=list)
    slices: Slices = field(default_factory=list)
    modules: Annotated[dict[str, _Module], Before(lambda value, where: value or {}), Expected("modules by name")] = (
        field(default_factory=dict)
    )
    parameters: Settings = field(default_factory=dict)
    dtype: MaybeDtype = None
    out_dtype: MaybeDtype = None
    tokenizer: Annotated[_Tokenizer, Expected("{source: union, base or a model}")] | None = None
    tokenizer_source: Annotated[str | None, Before(_tokenizer_source)] = None
    chat_template: str | None = None


# ---------------------------------------------------------------- as one of ours


def from_mergekit(content: Mapping[str, Any], name: str, quiet: bool = False) -> Recipe:
    """A recipe of mergekit's as one of ours.

    Args:
        content: as YAML gives it.
        name: what errors call the file.
        quiet: whether what is not used is left out of the log.

    Raises:
        FusionError: naming the file, the key and what is wrong with it or not supported.
    """
    return _Reader(read_class(_File, content, KeyPath(name)), KeyPath(name), quiet).recipe()


class _Reader:
    """What a recipe of mergekit's says, put into the words of ours."""

    def __init__(self, file: _File, where: KeyPath, quiet: bool) -> None:
        self.quiet = quiet
        self.file, self.where, self.method, self.base = file, where, file.merge_method, file.base_model
        self._ignored: dict[str, None] = {}
        usable = [name for name, row in MERGE_METHODS.items() if row.mergekit is not None]
        if self.method not in usable:
            raise self._refused(
                f"merge_method {shown(self.method)} is not supported", suggestion(self.method, usable, METHODS_LISTING)
            )
        self.parameters = MERGE_METHODS[self.method].mergekit or {}

    def _refused(self, what: str, hint: str | None = None) -> FusionError:
        return FusionError(f"{self.where}: {what}", hint)

    def recipe(self) -> Recipe:
        """All of it."""
        file = self.file
        given = [key for key in ("models", "slices", "modules") if getattr(file, key)]
        if len(given) != 1:
            raise self._refused(f"exactly one of models, slices and modules is expected, not {given}")
        globals_ = self._settings(file.parameters, self.where.inner("parameters"))
        slices: tuple[Slice, ...] = ()
        if file.modules:
            self._check_modules(file.modules)
        if file.modules and "default" not in file.modules:
            globals_, experts = self._stacks(file.modules, globals_)
        else:
            stack, where = _Module(file.models, file.slices), self.where
            if file.modules:
                stack, where = file.modules["default"], where.inner("modules", "default")
            globals_ = chained(self._settings(stack.parameters, where.inner("parameters")), globals_)
            slices = self._slices(stack, where)
            experts = self._experts(stack, where, slices)
        if file.tokenizer is not None and file.tokenizer_source is not None:
            raise self._refused("tokenizer_source and tokenizer mean the same: give only one")
        recipe = Recipe(
            self.method,
            experts,
            self.base,
            self._complete(globals_),
            file.out_dtype or file.dtype,
            slices,
            self._tokenizer(file.tokenizer) if file.tokenizer else file.tokenizer_source or SMALLEST,
            file.chat_template,
        )
        if self._ignored and not self.quiet:
            logger.warning("%s: %s does not use %s: ignored", self.where, self.method, ", ".join(self._ignored))
        return self._placed(_all_kept(recipe) if "epsilon" in self.parameters else recipe)

    # ------------------------------------------------------------ models

    def _experts(self, holder: _Module, where: KeyPath, slices: tuple[Slice, ...]) -> tuple[RecipeExpert, ...]:
        """The models of ``models``, or all of ``slices``, in order; the base among them, if it is."""
        if slices:
            return tuple(map(RecipeExpert, dict.fromkeys(s.model for slice_ in slices for s in slice_.sources)))
        rows = [(row, where.inner("models", i, "parameters")) for i, row in enumerate(holder.models)]
        return tuple(RecipeExpert(row.model, None, self._settings(row.parameters, at, True)) for row, at in rows)

    def _slices(self, holder: _Module, where: KeyPath) -> tuple[Slice, ...]:
        slices = []
        for number, row in enumerate(holder.slices):
            at = where.inner("slices", number)
            if row.residual_weight is not None:
                self._ignored["residual_weight"] = None
            if row.base_model not in (None, self.base):
                raise FusionError(f"{at}.base_model is not supported", "give one base_model for the whole recipe")
            sources = []
            for i, source in enumerate(row.sources):
                settings = self._settings(source.parameters, at.inner("sources", i, "parameters"), True)
                sources.append(SliceSource(source.model, source.layer_range, settings))
            slices.append(Slice(tuple(sources), self._settings(row.parameters, at.inner("parameters"))))
            slices[-1].check(at)
        return tuple(slices)

    def _placed(self, recipe: Recipe) -> Recipe:
        """The base where ours expects it: apart from the experts, or as the first of them."""
        base, others = self.base, tuple(expert for expert in recipe.experts if expert.model != self.base)
        row = MERGE_METHODS[self.method]
        if base is None:
            return recipe
        if row.base:
            return replace(recipe, experts=others)
        listed = next((expert for expert in recipe.experts if expert.model == base), None)
        if listed is None and not recipe.slices and "weight" in self.parameters and "weight" not in recipe.parameters:
            raise self._refused(
                f"base_model {base} would be merged with the others, but has no weight",
                "list it among the models, or leave it out",
            )
        return replace(recipe, base=None, experts=(listed or RecipeExpert(base), *others))

    def _check_modules(self, modules: Mapping[str, _Module]) -> None:
        """Refuses modules that one recipe of ours cannot say."""
        refuse_unknown(modules, ("default", *_MODULES), self.where.inner("modules"))
        for key, module in modules.items():
            if bool(module.models) == bool(module.slices):
                raise self._refused(f"modules.{key} needs either models or slices")
            if key != "default" and module.slices:
                raise self._refused(f"modules.{key}.slices is not supported", "slices need a single stack")
        if "default" in modules and len(modules) > 1:
            raise self._refused("modules has default and others", "a model has one or the other")
        if "default" not in modules and (missing := {"encoder", "decoder"} - set(modules)):
            raise self._refused(f"modules lacks {min(missing)}: it would not be merged at all")

    def _stacks(
        self, modules: Mapping[str, _Module], globals_: Mapping[str, Setting]
    ) -> tuple[dict[str, Setting], tuple[RecipeExpert, ...]]:
        """Several modules of the same models: what differs between them are settings by the tensors' names."""
        paths = {key: self.where.inner("modules", key) for key in modules}
        experts = {key: self._experts(module, paths[key], ()) for key, module in modules.items()}
        names = {key: sorted(expert.model for expert in found) for key, found in experts.items()}
        if other := next((key for key, found in names.items() if found != names["decoder"]), None):
            raise self._refused(f"modules.{other} merges other models than modules.decoder: not supported")
        by_module = {
            key: self._settings(module.parameters, paths[key].inner("parameters")) for key, module in modules.items()
        }

        def of_model(model: str) -> dict[str, Setting]:
            found = {key: next(e.parameters for e in es if e.model == model) for key, es in experts.items()}
            return by_filters(found, _MODULES)

        models = dict.fromkeys(expert.model for expert in experts["decoder"])
        shared = chained(by_filters(by_module, _MODULES), globals_)
        return shared, tuple(RecipeExpert(model, None, of_model(model)) for model in models)

    # ------------------------------------------------------------ the rest

    def _settings(self, given: Mapping[str, Any], where: KeyPath, of_model: bool = False) -> dict[str, Setting]:
        def ignore(what: str) -> None:
            self._ignored[what] = None

        return read_parameters(self.method, given, where, of_model=of_model, ignore=ignore)

    def _complete(self, globals_: Mapping[str, Setting]) -> dict[str, Setting]:
        """The recipe's parameters, with mergekit's defaults where they say nothing."""
        defaults = {}
        for parameter in self.parameters.values():
            if parameter.default is not None and parameter.ours not in defaults:
                defaults[parameter.ours] = parameter.value(parameter.default)
        return chained(globals_, defaults) | dict(MERGE_METHODS[self.method].mergekit_always)

    def _tokenizer(self, given: _Tokenizer) -> str | dict[str, Any]:
        """``tokenizer`` as ours; without one, vocabularies are cut to the smallest."""
        found = {key: value for key, value in vars(given).items() if value not in (None, {})}
        return found if len(found) > 1 else given.source


def _all_kept(recipe: Recipe) -> Recipe:
    """DELLA with density 1 prunes nothing, whatever epsilon says: it is 0 wherever that density counts."""

    def reduced(given: dict[str, Setting], above: Mapping[str, Setting]) -> dict[str, Setting]:
        if not given.keys() & {"density", "epsilon"}:
            return given
        every = {**above, **given}
        rest = recipe.parameters["epsilon"] if "density" in given and "epsilon" not in given else every["epsilon"]
        return {**given, "epsilon": 0.0 if every["density"] == 1.0 else rest}

    shared = reduced(recipe.parameters, {})
    slices = []
    for slice_ in recipe.slices:
        given = reduced(slice_.parameters, shared)
        sources = [replace(s, parameters=reduced(s.parameters, {**shared, **given})) for s in slice_.sources]
        slices.append(Slice(tuple(sources), given))
    experts = tuple(replace(expert, parameters=reduced(expert.parameters, shared)) for expert in recipe.experts)
    return replace(recipe, experts=experts, parameters=shared, slices=tuple(slices))
