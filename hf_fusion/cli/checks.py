"""Checks before torch, transformers or datasets are imported: folders, data and their columns, names and ids.

A mistyped argument is therefore reported within a second. The library checks all of it again after reading the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.cli.errors import UsageError, checking_arguments
from hf_fusion.data import read_columns
from hf_fusion.errors import FusionError, listed, nearest, path_suggestion, suggestion
from hf_fusion.families import FAMILIES, Family
from hf_fusion.hub.refs_to_files import repo_ref
from hf_fusion.hub.task_heads import WRITERS, Head, architectures, head_of_adapter, head_of_architecture
from hf_fusion.io.folders import recover_folder
from hf_fusion.io.json_files import read_json
from hf_fusion.recipe import RECIPE_FILE
from hf_fusion.types import ModelRef

if TYPE_CHECKING:
    from hf_fusion.bench.suite import Suite

Columns = Sequence[tuple[str, ...]]
"""A data set needs one column of each entry."""

ANY_INPUT = ("text", "prompt", "image")
GENERATION: Columns = (("prompt",), ("target",))
# head, as an Auto class or in a family's config → columns to fit and evaluate on
COLUMNS_BY_HEAD: dict[str, Columns] = {
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


def read_model_config(folder: str) -> dict[str, Any]:
    """The ``config.json`` of a model's folder; empty if the folder only has a recipe.

    Raises:
        FusionError: the folder is missing, or has neither.
    """
    path = Path(folder)
    recover_folder(path)
    if not path.is_dir():
        raise _no_folder(folder, "check the path, or make a model: hf-fusion fuse … --output DIR")
    config = path / "config.json"
    if not config.is_file() and not (path / RECIPE_FILE).is_file():
        raise FusionError(
            f"{folder} is not a model's folder: it has no config.json", "make a model: hf-fusion fuse … --output DIR"
        )
    return read_json(config, folder) if config.is_file() else {}


def family_of_config(config: dict[str, Any]) -> Family | None:
    """The family of a model, by its config; None for static merges and other plain models."""
    return FAMILIES.get(str(config.get("model_type")))


def pools_rows(config: dict[str, Any]) -> bool:
    """Whether a model is evaluated on one data set, rather than task by task."""
    family = family_of_config(config)
    return family is not None and not family.by_task


def _inputs(config: dict[str, Any]) -> tuple[str, ...]:
    return ("image",) if str(config.get("head")).startswith("image") else ANY_INPUT


def columns_to_evaluate(config: dict[str, Any], label: str) -> Columns:
    """Columns needed to evaluate a model; empty if its config does not determine them."""
    if pools_rows(config):
        return (_inputs(config), ("target",) if config.get("vocabularies") else (label,))
    if family_of_config(config):
        needed = COLUMNS_BY_HEAD.get(str(config.get("head")), ())
    else:
        head = head_of_architecture(next(iter(architectures(config)), None))
        needed = COLUMNS_BY_HEAD.get(head.auto, ()) if head else ()
    return [(label,) if column == ("label",) else column for column in needed]


def check_writes(config: dict[str, Any], folder: str) -> None:
    """Check that a model is a language model, if its config determines it.

    Raises:
        FusionError: it is not.
    """
    if family_of_config(config):
        what, writes = f"has the head {config.get('head')}", config.get("head") in ("causal-lm", "seq2seq-lm")
    else:
        name = next(iter(architectures(config)), None)
        head = head_of_architecture(name)
        what, writes = f"is a {name}", head is None or head.auto in WRITERS
    if not writes:
        raise FusionError(
            f"{folder} {what}, but lm-evaluation-harness runs language models",
            f"measure it on labelled rows: hf-fusion eval {folder} --data DATA",
        )


def columns_to_fit(config: dict[str, Any], by: str, label: str, expert: str) -> Columns:
    """Columns needed to fit the fuser of a FoE."""
    inputs = _inputs(config)
    if config.get("mode", "output") != "selection":
        return (inputs, (label,))
    if by == "domain":
        return (inputs, (expert,))
    return (inputs, ("target",) if config.get("vocabularies") else (label,))


def columns_of_adapter(folder: str) -> Columns:
    """Columns needed to train an adapter's gates; empty if its config does not determine them."""
    config = Path(folder) / "adapter_config.json"
    head: Head | None = head_of_adapter(read_json(config, folder)) if config.is_file() else None
    return COLUMNS_BY_HEAD.get(head.auto, ()) if head else ()


def check_columns(source: str, split: str, needed: Columns, named: Iterable[str | None] = ()) -> None:
    """Check that data have the needed columns, if that is known without reading them.

    Args:
        source, split: as for `load_rows`.
        needed: columns that must exist.
        named: columns that the user named; None for defaults.

    Raises:
        FusionError: the data do not exist, or lack a column.
    """
    check_known_columns(read_columns(source, split), source, needed, named)


def check_known_columns(
    columns: Sequence[str] | None, source: str, needed: Columns, named: Iterable[str | None] = ()
) -> None:
    """`check_columns` for known columns; None if they are unknown."""
    wanted = [(name,) for name in named if name is not None] + list(needed)
    if columns is None or not (missing := [names for names in wanted if not {*names} & {*columns}]):
        return
    names = " and no ".join(" or ".join(group) for group in dict.fromkeys(missing))
    rename = "name the right column by an option (see --help), or rename it in the data"
    raise FusionError(
        f"{source} has the columns {listed(columns)}, but no {names}",
        f"{suggestion(missing[0][0], columns)} {rename}" if nearest(missing[0][0], columns) else rename,
    )


def check_models(names: Iterable[str | None]) -> None:
    """Check that each model is a local folder or a valid repo id.

    Raises:
        FusionError: for the first that is neither.
    """
    for name in filter(None, names):
        for ref in filter(None, ModelRef.parse_pair(name)):
            if ref.is_folder:
                continue
            if ref.id.startswith((".", "/", "~")) or ref.id.count("/") > 1:
                raise FusionError(
                    f"there is no folder {ref}", path_suggestion(ref.id, "check the path, or write owner/name")
                )
            repo_ref(ref)


def check_folder(name: str | None, option: str) -> None:
    """Check that a folder exists.

    Raises:
        FusionError: it does not.
    """
    if name is not None and not Path(name).is_dir():
        raise _no_folder(name, f"check the path: {option} DIR")


def check_results(name: str) -> None:
    """Check that results of the benchmark exist, as a file or folder.

    Raises:
        FusionError: they do not.
    """
    if not Path(name).exists():
        hint = path_suggestion(name, f"check the path, or make them: hf-fusion bench run --suite NAME --output {name}")
        raise FusionError(f"{name} does not exist", hint)


def _no_folder(name: str, otherwise: str) -> FusionError:
    if Path(name).exists():
        return FusionError(f"{name} is a file, not a folder", otherwise)
    return FusionError(f"there is no folder {name}", path_suggestion(name, otherwise))


def check_repo(name: str) -> None:
    """Check that a repo id has the form owner/name.

    Raises:
        FusionError: it does not.
    """
    if name.count("/") != 1 or "@" in name:
        raise UsageError(f"{name!r} is not the name of a repo", "write owner/name")
    repo_ref(name)


def suite_named(name: str) -> Suite:
    """The suite of ``--suite``.

    Raises:
        UsageError: there is none of that name.
        FusionError: its file cannot be read, or is wrong.
    """
    from hf_fusion.bench.suite import load_suite, suite_names

    with nullcontext() if name.endswith(".yaml") or name in suite_names() else checking_arguments():
        return load_suite(name)
