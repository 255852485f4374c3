"""What can be seen to be wrong with a recipe, or with a method's options, before any model is opened; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError, suggestion
from hf_fusion.families import METHODS, Method
from hf_fusion.merging.methods import MERGE_METHODS, method_named
from hf_fusion.schema import Parameter, Range, check_setting

if TYPE_CHECKING:
    from hf_fusion.recipe import Recipe

STATISTICS = "statistics"
"""What a recipe's experts name the folder of what was measured of them by."""
MISMATCHES = ("base", "skip", "resize")
"""What may be done about tensors that do not match."""

# what every static method takes beside its own parameters
COMMON = {
    "seed": Parameter("seed", int, 0, limits=Range(0, 2**63 - 1)),
    "mismatch": Parameter("mismatch", str, None, choices=MISMATCHES),
    "untie": Parameter("untie", bool, False),
}


def family_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method of a family that a name calls, once its options are known to be its own.

    Args:
        name: a key of `families.METHODS`.
        options: to be passed to it.

    Raises:
        FusionError: there is no such method, or it has no such option.
    """
    if name not in METHODS:
        raise FusionError(f"There is no method {name!r}.", hint=suggestion(name, [*METHODS, *MERGE_METHODS]))
    known = METHODS[name].options
    if unknown := [option for option in options if option not in known]:
        raise FusionError(f"Method {name} has no parameter {unknown[0]!r}.", hint=suggestion(unknown[0], known))
    return METHODS[name]


def check_recipe(recipe: Recipe) -> None:
    """Refuses what can be seen to be wrong with the recipe of a static merge before any model is opened, or fetched.

    Raises:
        FusionError: the method does not take that many experts, or without a base; a parameter is unknown or out of
            its range.
    """
    name, method = recipe.method, method_named(recipe.method)
    least, most = method.experts
    wanted = f"at least {least}" if most is None else f"{least}" if least == most else f"{least} to {most}"
    count = len(recipe.experts)
    if not recipe.slices and (count < least or (most is not None and count > most)):
        raise FusionError(f"{name} merges {wanted} experts, the recipe has {count}")
    for number, slice_ in enumerate(recipe.slices):
        own = sum(source.model != recipe.base for source in slice_.sources)
        # one alone is passed on as it is, by any method
        if own > 1 and (own < least or (most is not None and own > most)):
            raise FusionError(f"{name} merges {wanted} experts, slices[{number}] has {own}")
    if 0 < sum(expert.weight is not None for expert in recipe.experts) < count:
        raise FusionError(f"{name}: experts have weights only partly", "give one to each or to none")
    if method.base == "needed" and not recipe.base:
        raise FusionError(f"{name} needs the base of its experts", "base: owner/name")
    known = method.parameters
    groups = [("parameters", recipe.parameters)]
    for expert in recipe.experts:
        apart = {STATISTICS, *method.own} if method.statistics else set(method.own)
        groups.append((expert.model, {k: v for k, v in expert.settings.items() if k not in apart}))
    for slice_ in recipe.slices:
        groups += [("slices", slice_.parameters), *(("slices", s.parameters) for s in slice_.sources)]
    for where, settings in groups:
        allowed = known if where != "parameters" else {**known, **COMMON}
        for key, value in settings.items():
            if key not in allowed:
                raise FusionError(f"{where}: {name} has no parameter {key!r}", suggestion(key, allowed))
            if key in COMMON:  # one value for all tensors
                allowed[key].checked(value, where)
            else:
                check_setting(allowed[key], value, where)
        if where not in ("parameters", "slices"):
            for key in settings:
                if not known[key].per_expert:
                    raise FusionError(f"{where}: {key} is one for all experts", "give it under parameters:")
