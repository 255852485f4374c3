"""Experts and bases that are folders here: what others are told of them, or how they get to the Hub first."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError
from hf_fusion.families import FAMILIES
from hf_fusion.hub.client import explained, same_file
from hf_fusion.hub.formats import ADAPTER_CONFIG
from hf_fusion.hub.heads import architectures, default_task, head_of_adapter, label_names
from hf_fusion.hub.provenance import content_of, contents_of, folders_of, model_files, told_plain
from hf_fusion.hub.resolve import resolve
from hf_fusion.io.files import own_file, read_file, read_text
from hf_fusion.io.json_files import read_json
from hf_fusion.merging.loaded import CONTENTS_ATTRIBUTE
from hf_fusion.recipe import RECIPE_FILE, Recipe
from hf_fusion.types import ExpertInfo, ModelRef

if TYPE_CHECKING:
    from huggingface_hub import HfApi

README = "README.md"
_COPIED = (".json", ".yaml", ".txt", ".jinja", ".model", ".py", ".md")


def folder_info(name: str | Path, told: str = "") -> ExpertInfo:
    """What a folder's own files tell about the model in it.

    Args:
        name: the folder.
        told: what others are told instead, ``NAME@sha256:…`` or ``owner/name``; default is the folder's name.
    """
    source = resolve(name)
    ref = ModelRef.parse_repo(told) if told else ModelRef(source.name)
    card, config = source.card, source.config
    license_id, head = card.get("license"), head_of_adapter(source.adapter) if source.is_adapter else None
    usual = head.tasks[0] if head else default_task(next(iter(architectures(config)), None))
    base = source.adapter.get("base_model_name_or_path")
    return ExpertInfo(
        id=ref.id,
        sha=ref.revision or "",
        task=card.get("pipeline_tag") or usual,
        labels=label_names(config),
        license=license_id.lower() if isinstance(license_id, str) else None,
        base_model=base if isinstance(base, str) and base and not Path(base).expanduser().is_dir() else None,
        base_revision=source.adapter.get("revision"),
        is_adapter=source.is_adapter,
    )


def recorded_folder(name: str | Path) -> str | None:
    """The base of an adapter in a folder, where that is a folder too."""
    base = str(_adapter_config(Path(name)).get("base_model_name_or_path") or "")
    return str(Path(base).expanduser().resolve()) if base and Path(base).expanduser().is_dir() else None


def told_names(recipe: Recipe, folder: Path, model: Any = None) -> dict[str, str]:
    """Every folder of a recipe -> ``NAME@sha256:…``, by its content when the model was made of it.

    Args:
        recipe: with paths.
        folder: the fused model's.
        model: the same in memory, if it is.

    Raises:
        FusionError: nothing tells what a folder held: it is gone, or was changed since.
    """
    known = dict(getattr(model, CONTENTS_ATTRIBUTE, {}))
    config = read_json(folder / "config.json", str(folder)) if (folder / "config.json").exists() else {}
    if isinstance(own := config.get("recipe"), Mapping):
        published = Recipe.from_dict(own, f"{folder}/config.json")
        pairs = zip([*recipe.experts], [*published.experts], strict=False)
        known |= {here.model: there.model for here, there in pairs if ModelRef.parse_repo(there.model).is_content}
        if recipe.base and published.base and ModelRef.parse_repo(published.base).is_content:
            known[recipe.base] = published.base
    unknown = [path for path in folders_of(recipe) if path not in known]
    made = (folder / RECIPE_FILE).stat().st_mtime_ns if (folder / RECIPE_FILE).exists() else 0
    for path in unknown:
        if not Path(path).is_dir():
            raise FusionError(
                f"{path}, which {folder} was made of, is not there.", "put it back, or fuse again from owner/name@sha"
            )
        changed = max(((Path(path) / name).stat().st_ctime_ns for name in model_files(Path(path))), default=0)
        if changed > made:
            raise FusionError(f"{path} was changed after {folder} was made of it.", "fuse it again")
    return {path: known[path] for path in folders_of(recipe) if path in known} | contents_of(unknown)


def refuse_changed(names: Mapping[str, str]) -> None:
    """Refuses folders that are not, or no longer, what a model was made of.

    Args:
        names: path -> ``NAME@sha256:…``.
    """
    for path, name in names.items():
        if not Path(path).is_dir():
            raise FusionError(f"{path} is not there.", "put it back, or publish without --push-experts")
        if content_of(path) != ModelRef.parse_repo(name).revision:
            raise FusionError(f"{path} was changed after the model was made of it.", "fuse it again")


def repos_of(names: Mapping[str, str], repo_id: str) -> dict[str, str]:
    """Where each folder would be pushed to, bases that only adapters name among them: path -> ``owner/name``.

    Raises:
        FusionError: two folders have one name, or that of the model; or a folder that the recipe names holds no model.
    """
    owner = repo_id.partition("/")[0]
    paths = [path for name in names for path in (recorded_folder(name), name) if path]  # a base before its adapters
    repos = {path: f"{owner}/{Path(path).name}" for path in dict.fromkeys(paths)}
    taken: dict[str, str] = {repo_id.lower(): "the model itself"}
    for path, repo in repos.items():
        if other := taken.get(repo.lower()):
            raise FusionError(f"{path} and {other} would both be {repo}.", "rename the folder, and fuse again")
        # a recipe that came with a model may name any folder of this machine
        if not any(file.endswith((".safetensors", ".bin")) for file in model_files(Path(path))):
            raise FusionError(f"{path} holds no model: it has no weights.", "publish without --push-experts")
        taken[repo.lower()] = path
    return repos


def push_folders(repos: Mapping[str, str], private: bool, api: HfApi) -> dict[str, str]:
    """Pushes folders, each as one commit: path -> ``owner/name@sha``. What is there already is not sent again.

    Raises:
        FusionError: a repo of that name holds another model, or the Hub refuses.
    """
    pinned: dict[str, str] = {}
    for path, repo in repos.items():
        pinned[path] = str(ModelRef(repo, _push_folder(Path(path), repo, private, pinned, api)))
    return pinned


def _push_folder(folder: Path, repo: str, private: bool, pinned: Mapping[str, str], api: HfApi) -> str:
    """Pushes one folder's model and card; gives back its commit."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.hf_api import RepoFile

    with explained(repo), tempfile.TemporaryDirectory(prefix="hf-fusion-") as held:
        files = {name: folder / name for name in model_files(folder)}
        files |= {name: folder / name for name in (README,) if own_file(folder / name)}
        for name, path in files.items():
            if (text := _rewritten(path, pinned)) is not None:
                files[name] = Path(held, name.replace("/", "--"))
                files[name].write_text(text, encoding="utf-8")
        api.create_repo(repo, private=private, exist_ok=True)
        info = api.model_info(repo)
        tree = {
            e.path: e for e in api.list_repo_tree(repo, recursive=True, revision=info.sha) if isinstance(e, RepoFile)
        }
        model = [name for name in files if name != README]  # a card may have been edited there
        if all(name in tree and same_file(files[name], tree[name]) for name in model):
            return str(info.sha)
        if foreign := [name for name in tree if name.endswith((".safetensors", ".bin"))]:
            raise FusionError(
                f"{repo} has {foreign[0]}, and is not what {folder} holds.",
                "rename the folder, or push it yourself and fuse from owner/name@sha",
            )
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        return api.create_commit(repo, operations, commit_message="Push an expert", parent_commit=info.sha).oid


def _rewritten(file: Path, pinned: Mapping[str, str]) -> str | None:
    """The text of a card or small JSON file without a path of this machine; None where it has none."""
    if file.name == README:
        text = written = read_text(file)
        for path, name in pinned.items():
            written = written.replace(path, ModelRef.parse_repo(name).id)
        return written if written != text else None
    if not file.name.endswith(".json") or file.name.endswith((".index.json", "tokenizer.json", "vocab.json")):
        return None
    content = json.loads(read_text(file))
    told = told_plain(content, {path: ModelRef.parse_repo(name).id for path, name in pinned.items()})
    if file.name == ADAPTER_CONFIG and (base := recorded_folder(file.parent)) in pinned:
        ref = ModelRef.parse_repo(pinned[str(base)])
        told["base_model_name_or_path"], told["revision"] = ref.id, ref.revision
    return None if told == content else json.dumps(told, indent=2, ensure_ascii=False) + "\n"


def without_paths(
    folder: Path, files: Mapping[str, int], recipe: Recipe, names: Mapping[str, str], place: Path
) -> Path:
    """A fused model's folder as others may see it: links to its weights, and copies of small files without local paths.

    Args:
        folder: the fused model's.
        files: what of it is published.
        recipe: without paths.
        names: path -> what others are told instead.
        place: where the folder is made.
    """
    shown = place / folder.resolve().name
    for name in files:
        (shown / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(_COPIED):
            (shown / name).write_bytes(read_file(folder / name, folder))
        else:
            (shown / name).symlink_to((folder / name).resolve())
    for name in files:
        if not name.endswith(".json") or name.endswith((".index.json", "tokenizer.json", "vocab.json")):
            continue
        content = json.loads((shown / name).read_text(encoding="utf-8"))
        told = told_plain(content, names)
        if name == "config.json" and told.get("model_type") in FAMILIES:
            told = _with_recipe(told, recipe, names)
        if told != content:
            (shown / name).write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (shown / RECIPE_FILE).unlink(missing_ok=True)
    recipe.save(shown / RECIPE_FILE)
    if (folder / README).exists():
        (shown / README).write_bytes(read_file(folder / README))
    return shown


def _with_recipe(config: dict[str, Any], recipe: Recipe, names: Mapping[str, str]) -> dict[str, Any]:
    """A family's config with that recipe, and with experts that were pushed by their ids and commits."""
    rows, ids = [], {}
    for row, expert in zip(config["experts"], recipe.experts, strict=True):
        ref = ModelRef.parse_repo(expert.model)
        is_pushed = expert.model in names.values() and not ref.is_content
        ids[row["name"]] = ref.id if is_pushed else row["name"]
        rows.append({**row, "name": ref.id, "revision": ref.revision} if is_pushed else row)
    told = {**config, "experts": rows, "recipe": recipe.to_dict()}
    if config.get("default_task") in ids:
        told["default_task"] = ids[config["default_task"]]
    if recipe.base and recipe.base in names.values() and isinstance(config.get("base"), Mapping):
        base = ModelRef.parse_repo(recipe.base)
        told["base"] = {"id": base.id, "revision": None if base.is_content else base.revision}
    return told


def _adapter_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / ADAPTER_CONFIG, str(folder)) if (folder / ADAPTER_CONFIG).exists() else {}
