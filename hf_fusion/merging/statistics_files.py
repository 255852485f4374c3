"""What was measured of an expert on its own data, in a folder: for methods that weigh its tensors by it.

``fisher.safetensors`` holds a tensor's diagonal Fisher information in the tensor's shape; ``gram.safetensors`` holds
the Gram matrix of a linear layer's inputs, once for all layers that read the same. The JSON file beside each records
the settings, and which matrix belongs to which weight. `training.fisher` and `training.gram` write them.
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
    """The statistics of one expert, opened.

    Attributes:
        entries: the expert's tensor -> what was measured of it, and the dimension of the tensor that it belongs to.
        norm: of Fisher information: its norm over all tensors.
        digest: changes with the file.
    """

    entries: Mapping[str, tuple[TensorEntry, int]]
    norm: float
    digest: str

    def of(self, name: str, files: OpenFiles) -> Statistic | None:
        """What was measured of one tensor."""
        if name not in self.entries:
            return None
        entry, axis = self.entries[name]
        return Statistic(FileReader(entry, files), axis, self.norm)


def read_statistics(recipe: Recipe, kind: str, experts: Sequence[Model]) -> list[ExpertStatistics]:
    """The statistics of all experts, in their order; nothing for a method that needs none.

    Args:
        recipe: whose experts name their folders.
        kind: "fisher", "gram" or "".
        experts: opened; statistics get the names that their tensors have in their files.

    Raises:
        FusionError: an expert names no folder, or there is nothing of that kind in it.
    """
    if not kind:
        return []
    found = []
    for expert, model in zip(recipe.experts, experts, strict=True):
        folder = expert.parameters.get(STATISTICS)
        if not isinstance(folder, str):
            raise FusionError(
                f"{recipe.method} weighs {expert.model} by what was measured of it, and its recipe does not say where"
                " that is",
                f"hf_fusion.measure_{kind}(expert, rows).save(FOLDER), then parameters: {{statistics: FOLDER}}",
            )
        measured = open_statistics(folder, kind)
        entries = {own: measured.entries[known] for own, known in match_names(model.entries, measured.entries).items()}
        if not entries:
            raise FusionError(f"{folder} was measured of another model than {expert.model}: no tensor is in both")
        found.append(ExpertStatistics(entries, measured.norm, measured.digest))
    return found


def open_statistics(folder: str | Path, kind: str) -> ExpertStatistics:
    """Opens what `hf_fusion.training.expert_statistics` saved; no values are read.

    Raises:
        FusionError: there is nothing of that kind, or it is broken.
    """
    folder = Path(folder).expanduser()
    weights, facts = folder / f"{kind}.safetensors", folder / f"{kind}.json"
    if not (weights.is_file() and facts.is_file()):
        raise FusionError(
            f"{folder} has no {weights.name} with its {facts.name}",
            f"hf_fusion.measure_{kind}(expert, rows).save({str(folder)!r})",
        )
    entries, content = read_header(weights), read_json(facts, str(folder))
    try:
        places = {str(name): (str(key), int(axis)) for name, (key, axis) in content["tensors"].items()}
        norm = float(content["norm"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FusionError(f"{facts} is not valid ({error!r})", "measure it again") from None
    if wrong := [name for name, (key, axis) in places.items() if key not in entries or axis not in (0, 1)]:
        raise FusionError(f"{facts}: {wrong[0]} is to be at {places[wrong[0]]}, which is not in {weights.name}")
    status = weights.stat()
    digest = f"{weights.resolve()} {status.st_size} {status.st_mtime_ns}"
    return ExpertStatistics({name: (entries[key], axis) for name, (key, axis) in places.items()}, norm, digest)
