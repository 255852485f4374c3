"""Reads statistics of experts on their data from folders, for data-dependent methods.

``fisher.safetensors`` holds a tensor's diagonal Fisher information in the tensor's shape; ``gram.safetensors`` holds
the Gram matrices of linear layers' inputs, one for all layers that read the same input. The JSON file beside each
records the settings, and which matrix belongs to which weight. `training.fisher` and `training.gram` write them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fusion.errors import FusionError
from hf_fusion.io.json_files import read_json
from hf_fusion.merging.engine.checkpoint import OpenFiles, TensorEntry, read_header
from hf_fusion.merging.engine.open_models import Model, match_names
from hf_fusion.merging.engine.tensors import FileReader, Statistic
from hf_fusion.merging.recipe_checks import STATISTICS

if TYPE_CHECKING:
    from hf_fusion.recipe import Recipe


@dataclass(frozen=True)
class ExpertStatistics:
    """The statistics of one expert.

    Attributes:
        entries: tensor of the expert -> its statistic, and the dimension of the tensor that it describes.
        norm: of Fisher information, over all tensors.
        digest: identifies the file's content, by path, size and time.
    """

    entries: Mapping[str, tuple[TensorEntry, int]]
    norm: float
    digest: str

    def of(self, name: str, files: OpenFiles) -> Statistic | None:
        """The statistic of one tensor, or None."""
        if name not in self.entries:
            return None
        entry, axis = self.entries[name]
        return Statistic(FileReader(entry, files), axis, self.norm)


def read_statistics(recipe: Recipe, kind: str, experts: Sequence[Model]) -> list[ExpertStatistics]:
    """Reads the statistics of all experts, in order; empty if the method needs none.

    Args:
        recipe: its experts name their folders.
        kind: "fisher", "gram" or "".
        experts: the opened experts, whose tensor names the result has.

    Raises:
        FusionError: an expert names no folder, or the folder has no statistics of that kind.
    """
    if not kind:
        return []
    statistics = []
    for expert, model in zip(recipe.experts, experts, strict=True):
        folder = expert.parameters.get(STATISTICS)
        if not isinstance(folder, str):
            raise FusionError(
                f"{recipe.method} needs statistics of {expert.model}, but the recipe does not name their folder",
                f"{_command(kind, 'FOLDER')}; then in the recipe: parameters: {{statistics: FOLDER}}",
            )
        measured = open_statistics(folder, kind)
        stored_names = match_names(model.entries, measured.entries)
        entries = {name: measured.entries[stored] for name, stored in stored_names.items()}
        if not entries:
            raise FusionError(f"{folder} has statistics of another model than {expert.model}: no common tensor")
        statistics.append(ExpertStatistics(entries, measured.norm, measured.digest))
    return statistics


def open_statistics(folder: str | Path, kind: str) -> ExpertStatistics:
    """Opens statistics that `hf_fusion.training.expert_statistics` saved, without reading values.

    Raises:
        FusionError: there are no statistics of that kind, or the files are invalid.
    """
    folder = Path(folder).expanduser()
    weights, facts = folder / f"{kind}.safetensors", folder / f"{kind}.json"
    if not (weights.is_file() and facts.is_file()):
        raise FusionError(
            f"{folder} has no {weights.name} with its {facts.name}",
            _command(kind, str(folder)),
        )
    entries, content = read_header(weights), read_json(facts, str(folder))
    try:
        lookup = {str(name): (str(key), int(axis)) for name, (key, axis) in content["tensors"].items()}
        norm = float(content["norm"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FusionError(f"{facts} is not valid ({error!r})", "measure it again") from None
    if wrong := [name for name, (key, axis) in lookup.items() if key not in entries or axis not in (0, 1)]:
        raise FusionError(f"{facts}: {wrong[0]} refers to {lookup[wrong[0]]}, which is not in {weights.name}")
    status = weights.stat()
    digest = f"{weights.resolve()} {status.st_size} {status.st_mtime_ns}"
    return ExpertStatistics({name: (entries[key], axis) for name, (key, axis) in lookup.items()}, norm, digest)


def _command(kind: str, folder: str) -> str:
    """The Python code that measures and saves statistics."""
    function = {
        "fisher": "hf_fusion.training.fisher.measure_fisher",
        "gram": "hf_fusion.training.gram.measure_gram",
    }[kind]
    module, _, name = function.rpartition(".")
    return f"from {module} import {name}; {name}(expert, rows).save({folder!r})"
