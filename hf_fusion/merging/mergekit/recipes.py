"""mergekit's recipes, read as they are: their keys, their defaults and their conventions, as a `Recipe`.

What mergekit 0.1.4 reads without using it (``int8_mask``, ``density`` of a method that has none, …) is named in the
log; what it uses and this cannot is an error that names the key. Two things differ on purpose: everything is computed
in single precision whatever ``dtype`` says, and other tensors than embeddings whose sizes differ are refused by a table
instead of being left out. Embeddings are cut to the smallest vocabulary where no tokenizer is asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from hf_fusion.errors import FusionError, shown
from hf_fusion.merging.mergekit.parameters import Parameter
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.recipe import DTYPES, SMALLEST, Recipe, RecipeExpert, Slice, SliceSource, is_number
from hf_fusion.types import ModelRef

logger = logging.getLogger(__name__)

Setting = Any


_KEYS = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "modules",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer",
    "tokenizer_source",
    "chat_template",
)
# mergekit's modules of architectures with two stacks -> what their tensors' names contain
_MODULES = {"encoder": ("encoder.",), "decoder": ("decoder.",), "shared": ("shared.", "lm_head.")}


def from_mergekit(content: Mapping[str, Any], name: str) -> Recipe:
    """A recipe of mergekit's as one of ours.

    Args:
        content: as YAML gives it.
        name: what errors call the file.

    Raises:
        FusionError: naming the file, the key and what is wrong with it or not supported.
    """
    return _Reader(content, name).recipe()


def _known_to_mergekit() -> set[str]:
    """What mergekit reads for any method; where a method has no use for one, it is left out."""
    names = {name for row in MERGE_METHODS.values() for name in row.mergekit or ()}
    return names | {"int8_mask", "eps", "embed_slerp"}


class _Reader:
    """One of mergekit's recipes."""

    def __init__(self, content: Mapping[str, Any], name: str) -> None:
        self.name, self.content = name, content
        self._ignored: dict[str, None] = {}
        self._known(content, _KEYS, "")
        method = content.get("merge_method")
        if not isinstance(method, str):
            raise self._error("merge_method", method, "the name of a method")
        usable = {name: row.mergekit for name, row in MERGE_METHODS.items() if row.mergekit is not None}
        if method not in usable:
            raise FusionError(f"{name}: merge_method {shown(method)} is not supported", f"use {', '.join(usable)}")
        self.method, self.parameters = method, usable[method]
        self.base = model_name(content["base_model"], f"{name}: base_model") if content.get("base_model") else None

    def recipe(self) -> Recipe:
        """All of it."""
        content = self.content
        given = [key for key in ("models", "slices", "modules") if content.get(key)]
        if len(given) != 1:
            raise FusionError(f"{self.name}: exactly one of models, slices and modules is expected, not {given}")
        globals_ = self._settings(content.get("parameters"), "parameters", False)
        modules = self._modules(content["modules"]) if "modules" in given else {"default": content}
        if "default" in modules:
            own = modules["default"]
            if own is not content:
                globals_ = _chained(
                    self._settings(own.get("parameters"), "modules.default.parameters", False), globals_
                )
            experts = self._experts(own)
            slices = self._slices(own["slices"]) if own.get("slices") else ()
        else:
            globals_, experts, slices = *self._stacks(modules, globals_), ()
        recipe = Recipe(
            self.method,
            experts,
            self.base,
            self._complete(globals_),
            self._dtype(),
            slices,
            self._tokenizer(),
            self._text("chat_template"),
        )
        if self._ignored:
            logger.warning("%s: %s has no use for %s: left out", self.name, self.method, ", ".join(self._ignored))
        return self._placed(_all_kept(recipe) if "epsilon" in self.parameters else recipe)

    # ------------------------------------------------------------ models

    def _experts(self, holder: Mapping[str, Any], where: str = "models") -> tuple[RecipeExpert, ...]:
        """The models of ``models``, or all of ``slices``, in order; the base among them, if it is."""
        if holder.get("slices"):
            sources = [source for entry in self._slices(holder["slices"]) for source in entry.sources]
            return tuple(map(RecipeExpert, dict.fromkeys(source.model for source in sources)))
        experts = []
        for key, entry in self._entries(holder["models"], where, ("model", "parameters")):
            parameters = self._settings(entry.get("parameters"), f"{key}.parameters", True)
            experts.append(RecipeExpert(model_name(entry.get("model"), f"{self.name}: {key}.model"), None, parameters))
        return tuple(experts)

    def _slices(self, entries: object, where: str = "slices") -> tuple[Slice, ...]:
        slices = []
        for key, entry in self._entries(entries, where, _SLICE):
            own = model_name(entry["base_model"], f"{self.name}: {key}.base_model") if entry.get("base_model") else None
            if "residual_weight" in entry:
                self._ignored["residual_weight"] = None
            if own not in (None, self.base):
                raise FusionError(f"{self.name}: {key}.base_model is not supported", "one base_model is that of all")
            sources = []
            for at, source in self._entries(entry.get("sources"), f"{key}.sources", _SOURCE):
                model = model_name(source.get("model"), f"{self.name}: {at}.model")
                match source.get("layer_range"):
                    case [start, stop] if type(start) is int and type(stop) is int and 0 <= start < stop:
                        settings = self._settings(source.get("parameters"), f"{at}.parameters", True)
                        sources.append(SliceSource(model, start, stop, settings))
                    case other:
                        raise self._error(f"{at}.layer_range", other, "[first, behind the last]")
            if len({source.stop - source.start for source in sources}) > 1:
                raise FusionError(f"{self.name}: {key} takes unlike numbers of layers from its sources")
            slices.append(Slice(tuple(sources), self._settings(entry.get("parameters"), f"{key}.parameters", False)))
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
            raise FusionError(
                f"{self.name}: base_model {base} would be merged with the others, and has no weight",
                "list it among the models, or leave it out",
            )
        return replace(recipe, base=None, experts=(listed or RecipeExpert(base), *others))

    def _modules(self, modules: Any) -> dict[str, Mapping[str, Any]]:
        if not isinstance(modules, Mapping):
            raise self._error("modules", modules, "modules by name")
        for key, module in modules.items():
            if key != "default" and key not in _MODULES:
                raise FusionError(
                    f"{self.name}: modules.{key} is not supported", f"use default, or {', '.join(_MODULES)}"
                )
            if not isinstance(module, Mapping):
                raise self._error(f"modules.{key}", module, "{models: …} or {slices: …}")
            self._known(module, ("models", "slices", "parameters"), f"modules.{key}.")
            if bool(module.get("models")) == bool(module.get("slices")):
                raise FusionError(f"{self.name}: modules.{key} needs either models or slices")
            if key != "default" and module.get("slices"):
                raise FusionError(f"{self.name}: modules.{key}.slices is not supported", "slices need a single stack")
        if "default" in modules and len(modules) > 1:
            raise FusionError(f"{self.name}: modules has default and others", "a model has one or the other")
        if "default" not in modules and (missing := {"encoder", "decoder"} - set(modules)):
            raise FusionError(f"{self.name}: modules lacks {min(missing)}: it would not be merged at all")
        return dict(modules)

    def _stacks(
        self, modules: Mapping[str, Mapping[str, Any]], globals_: Mapping[str, Setting]
    ) -> tuple[dict[str, Setting], tuple[RecipeExpert, ...]]:
        """Several modules of the same models: what differs between them are settings by the tensors' names."""
        experts = {key: self._experts(module, f"modules.{key}.models") for key, module in modules.items()}
        names = {key: sorted(expert.model for expert in found) for key, found in experts.items()}
        if other := next((key for key, found in names.items() if found != names["decoder"]), None):
            raise FusionError(f"{self.name}: modules.{other} merges other models than modules.decoder: not supported")
        own = {
            key: self._settings(module.get("parameters"), f"modules.{key}.parameters", False)
            for key, module in modules.items()
        }
        shared = _chained(_by_module(own), globals_)
        return shared, tuple(
            RecipeExpert(
                model,
                None,
                _by_module({k: next(e.parameters for e in es if e.model == model) for k, es in experts.items()}),
            )
            for model in dict.fromkeys(expert.model for expert in experts["decoder"])
        )

    # ------------------------------------------------------------ parameters

    def _settings(self, settings: object, where: str, per_model: bool) -> dict[str, Setting]:
        """Parameters of one place, by our names."""
        if settings is None:
            return {}
        if not isinstance(settings, Mapping):
            raise self._error(where, settings, "names and values")
        found = {}
        for key, setting in settings.items():
            parameter = self.parameters.get(key)
            if parameter is None and key in _known_to_mergekit():
                self._ignored[key] = None
            elif parameter is None:
                usable = ", ".join(self.parameters) or "none"
                raise FusionError(f"{self.name}: {where}.{key} is no parameter of {self.method}", f"it has {usable}")
            elif per_model and not parameter.per_model:
                self._ignored[f"{key} of one model"] = None
            elif key.startswith("nuslerp_"):
                found[parameter.ours] = self._rows(settings, where)
            else:
                found[parameter.ours] = self._setting(setting, parameter, f"{where}.{key}")
        return found

    def _setting(self, setting: Any, parameter: Parameter, where: str) -> Setting:
        """One value, gradient or choice by name."""
        if not isinstance(setting, list):
            return parameter.value(self._value(setting, parameter.kind, where))
        if any(isinstance(entry, Mapping) for entry in setting):
            found = []
            for key, entry in self._entries(setting, where, ("filter", "value")):
                if "value" not in entry or not isinstance(entry.get("filter"), (str, type(None))):
                    raise self._error(key, entry, "{filter: a part of the names, value: …}")
                own = {} if entry.get("filter") in (None, "*") else {"filter": entry["filter"]}
                found.append({**own, "value": self._setting(entry["value"], parameter, f"{key}.value")})
            return found
        if not setting:
            raise self._error(where, setting, "a value, a gradient or filters")
        return [self._setting(entry, parameter, where) for entry in setting]

    def _value(self, value: object, kind: type, where: str) -> Any:
        """A plain value, as leniently as mergekit takes it: 1e-4, which YAML takes for a text, and 1.0 for true."""
        if kind is bool and value in (0, 1):
            return bool(value)
        if isinstance(value, str):
            with suppress(ValueError):
                value = float(value)
        if kind is int and type(value) is float and value.is_integer():
            value = int(value)
        if kind is not bool and is_number(value) and (kind is float or type(value) is int):
            return kind(value)
        words = {bool: "true or false", int: "a whole number", float: "a number"}
        raise self._error(where, value, f"{words[kind]}, a gradient or filters")

    def _rows(self, settings: Mapping[str, Any], where: str) -> str:
        """NuSLERP's two switches are one choice here."""
        flat, wise = (
            self._value(settings.get(f"nuslerp_{key}", default), bool, f"{where}.nuslerp_{key}")
            for key, default in (("flatten", True), ("row_wise", False))
        )
        return "tensor" if flat else "column" if wise else "row"

    def _complete(self, globals_: Mapping[str, Setting]) -> dict[str, Setting]:
        """The recipe's parameters, with mergekit's defaults where they say nothing."""
        defaults = {}
        for parameter in self.parameters.values():
            if parameter.default is not None and parameter.ours not in defaults:
                defaults[parameter.ours] = parameter.value(parameter.default)
        return _chained(globals_, defaults) | dict(MERGE_METHODS[self.method].mergekit_always)

    # ------------------------------------------------------------ the rest

    def _dtype(self) -> str | None:
        """What is stored: ``out_dtype``, or ``dtype``."""
        found = []
        for key in ("out_dtype", "dtype"):
            value = self._text(key)
            if value is not None:
                value = value.removeprefix("torch.")
                if value not in DTYPES:
                    raise self._error(key, value, f"one of {', '.join(DTYPES)}")
                found.append(value)
        return found[0] if found else None

    def _tokenizer(self) -> str | dict[str, Any]:
        """``tokenizer``, or its old spelling ``tokenizer_source``; without, vocabularies are cut to the smallest."""
        source, tokenizer = self.content.get("tokenizer_source"), self.content.get("tokenizer")
        if source is not None and tokenizer is not None:
            raise FusionError(f"{self.name}: tokenizer_source and tokenizer are the same: give one")
        if source is not None:
            return self._source(source, "tokenizer_source")
        if tokenizer is None:
            return SMALLEST
        if not isinstance(tokenizer, Mapping):
            raise self._error("tokenizer", tokenizer, "{source: union, base or a model}")
        self._known(tokenizer, ("source", "tokens", "pad_to_multiple_of"), "tokenizer.")
        found: dict[str, Any] = {"source": self._source(tokenizer.get("source", "union"), "tokenizer.source")}
        if tokens := tokenizer.get("tokens"):
            if not isinstance(tokens, Mapping):
                raise self._error("tokenizer.tokens", tokens, "tokens and where they come from")
            found["tokens"] = {token: self._token(own, f"tokenizer.tokens.{token}") for token, own in tokens.items()}
        if (multiple := tokenizer.get("pad_to_multiple_of")) is not None:
            found["pad_to_multiple_of"] = multiple
        return found if len(found) > 1 else str(found["source"])

    def _token(self, own: Any, where: str) -> Any:
        if not isinstance(own, Mapping):
            raise self._error(where, own, "{source: …, force: …}")
        source = own.get("source")
        if isinstance(source, Mapping) and "model" in source and "kind" in source:
            source = {**source, "model": model_name(source["model"], f"{self.name}: {where}.source.model")}
        elif source is not None and not (isinstance(source, Mapping) and "kind" in source):
            source = model_name(source, f"{self.name}: {where}.source")
        return {**own, "source": source} if source is not None else dict(own)

    def _source(self, source: Any, where: str) -> str:
        """``model:PATH`` is how mergekit once wrote a model here."""
        if source in ("union", "base"):
            return str(source)
        return model_name(source.removeprefix("model:") if isinstance(source, str) else source, f"{self.name}: {where}")

    def _text(self, key: str) -> str | None:
        value = self.content.get(key)
        if value is not None and not isinstance(value, str):
            raise self._error(key, value, "a text")
        return value

    def _entries(self, entries: object, where: str, known: Sequence[str]) -> list[tuple[str, Mapping[str, Any]]]:
        """The mappings of a list, each with its place."""
        if not isinstance(entries, list) or not entries:
            raise self._error(where, entries, "a list")
        found = []
        for number, entry in enumerate(entries):
            key = f"{where}[{number}]"
            if not isinstance(entry, Mapping):
                raise self._error(key, entry, f"{{{', '.join(known)}}}")
            self._known(entry, known, f"{key}.")
            found.append((key, entry))
        return found

    def _known(self, holder: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
        if unknown := [key for key in holder if key not in known]:
            key = unknown[0] if isinstance(unknown[0], str) else shown(unknown[0])
            raise FusionError(f"{self.name}: {where}{key} is not supported", f"use {', '.join(known)}")

    def _error(self, key: str, value: object, expected: str) -> FusionError:
        return FusionError(f"{self.name}: {key} is {shown(value)}, expected {expected}")


_SLICE = ("sources", "parameters", "base_model", "residual_weight")
_SOURCE = ("model", "layer_range", "parameters")


def model_name(value: object, where: str) -> str:
    """A model as mergekit names it: ``path``, ``path@revision`` or ``model+lora``, or those as a mapping.

    Args:
        value: as YAML gives it.
        where: what errors call it.
    """
    if isinstance(value, str) and value.strip() and "\n" not in value:
        if value.count("@") > 1 + ("+" in value) or value.count("+") > 1:
            raise FusionError(f"{where} is {shown(value)}, expected owner/name, owner/name@revision or model+lora")
        return value
    if isinstance(value, Mapping):
        known = ("path", "revision") if "path" in value else ("model", "lora")
        if unknown := [key for key in value if key not in known]:
            raise FusionError(f"{where}.{unknown[0]} is not supported", f"use {', '.join(known)}")
        first, second = (value.get(key) for key in known)
        if known[0] == "path" and isinstance(first, str) and isinstance(second, (str, type(None))):
            return str(ModelRef(first, second or None))
        if known[0] == "model" and first is not None:
            parts = [model_name(part, f"{where}.{key}") for key, part in value.items() if part is not None]
            return "+".join(parts)
    raise FusionError(f"{where} is {shown(value)}, expected owner/name, owner/name@revision, model+lora or a folder")


def _chained(first: Mapping[str, Setting], then: Mapping[str, Setting]) -> dict[str, Setting]:
    """Settings of two places as those of one: what the first says nothing of for a tensor, the second decides."""
    found = dict(then)
    for key, setting in first.items():
        rest = found.get(key)
        is_open = _is_choice(setting) and all(entry.get("filter") for entry in setting)
        if rest is None or not is_open:
            found[key] = setting
        else:
            found[key] = [*setting, *(rest if _is_choice(rest) else [{"value": rest}])]
    return found


def _all_kept(recipe: Recipe) -> Recipe:
    """DELLA with density 1 prunes nothing, whatever epsilon says: it is 0 wherever that density counts."""

    def settled(own: dict[str, Setting], above: Mapping[str, Setting]) -> dict[str, Setting]:
        if not own.keys() & {"density", "epsilon"}:
            return own
        every = {**above, **own}
        given = recipe.parameters["epsilon"] if "density" in own and "epsilon" not in own else every["epsilon"]
        return {**own, "epsilon": 0.0 if every["density"] == 1.0 else given}

    shared = settled(recipe.parameters, {})
    slices = []
    for slice_ in recipe.slices:
        own = settled(slice_.parameters, shared)
        sources = [replace(s, parameters=settled(s.parameters, {**shared, **own})) for s in slice_.sources]
        slices.append(Slice(tuple(sources), own))
    experts = tuple(replace(expert, parameters=settled(expert.parameters, shared)) for expert in recipe.experts)
    return replace(recipe, experts=experts, parameters=shared, slices=tuple(slices))


def _is_choice(setting: Setting) -> bool:
    return isinstance(setting, list) and isinstance(setting[0], Mapping)


def _by_module(settings: Mapping[str, Mapping[str, Setting]]) -> dict[str, Setting]:
    """Settings of several modules as those of one model: a choice by what their tensors' names contain."""
    names = dict.fromkeys(key for own in settings.values() for key in own)
    return {
        key: [
            {"filter": part, "value": own[key]}
            for module, own in settings.items()
            if key in own
            for part in _MODULES[module]
        ]
        for key in names
    }
