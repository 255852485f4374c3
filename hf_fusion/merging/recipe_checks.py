"""Checks recipes and options of methods before any model is opened, without importing torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from hf_fusion.errors import FusionError, suggestion
from hf_fusion.families import METHODS, FamilyMethod
from hf_fusion.merging.methods import MERGE_METHODS, METHODS_LISTING, method_named
from hf_fusion.merging.settings import check_settings
from hf_fusion.merging.tokenizers.token_sources import tokenizer_request
from hf_fusion.schema import Field, KeyPath, OneOf, Range, is_plain, read

if TYPE_CHECKING:
    from hf_fusion.recipe import Recipe

STATISTICS = "statistics"
"""Key of an expert's folder of statistics in a recipe."""
MISMATCHES = ("base", "skip", "resize")
"""Values of the parameter ``mismatch``, for tensors that do not match."""

# parameters of every static method
COMMON = {
    "seed": Field("seed", Annotated[int, Range(0, 2**63 - 1)], 0),
    "mismatch": Field("mismatch", Annotated[str, OneOf(MISMATCHES)], None),
    "untie": Field("untie", bool, False),
}


def family_method(name: str, options: Mapping[str, Any], file: str = "") -> FamilyMethod:
    """The method of a family, with a check of its options.

    Args:
        name: a key of `families.METHODS`.
        options: to be passed to it.
        file: the recipe's file, for errors.

    Raises:
        FusionError: there is no such method, it has no such option, or a plain value of another type was given.
    """
    if name not in METHODS:
        raise FusionError(
            ": ".join(filter(None, (file, f"there is no method {name!r}"))),
            hint=suggestion(name, [*METHODS, *MERGE_METHODS], METHODS_LISTING),
        )
    known = METHODS[name].options
    for option, value in options.items():
        if option not in known:
            raise FusionError(
                ": ".join(filter(None, (file, f"method {name} has no parameter {option!r}"))),
                hint=suggestion(option, known, f"{METHODS_LISTING} {name}"),
            )
        if is_plain(value):  # the model checks others, such as arrays
            where = KeyPath(file, "parameters").inner(option) if file else KeyPath(name, option)
            read(known[option].hint, value, where)
    return METHODS[name]


def stage_of(name: str, stages: Collection[str]) -> str | None:
    """The stage that a model, or the base or adapter of a pair, is the result of; None if it is another model."""
    return next((part.partition("@")[0] for part in name.split("+") if part.partition("@")[0] in stages), None)


def check_recipe(recipe: Recipe) -> None:
    """Raises for an invalid recipe of a static merge, before any model is opened or downloaded.

    Raises:
        FusionError: the method needs a base, or another number of experts; a parameter is unknown or out of range.
    """
    name, method = recipe.method, method_named(recipe.method)
    least, most = method.experts
    wanted = f"at least {least}" if most is None else f"{least}" if least == most else f"{least} to {most}"
    count = len(recipe.experts)
    if not recipe.slices and (count < least or (most is not None and count > most)):
        raise FusionError(f"{name} merges {wanted} experts, the recipe has {count}")
    for index, slice_ in enumerate(recipe.slices):
        in_slice = sum(source.model != recipe.base for source in slice_.sources)
        # a single expert is copied by any method
        if in_slice > 1 and (in_slice < least or (most is not None and in_slice > most)):
            raise FusionError(f"{name} merges {wanted} experts, slices[{index}] has {in_slice}")
    if 0 < sum(expert.weight is not None for expert in recipe.experts) < count:
        raise FusionError(f"{name}: experts have weights only partly", "give one to each or to none")
    if method.base == "needed" and not recipe.base:
        raise FusionError(f"{name} needs the base of its experts", "--base owner/name, or base: owner/name in a recipe")
    check_parameters(recipe)


def check_parameters(recipe: Recipe, file: str = "") -> None:
    """Raises for unknown parameters, values out of range, and an invalid ``tokenizer``.

    Args:
        recipe: of a static method.
        file: the recipe's file, for errors.

    Raises:
        FusionError: naming the parameter, its position in the recipe, and what is expected.
    """
    method, where = method_named(recipe.method), KeyPath(file)
    if recipe.tokenizer is not None:
        tokenizer_request(recipe.tokenizer, file)
    common = {key: value for key, value in recipe.parameters.items() if key in COMMON}
    for key, value in common.items():  # the same for all tensors
        read(COMMON[key].hint, value, where.inner("parameters", key))
    groups = [("parameters", {key: value for key, value in recipe.parameters.items() if key not in common})]
    for index, slice_ in enumerate(recipe.slices):
        groups.append((f"slices[{index}].parameters", slice_.parameters))
        groups += [(f"slices[{index}].sources[{i}].parameters", s.parameters) for i, s in enumerate(slice_.sources)]
    for path, settings in groups:
        known = method.parameters | (COMMON if path == "parameters" else {})
        check_settings(method.name, known, settings, KeyPath(file, path))
    checked_elsewhere = {STATISTICS, *method.expert_settings} if method.statistics else set(method.expert_settings)
    for expert in recipe.experts:
        parameters = {key: value for key, value in expert.settings.items() if key not in checked_elsewhere}
        where = KeyPath(": ".join(filter(None, (file, expert.model))))
        check_settings(method.name, method.parameters, parameters, where, of_expert=True)
