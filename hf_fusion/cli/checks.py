"""What is checked before anything heavy is imported: folders, data and their columns, names and ids.

Nothing here imports torch, transformers or datasets, so that a mistyped word is told within a second. The library
checks all of it again, and more, once it has read what it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hf_fusion.data import read_columns
from hf_fusion.errors import FusionError
from hf_fusion.families import FAMILIES, Family
from hf_fusion.hub.heads import Head, architectures, head_of_adapter, head_of_architecture
from hf_fusion.hub.resolve import repo_ref
from hf_fusion.io.folders import recover_folder
from hf_fusion.io.json_files import read_json
from hf_fusion.recipe import RECIPE_FILE
from hf_fusion.types import ModelRef

Columns = Sequence[tuple[str, ...]]
"""One column of each entry must be among a data set's columns."""

ANY_INPUT = ("text", "prompt", "image")
GENERATION: Columns = (("prompt",), ("target",))
# head, as an Auto class or as a family's config calls it -> what it is fitted and measured on
BY_HEAD: dict[str, Columns] = {
    "causal-lm": GENERATION,
    "seq2seq-lm": GENERATION,
    "sequence-classification": (("text",), ("label",)),
    "image-classification": (("image",), ("label",)),
    "AutoModelForCausalLM": GENERATION,
    "AutoModelForSeq2SeqLM": GENERATION,
    "AutoModelForSequenceClassification": (("text",), ("label",)),
    "AutoModelForImageClassification": (("image",), ("label",)),
    "AutoModelForSemanticSegmentation": (("image",), ("label",)),
}


def model_in(folder: str) -> dict[str, Any]:
    """The ``config.json`` of a model's folder, empty where only its recipe is there.

    Raises:
        FusionError: there is no such folder, or no model in it.
    """
    path = Path(folder)
    recover_folder(path)
    if not path.is_dir():
        raise FusionError(f"there is no folder {folder}", "check the path, or make one: hf-fusion fuse … --output DIR")
    config = path / "config.json"
    if not config.is_file() and not (path / RECIPE_FILE).is_file():
        raise FusionError(f"{folder} holds no model: it has no config.json", "hf-fusion fuse … --output DIR makes one")
    return read_json(config, folder) if config.is_file() else {}


def family_of_config(config: dict[str, Any]) -> Family | None:
    """The family of a model, by its config; None for a static merge or another plain model."""
    return FAMILIES.get(str(config.get("model_type")))


def pools_rows(config: dict[str, Any]) -> bool:
    """Whether a model is measured on the rows of all tasks together, which need not name their tasks."""
    family = family_of_config(config)
    return family is not None and not family.by_task


def _inputs(config: dict[str, Any]) -> tuple[str, ...]:
    return ("image",) if str(config.get("head")).startswith("image") else ANY_INPUT


def columns_to_measure(config: dict[str, Any], label: str) -> Columns:
    """What rows need for a model to be measured on them; nothing where its config does not tell."""
    if pools_rows(config):
        return (_inputs(config), ("target",) if config.get("vocabularies") else (label,))
    if family_of_config(config):
        needed = BY_HEAD.get(str(config.get("head")), ())
    else:
        head = head_of_architecture(next(iter(architectures(config)), None))
        needed = BY_HEAD.get(head.auto, ()) if head else ()
    return [(label,) if column == ("label",) else column for column in needed]


def columns_to_fit(config: dict[str, Any], by: str, label: str, expert: str) -> Columns:
    """What rows need for a FoE's fuser to be fitted on them."""
    inputs = _inputs(config)
    if config.get("mode", "output") != "selection":
        return (inputs, (label,))
    if by == "domain":
        return (inputs, (expert,))
    return (inputs, ("target",) if config.get("vocabularies") else (label,))


def columns_of_adapter(folder: str) -> Columns:
    """What rows need for an adapter's gates to be trained on them; nothing where its config does not tell."""
    config = Path(folder) / "adapter_config.json"
    head: Head | None = head_of_adapter(read_json(config, folder)) if config.is_file() else None
    return BY_HEAD.get(head.auto, ()) if head else ()


def check_columns(source: str, split: str, needed: Columns, named: Iterable[str | None] = ()) -> None:
    """Refuses data that lack what is needed, where that can be seen without reading them.

    Args:
        source, split: as `load_rows` takes them.
        needed: what must be there.
        named: columns that the user has named; None for what was left to its default.

    Raises:
        FusionError: the data are not there, or lack a column.
    """
    check_found(read_columns(source, split), source, needed, named)


def check_found(columns: Sequence[str] | None, source: str, needed: Columns, named: Iterable[str | None] = ()) -> None:
    """`check_columns` of known columns; None are not known."""
    wanted = [(name,) for name in named if name is not None] + list(needed)
    if columns is None or not (lacking := [names for names in wanted if not {*names} & {*columns}]):
        return
    told = " and no ".join(" or ".join(names) for names in dict.fromkeys(lacking))
    raise FusionError(
        f"{source} has the columns {', '.join(columns)}, but no {told}",
        "name the right one, see --help, or rename it in the data",
    )


def check_local(names: Iterable[str | None]) -> None:
    """Refuses models that are neither a folder here nor an id that the Hub could have.

    Raises:
        FusionError: naming the first.
    """
    for name in filter(None, names):
        for ref in filter(None, ModelRef.parse_pair(name)):
            if ref.is_folder:
                continue
            if ref.id.startswith((".", "/", "~")) or ref.id.count("/") > 1:
                raise FusionError(f"there is no folder {ref}", "check the path, or write owner/name")
            repo_ref(ref)


def check_folder(name: str | None, option: str) -> None:
    """Refuses a folder that is not there.

    Raises:
        FusionError: naming it.
    """
    if name is not None and not Path(name).is_dir():
        raise FusionError(f"there is no folder {name}", f"{option} DIR")


def check_repo(name: str) -> None:
    """Refuses what cannot be the name of a repo to push to.

    Raises:
        FusionError: it is not owner/name.
    """
    if name.count("/") != 1 or "@" in name:
        raise FusionError(f"{name!r} is not the name of a repo", "write owner/name")
    repo_ref(name)
