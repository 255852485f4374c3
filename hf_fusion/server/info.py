"""The properties of a repo: tags and facts derived from its card, its config and its file names."""

from __future__ import annotations

import json
import math
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.server import card
from hf_fusion.server.dates import stamp
from hf_fusion.server.plain_json import plain, text
from hf_fusion.server.repo import Repo

if TYPE_CHECKING:
    from hf_fusion.server.repo import File

MAX_TAGS, MAX_TAG = 1000, 300
SHOWN_CARD = 300_000  # characters
MAX_METADATA = 1 << 22  # a README.md or config.json beyond this is not read for tags
ARXIV = re.compile(r"arxiv\.org/(?:abs|pdf)/(\d{4}\.\d{4,5})|arXiv:(\d{4}\.\d{4,5})", re.IGNORECASE)

# suffix of an architecture's class name → task, if the card names none
TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForImageClassification": "image-classification",
    "ForObjectDetection": "object-detection",
    "ForSemanticSegmentation": "image-segmentation",
    "ForSpeechSeq2Seq": "automatic-speech-recognition",
    "ForCTC": "automatic-speech-recognition",
    "ForAudioClassification": "audio-classification",
}
# suffix of a file name → tag
FILE_TAGS = {
    ".safetensors": "safetensors",
    ".gguf": "gguf",
    "pytorch_model.bin": "pytorch",
    ".onnx": "onnx",
    "tf_model.h5": "tf",
    "flax_model.msgpack": "jax",
    "events.out.tfevents": "tensorboard",
}
# card field → prefix of its tags on the Hub
CARD_TAGS = {
    "models": {"language": "", "datasets": "dataset:", "license": "license:"},
    "datasets": {
        "task_categories": "task_categories:",
        "task_ids": "task_ids:",
        "annotations_creators": "annotations_creators:",
        "language_creators": "language_creators:",
        "multilinguality": "multilinguality:",
        "source_datasets": "source_datasets:",
        "language": "language:",
        "license": "license:",
        "size_categories": "size_categories:",
    },
    "spaces": {"sdk": "", "license": "license:"},
}


# properties of the real Hub that are constant here
DEFAULT_PROPERTIES: dict[str, Any] = {
    "disabled": False,
    "likes": 0,
    "trendingScore": 0,
    "spaces": [],
    "region": "us",
    **dict.fromkeys(
        (
            *("gguf", "widgetData", "transformersInfo", "childrenModelCount", "inference", "inferenceProviderMapping"),
            *("evalResults", "resourceGroup", "runtime", "citation", "description", "paperswithcode_id"),
        )
    ),
}


@lru_cache(maxsize=256)
def facts(repo: Repo, sha: str) -> dict[str, Any]:
    """Everything derived from one commit; the result is cached and must not be changed."""
    readme = _text(repo, sha, "README.md")
    try:
        metadata = card.parse(readme)
    except ValueError:
        metadata = {}
    config = _config(repo, sha) if repo.kind == "models" else {}
    paths = list(repo.files(sha))
    known: dict[str, Any] = {
        "cardData": metadata,
        "config": config,
        "library_name": _library(metadata, config),
        "pipeline_tag": _task(metadata, config),
        "model-index": metadata.get("model-index"),
        "baseModels": _base_models(metadata, config, paths),
        "mask_token": None,
        "usedStorage": sum(file.size for file in repo.files(sha).values()),
        "sdk": metadata.get("sdk") or repo.settings.get("sdk"),
        "safetensors": _parameters(repo, sha) if repo.kind == "models" else None,
        "models": card.strings(metadata.get("models")),
        "datasets": card.strings(metadata.get("datasets")),
        "lastModified": stamp(repo.commit_object(sha).commit_time),
    }
    known["tags"] = _tags(repo.kind, known, paths, readme)[:MAX_TAGS]
    return {**plain(known), "readme": card.split(readme)[1][:SHOWN_CARD]}


def describe(repo: Repo, sha: str, blobs: bool = False) -> dict[str, Any]:
    """All properties of a repo at a commit, under the clients' names."""
    known = {**commit_properties(repo, sha), **current_properties(repo)}
    if blobs:
        known["siblings"] = [{"rfilename": file.path, **_blob(file)} for file in repo.files(sha).values()]
    return known


def commit_properties(repo: Repo, sha: str) -> dict[str, Any]:
    """The properties derived from a commit."""
    known = facts(repo, sha)
    return {
        "sha": sha,
        **{name: value for name, value in known.items() if name != "readme"},
        "tags": list(known["tags"]),
        "siblings": [{"rfilename": path} for path in repo.files(sha)],
        "mainSize": known["usedStorage"],
    }


def current_properties(repo: Repo) -> dict[str, Any]:
    """The properties that change without a commit, and the constant ones."""
    downloads, settings = repo.downloads, repo.settings
    return {
        **DEFAULT_PROPERTIES,
        "_id": settings["created"],
        "id": repo.name,
        "modelId": repo.name,
        "author": repo.owner,
        "createdAt": settings["created"],
        "private": settings.get("private", False),
        "gated": settings.get("gated", False),
        "downloads": downloads,
        "downloadsAllTime": downloads,
        "subdomain": repo.name.replace("/", "-").lower(),
    }


def _blob(file: File) -> dict[str, Any]:
    found = {"size": file.size, "blobId": file.oid}
    if file.sha256:
        found["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    return found


def _text(repo: Repo, sha: str, path: str) -> str:
    file = repo.files(sha).get(path)
    if not file or file.sha256 or file.size > MAX_METADATA:
        return ""
    return repo.read(file).decode(errors="replace")


def _json(repo: Repo, sha: str, path: str) -> dict[str, Any]:
    try:
        value = json.loads(_text(repo, sha, path) or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _config(repo: Repo, sha: str) -> dict[str, Any]:
    """The part of ``config.json`` and ``adapter_config.json`` that the Hub shows."""
    raw = plain(_json(repo, sha, "config.json"))
    shown = ("architectures", "model_type", "auto_map", "quantization_config")
    config = {name: raw[name] for name in shown if name in raw}
    adapter = _json(repo, sha, "adapter_config.json")
    if adapter:
        config["peft"] = {name: adapter.get(name) for name in ("base_model_name_or_path", "task_type")}
    return config


def _parameters(repo: Repo, sha: str) -> dict[str, Any] | None:
    """Parameters per dtype, from the headers of the safetensors files; None without such files."""
    counts: dict[str, int] = {}
    for file in repo.files(sha).values():
        if file.sha256 and file.path.endswith(".safetensors"):
            for tensor in _safetensors_header(repo.large_path(file.sha256)).values():
                if (shape := _shape(tensor)) is not None:
                    counts[tensor["dtype"]] = counts.get(tensor["dtype"], 0) + math.prod(shape)
    return {"parameters": counts, "total": sum(counts.values())} if counts else None


def _shape(tensor: object) -> list[int] | None:
    """A header entry's shape; None if it does not describe a tensor."""
    if not isinstance(tensor, dict) or not isinstance(tensor.get("dtype"), str):
        return None
    shape = tensor.get("shape")
    fits = (
        isinstance(shape, list) and len(shape) < 16 and all(type(size) is int and 0 <= size < 1 << 40 for size in shape)
    )
    return shape if fits else None


def _safetensors_header(path: Path) -> dict[str, Any]:
    """Names, dtypes and shapes; empty for a file in another format."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MAX_METADATA:
            return {}
        try:
            header = json.loads(file.read(size))
        except (ValueError, RecursionError):
            return {}
    return header if isinstance(header, dict) else {}


def _library(metadata: dict[str, Any], config: dict[str, Any]) -> str | None:
    if isinstance(name := metadata.get("library_name"), str):
        return name
    return "transformers" if "model_type" in config else None


def _task(metadata: dict[str, Any], config: dict[str, Any]) -> str | None:
    if isinstance(task := metadata.get("pipeline_tag"), str):
        return task
    names = card.strings(config.get("architectures"))
    return next((task for name in names for end, task in TASKS.items() if name.endswith(end)), None)


def _base_models(metadata: dict[str, Any], config: dict[str, Any], paths: list[str]) -> dict[str, Any] | None:
    """The base models the *card* names; an adapter whose card names none stays without, as on the real Hub."""
    bases = card.strings(metadata.get("base_model"))
    if not bases:
        return None
    relation = metadata.get("base_model_relation")
    if relation not in ("adapter", "merge", "quantized", "finetune"):
        relation = _relation(bases, metadata, config, paths)
    return {"relation": relation, "models": [{"_id": base, "id": base} for base in bases]}


def _relation(bases: list[str], metadata: dict[str, Any], config: dict[str, Any], paths: list[str]) -> str:
    if "peft" in config or metadata.get("library_name") == "peft":
        return "adapter"
    if "quantization_config" in config or any(path.endswith(".gguf") for path in paths):
        return "quantized"
    return "merge" if len(bases) > 1 or "merge" in card.strings(metadata.get("tags")) else "finetune"


def _tags(kind: str, known: dict[str, Any], paths: list[str], readme: str) -> list[str]:
    """Tags in the Hub's order: library, files, model type, the card's own, derived ones, region; each once."""
    metadata, config = known["cardData"], known["config"]
    tags: list[str | None] = []
    if kind == "models":
        tags += [known["library_name"]]
        tags += [tag for end, tag in FILE_TAGS.items() if any(end in p.rsplit("/", 1)[-1] for p in paths)]
        tags += card.strings(config.get("model_type"))
        tags += [known["pipeline_tag"]]
    tags += card.strings(metadata.get("tags"))
    if "auto_map" in config:
        tags += ["custom_code"]
    if metadata.get("model-index"):
        tags += ["model-index"]
    for name, prefix in CARD_TAGS[kind].items():
        tags += [prefix + value for value in card.strings(metadata.get(name))]
    if kind == "spaces" and not metadata.get("sdk"):
        tags += [known["sdk"]]
    if bases := known["baseModels"]:
        tags += [f"base_model:{model['id']}" for model in bases["models"]]
        tags += [f"base_model:{bases['relation']}:{model['id']}" for model in bases["models"]]
    tags += [f"arxiv:{first or second}" for first, second in ARXIV.findall(readme)]
    tags += ["region:us"]
    return list(dict.fromkeys(text(tag)[:MAX_TAG] for tag in tags if tag))
