"""What an exported model was made from: read from a fused model, and written beside the export with its card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hf_fusion import __version__
from hf_fusion.cards.markdown import fenced
from hf_fusion.errors import FusionError
from hf_fusion.families import FAMILIES
from hf_fusion.hub.formats import ADAPTER_CONFIG
from hf_fusion.hub.licenses import combine
from hf_fusion.hub.provenance import (
    has_recipe,
    hash_folders,
    list_local_folders,
    read_recipe,
    strip_local_paths,
    strip_paths_from_recipe,
)
from hf_fusion.hub.readme import escape_markdown, read_metadata
from hf_fusion.hub.task_heads import architectures, head_of_adapter, head_of_architecture
from hf_fusion.io.files import own_file, read_file, read_text
from hf_fusion.io.json_files import read_json
from hf_fusion.recipe import Recipe
from hf_fusion.types import ModelRef

EXPORT_FILE = "export.json"
README = "README.md"
CARD_MARK = "<!-- written by hf-fusion export -->"
"""Line of a card by which it is recognised: one that was written by hand is not replaced."""
_LICENSES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")
# metadata of a card that stay true of an export
_KEPT = ("license", "license_name", "license_link", "language", "base_model")
_LIBRARIES = {"dense": "transformers", "adapter": "peft", "gguf": "gguf"}


@dataclass(frozen=True)
class Provenance:
    """What is known of a model that is exported.

    Attributes:
        folder: of the model.
        name: of the folder, with the sha256 of its model files.
        recipe: content of its recipe, without local paths; None for a model that was not fused.
        metadata: of its card, as far as they stay true of an export; with a licence, if one is known.
        earlier: how it was exported before, if it is an export itself.
    """

    folder: Path
    name: str
    recipe: dict[str, Any] | None
    metadata: dict[str, Any] = field(default_factory=dict)
    earlier: dict[str, Any] | None = None

    @property
    def sources(self) -> list[ModelRef]:
        """The models on the Hub, at their commits, that the recipe names."""
        if not self.recipe:
            return []
        names = Recipe.from_dict(self.recipe).models
        refs = [ref for name in names for ref in ModelRef.parse_pair(name) if ref]
        return list(dict.fromkeys(ref for ref in refs if ref.is_repo and ref.revision and not ref.is_content))


def read_provenance(folder: Path) -> Provenance:
    """Reads what a model was made from, of its recipe, card and config.

    Raises:
        FusionError: a file cannot be read.
    """
    [name] = hash_folders([str(folder.resolve())]).values()
    config = read_json(folder / "config.json", str(folder)) if (folder / "config.json").is_file() else {}
    recipe, earlier = None, None
    if own_file(folder / EXPORT_FILE):
        facts = read_json(folder / EXPORT_FILE, str(folder))
        recipe, earlier = facts.get("recipe"), {key: value for key, value in facts.items() if key != "recipe"}
    elif has_recipe(folder):
        found = read_recipe(folder)
        there = [path for path in list_local_folders(found) if Path(path).is_dir()]
        recipe = strip_paths_from_recipe(found, hash_folders(there)).to_dict()
    card = read_metadata(read_text(folder / README)) if own_file(folder / README) else {}
    metadata = {key: card[key] for key in _KEPT if key in card}
    if "license" not in metadata and config.get("model_type") in FAMILIES:
        try:
            metadata["license"] = combine({row["name"]: row.get("license") for row in config.get("experts", [])})
        except FusionError:  # left open, as on the cards of merges
            metadata.pop("license", None)
    return Provenance(folder, name, recipe, metadata, earlier)


def write_provenance(
    staging: Path, given: Provenance, form: str, sentence: str, facts: Mapping[str, Any], file: str
) -> dict[str, Any]:
    """Writes ``export.json``, the card and the licence's text into a staging folder.

    Args:
        staging: with the exported files.
        given: what the model was made from.
        form: "dense", "adapter" or "gguf".
        sentence: how it was made.
        facts: the experts' weights and the like, as plain data.
        file: the file with the weights.

    Returns:
        The content of ``export.json``.
    """
    content: dict[str, Any] = {"form": form, "from": given.name, "what": sentence, **facts}
    content = strip_local_paths(content, {})
    content |= {"hf_fusion": __version__}
    content |= {"earlier": given.earlier} if given.earlier else {}
    content |= {"recipe": given.recipe} if given.recipe else {}
    (staging / EXPORT_FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (staging / README).write_text(_card(staging, given, form, sentence, file), encoding="utf-8")
    for pattern in _LICENSES:
        for path in given.folder.glob(pattern):
            if own_file(path, given.folder) and not (staging / path.name).exists():
                (staging / path.name).write_bytes(read_file(path, given.folder))
    return content


def _card(staging: Path, given: Provenance, form: str, sentence: str, file: str) -> str:
    metadata: dict[str, Any] = {"library_name": _LIBRARIES[form], **given.metadata}
    method = str((given.recipe or {}).get("method", ""))
    metadata["tags"] = ["hf-fusion", *(["merge", method] if method else [])]
    if sources := list(dict.fromkeys(ref.repo for ref in given.sources)):
        metadata |= {"base_model": sources, "base_model_relation": "merge"}
    if form == "adapter":
        base = read_json(staging / ADAPTER_CONFIG, str(staging)).get("base_model_name_or_path") or ""
        if base and not Path(base).is_absolute():
            metadata |= {"base_model": base, "base_model_relation": "adapter"}
    if task := _task(staging, given.folder):
        metadata["pipeline_tag"] = task
    parts = [f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()}\n---", CARD_MARK]
    parts += [f"# {escape_markdown(given.folder.resolve().name)}, exported ({form})", escape_markdown(sentence)]
    parts += [f"Made by hf_fusion {__version__} from `{given.name}`; `{EXPORT_FILE}` has the weights of the experts."]
    parts += [_USAGE[form](staging, file)]
    if given.recipe:
        text = yaml.safe_dump(given.recipe, sort_keys=False, allow_unicode=True)
        parts += ["What it was fused from:", fenced(text, "yaml")]
    return "\n\n".join(parts) + "\n"


def _task(staging: Path, source: Path) -> str | None:
    """The task of an exported model; only language models become GGUF files."""
    if not (staging / ADAPTER_CONFIG).exists() and not (staging / "config.json").exists():
        return "text-generation"
    if (staging / ADAPTER_CONFIG).exists():
        head = head_of_adapter(read_json(staging / ADAPTER_CONFIG, str(staging)))
    else:
        head = head_of_architecture(next(iter(architectures(read_json(staging / "config.json", str(staging)))), None))
    return head.tasks[0] if head else None


def _dense_usage(staging: Path, file: str) -> str:
    head = head_of_architecture(next(iter(architectures(read_json(staging / "config.json", str(staging)))), None))
    auto = head.auto if head else "AutoModel"
    return fenced(f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained(FOLDER)", "python")


def _adapter_usage(staging: Path, file: str) -> str:
    return fenced("from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base, FOLDER)", "python")


def _gguf_usage(staging: Path, file: str) -> str:
    return fenced(f"llama-server -m {file}", "sh")


_USAGE = {"dense": _dense_usage, "adapter": _adapter_usage, "gguf": _gguf_usage}


def keep_hand_written(staging: Path, folder: Path) -> None:
    """Keeps a card in the folder that is replaced, if it was written by hand."""
    old = folder / README
    if own_file(old) and CARD_MARK not in read_text(old):
        shutil.copyfile(old, staging / README)


__all__ = ["EXPORT_FILE", "Provenance", "keep_hand_written", "read_provenance", "write_provenance"]
