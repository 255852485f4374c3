"""Merges recipes of several stages: the result of a stage is an input of others, under its name."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fusion.errors import FusionError
from hf_fusion.hub.provenance import hash_folder
from hf_fusion.hub.refs_to_files import resolve
from hf_fusion.io.files import own_file, read_text
from hf_fusion.io.folders import refuse_to_replace
from hf_fusion.io.saving import write_file
from hf_fusion.merging.engine.processes import is_main
from hf_fusion.merging.merge_report import MergeReport
from hf_fusion.merging.recipe_checks import check_recipe, stage_of
from hf_fusion.recipe import Recipe
from hf_fusion.types import ModelRef

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

Run = Callable[[Recipe, Path, bool, Callable[[Recipe], Recipe]], MergeReport]
"""Merges one stage: recipe, folder, whether to replace a model there, and what gives the recipe that is saved."""


def merge_stages(
    recipe: Recipe,
    folder: Path,
    run: Run,
    *,
    kept: str | Path | None = None,
    overwrite: bool = False,
    device: str = "cpu",
    api: HfApi | None = None,
) -> MergeReport:
    """Merges the stages that a recipe reads, each before those that read it, then the recipe itself.

    The recipe that is saved names the stages by their content, and contains their recipes.

    Args:
        recipe: of a static method, with stages.
        folder: of the result.
        run: merges one stage.
        kept: see `hf_fusion.merge`.
        overwrite: whether to replace models in `folder` and `kept`.
        device: part of what identifies a stage's result.
        api: the Hub's client.

    Raises:
        FusionError: stages read each other in a circle, a recipe is invalid, or a merge fails.
    """
    began = time.perf_counter()
    order = _order(recipe)
    for stage in (recipe, *recipe.stages.values()):
        check_recipe(stage)
    refuse_to_replace(folder, overwrite)
    unused = [name for name in recipe.stages if name not in order]
    if unused and kept is None:
        logger.warning("the result does not use %s, which is not merged", ", ".join(unused))
    root = folder.with_name(f".{folder.name}.stages") if kept is None else Path(kept).resolve()
    stages = _Stages(recipe, root, run, kept is not None, overwrite, device, api)
    try:
        for name in [*order, *unused] if kept is not None else order:
            if kept is not None or name in stages.read_by(recipe):
                stages.make(name)
        report = run(stages.with_folders(recipe), folder, overwrite, stages.record(recipe))
    except Exception:  # would fail again; only a killed or interrupted run can be resumed
        stages.clear()
        raise
    stages.clear()
    return replace(report, seconds=time.perf_counter() - began, warnings=[*stages.warnings, *report.warnings])


def _reads(recipe: Recipe, stages: Collection[str]) -> list[str]:
    """The stages whose results a recipe reads, in order."""
    named = (stage_of(name, stages) for name in replace(recipe, stages={}).models)
    return list(dict.fromkeys(name for name in named if name is not None))


def _order(recipe: Recipe) -> list[str]:
    """The stages that a recipe needs, each after those that it reads."""
    order: list[str] = []  # as they are visited

    def visit(own: Recipe, path: tuple[str, ...]) -> None:
        for name in _reads(own, recipe.stages):
            if name in path:
                circle = " → ".join([*path[path.index(name) :], name])
                raise FusionError(f"stages read each other in a circle: {circle}", "rename one of them, or its input")
            if name not in order:
                visit(recipe.stages[name], (*path, name))
                order.append(name)

    visit(recipe, ())
    needed = list(order)
    for name, stage in recipe.stages.items():  # circles also among stages that are not needed
        if name not in order:
            visit(stage, (name,))
            order.append(name)
    return needed


class _Stages:
    """The results of stages, each in a folder of its name, beside a file with the digest of what it was made from.

    Attributes:
        warnings: of the merges, with the names of the stages.
    """

    def __init__(
        self, recipe: Recipe, root: Path, run: Run, is_kept: bool, overwrite: bool, device: str, api: HfApi | None
    ) -> None:
        self.recipes, self.root, self.run, self.is_kept = recipe.stages, root, run, is_kept
        self.overwrite, self.device, self.api = overwrite or not is_kept, device, api
        self.warnings: list[str] = []
        self._keys: dict[str, str] = {}
        self._made: set[str] = set()
        needed = [recipe, *(recipe.stages[name] for name in _order(recipe))]
        self._readers = {name: sum(name in self.read_by(own) for own in needed) for name in recipe.stages}

    def read_by(self, recipe: Recipe) -> list[str]:
        """The stages that a recipe reads."""
        return _reads(recipe, self.recipes)

    def make(self, name: str) -> None:
        """Merges a stage, and what it reads, unless its result is already there."""
        if name in self._made:
            return
        self._made.add(name)
        folder, recipe, digest = self.root / name, self.recipes[name], self._key(name)
        file = folder.with_name(f".{folder.name}.digest")
        if folder.is_dir() and own_file(file) and read_text(file) == digest:
            logger.info("%s is used again", folder)
        else:
            for other in self.read_by(recipe):
                self.make(other)
            if is_main():
                file.unlink(missing_ok=True)
            report = self.run(self.with_folders(recipe), folder, self.overwrite, self.record(recipe))
            self.warnings += [f"{name}: {warning}" for warning in report.warnings]
            if is_main():
                write_file(file, digest)
        for other in self.read_by(recipe):
            self._readers[other] -= 1
            if not self._readers[other] and not self.is_kept and is_main():
                shutil.rmtree(self.root / other, ignore_errors=True)

    def with_folders(self, recipe: Recipe) -> Recipe:
        """A recipe that names the folders of the stages that it reads."""
        return replace(_renamed(recipe, {name: str(self.root / name) for name in self.recipes}), stages={})

    def record(self, recipe: Recipe) -> Callable[[Recipe], Recipe]:
        """What gives the recipe to save: it names stages by their content, and contains the stages' own recipes."""

        def recorded(pinned: Recipe) -> Recipe:
            names: dict[str, str] = {}
            stages: dict[str, Recipe] = {}
            for name in self.read_by(recipe):
                folder = (self.root / name).resolve()
                names[str(folder)] = str(ModelRef(name, hash_folder(folder)))
                own = Recipe.load(folder)
                stages |= {**own.stages, name: replace(own, stages={})}

            def change(text: str) -> str:
                for folder, public in names.items():
                    if text == folder:
                        return public
                    if text.startswith(f"{folder}+"):
                        return public + text.removeprefix(folder)
                    if text.endswith(f"+{folder}"):
                        return text.removesuffix(folder) + public
                return text

            return replace(pinned.renamed(change), stages=stages)

        return recorded

    def clear(self) -> None:
        """Removes results that are not kept."""
        if not self.is_kept and is_main():
            shutil.rmtree(self.root, ignore_errors=True)

    def _key(self, name: str) -> str:
        """A digest of a stage's recipe and of the content of its inputs."""
        if name not in self._keys:
            recipe = self.recipes[name]
            models = {recipe.base, *(e.model for e in recipe.experts)}
            models |= {source.model for slice_ in recipe.slices for source in slice_.sources}
            known = {model: self._identity(model) for model in models if model}
            content = [recipe.renamed(lambda text: known.get(text, text)).to_dict(), _files(recipe), self.device]
            self._keys[name] = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
        return self._keys[name]

    def _identity(self, name: str) -> str:
        """A model by its content: the digest of a stage or a folder, or the commit of a repo."""
        if name.partition("@")[0] in self.recipes:
            return f"stage {self._key(name.partition('@')[0])}"
        if stage_of(name, self.recipes) is not None:
            return "+".join(map(self._identity, name.split("+")))
        parts = [ref for ref in ModelRef.parse_pair(name) if ref]
        return "+".join(hash_folder(ref.id) if ref.is_folder else str(resolve(ref, self.api).ref) for ref in parts)


def _renamed(recipe: Recipe, folders: Mapping[str, str]) -> Recipe:
    def change(text: str) -> str:
        parts = [folders.get(part.partition("@")[0], part) for part in text.split("+")]
        return "+".join(parts)

    return recipe.renamed(change)


def _files(recipe: Recipe) -> list[tuple[str, int, int]]:
    """Path, size and time of files and folders that its parameters name, such as statistics."""
    rows = [recipe.parameters, *(expert.parameters for expert in recipe.experts)]
    paths = [Path(value) for row in rows for value in row.values() if isinstance(value, str) and len(value) < 1000]
    stats = [(str(path), path.stat()) for path in paths if path.exists()]
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
