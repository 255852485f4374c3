"""The files beside the merged weights: the first model's tokenizer, processors, subfolders and code."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fusion.errors import FusionError
from hf_fusion.families import MEASURED
from hf_fusion.hub.manifests import MODULES, local_named_files, module_folders, read_content
from hf_fusion.io.files import own_file, read_file
from hf_fusion.io.json_files import read_json
from hf_fusion.merging.engine.output import FACTS
from hf_fusion.merging.tokenizers.chat_templates import set_template
from hf_fusion.merging.tokenizers.vocabulary import is_tokenizer_file

if TYPE_CHECKING:
    from hf_fusion.merging.engine.open_models import Model
    from hf_fusion.merging.plan import Plan

logger = logging.getLogger(__name__)

# files about the weights of the input model, and its results
_NOT_COPIED = (
    *("adapter_config.json", "trainer_state.json", *MEASURED),
    FACTS,
)
# files with token ids, besides config.json
_WITH_TOKENS = ("generation_config.json", "processor_config.json", "preprocessor_config.json")
# files of sentence-transformers
_SENTENCES = (MODULES, "config_sentence_transformers.json", "sentence_bert_config.json")


def merged_files(planned: Plan) -> dict[str, bytes]:
    """The files of a merged model, except weights and recipe: path -> content."""
    first = planned.first
    files = read_small_files(first.folder, first.name)
    if first.under is not None:  # an adapter, which may include a tokenizer
        under = read_small_files(first.under, first.name)
        has_tokenizer = any(map(is_tokenizer_file, files))
        files = {name: raw for name, raw in under.items() if not (has_tokenizer and is_tokenizer_file(name))} | files
    files = _with_modules(files, planned)
    if code := [name for name in files if name.endswith(".py")]:
        listed = ", ".join(sorted(code)[:5])
        logger.warning("%s has custom code (%s): copied, runs only with trust_remote_code=True", first.name, listed)
    if planned.vocabulary is not None:
        files = {name: raw for name, raw in files.items() if not is_tokenizer_file(name)} | planned.vocabulary.files
        for name in [name for name in _WITH_TOKENS if name in files]:
            folder = first.folder if own_file(first.folder / name) else first.under or first.folder
            moved = planned.vocabulary.update_ids(read_json(folder / name, first.name), name)
            files[name] = (json.dumps(moved, indent=2, ensure_ascii=False) + "\n").encode()
    if planned.recipe.chat_template is not None:
        models = {model.name: model for model in [*([planned.base] if planned.base else []), *planned.experts]}
        files = set_template(files, planned.recipe.chat_template, models)
    if planned.facts:
        files[FACTS] = (json.dumps(planned.facts, indent=2) + "\n").encode()
    files["config.json"] = (json.dumps(planned.config, indent=2) + "\n").encode()
    return files


def read_small_files(folder: Path, name: str) -> dict[str, bytes]:
    """Configuration, tokenizer and code of a model, at its root and in named subfolders: path -> content.

    Includes Python files only if the model's configurations refer to custom code, which never runs here, and runs with
    the merged model only with consent.

    Raises:
        FusionError: a file is a link out of the model's folder, or a manifest names a folder outside of it.
    """
    code = _names_code(folder, name)
    wanted = (".json", ".txt", ".model", ".jinja") + ((".py",) if code else ())
    found = [file.name for file in sorted(folder.iterdir()) if file.name.endswith(wanted)]
    found = [file for file in found if not file.endswith(".index.json") and file not in _NOT_COPIED]
    below = local_named_files(folder, name, code=code)
    found += [file for file in below if not file.endswith(".safetensors")]
    return {file: read_file(folder / file, folder) for file in found if own_file(folder / file, folder)}


def _names_code(folder: Path, name: str) -> bool:
    """Whether a configuration at a model's root refers to custom code."""
    for file in sorted(folder.glob("*config.json")):
        if own_file(file) and _has_auto_map(file, name):
            return True
    rows = read_content(folder / MODULES, name) if own_file(folder / MODULES) else []
    return any(not str(row.get("type", "")).startswith("sentence_transformers.") for row in rows if _is_row(row))


def _has_auto_map(file: Path, name: str) -> bool:
    """Whether a file refers to custom code; False for files in other formats (all-MiniLM's data_config.json)."""
    try:
        content = read_content(file, name)
    except FusionError:  # files that are only copied need not be readable
        return False
    return isinstance(content, Mapping) and bool(content.get("auto_map"))


def _is_row(row: object) -> bool:
    return isinstance(row, Mapping) and "type" in row


def _with_modules(files: dict[str, bytes], planned: Plan) -> dict[str, bytes]:
    """Adds sentence-transformers' modules of the first expert that has them, if the base has none.

    Modules with weights are not added: they are merged, or left out by ``mismatch``.
    """
    giver = planned.first
    if MODULES not in files:
        givers = (expert for expert in planned.experts if own_file(expert.folder / MODULES) and not expert.modules)
        found = next(givers, None)
        if found is None:
            return files
        giver, theirs = found, read_small_files(found.folder, found.name)
        own = {name: raw for name, raw in theirs.items() if name in _SENTENCES or _is_below(name, _folders(found))}
        logger.warning("%s has no %s: that of %s is used", planned.first.name, MODULES, giver.name)
        files = files | own
    for expert in planned.experts:
        for folder in _folders(expert) if expert is not giver else []:
            name = f"{folder}/config.json"
            place, root = expert.folder / name, expert.folder
            theirs_here = read_file(place, root) if own_file(place, root) else None
            if theirs_here is not None and name in files and _unlike(files[name], theirs_here):
                logger.warning("%s of %s differs from that of %s, which is used", name, expert.name, giver.name)
    return files


def _folders(model: Model) -> list[str]:
    """The folders of a model's modules."""
    if not own_file(model.folder / MODULES):
        return []
    return module_folders(model.name, [MODULES], lambda file: read_content(model.folder / file, model.name))


def _is_below(name: str, folders: list[str]) -> bool:
    return name.startswith(tuple(f"{folder}/" for folder in folders))


def _unlike(first: bytes, second: bytes) -> bool:
    """Whether two configurations differ as JSON."""
    try:
        return bool(json.loads(first) != json.loads(second))
    except ValueError:
        return first != second
