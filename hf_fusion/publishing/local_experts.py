"""Experts and bases that are local folders: their public names, and pushing them before the fused model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError
from hf_fusion.families import FAMILIES
from hf_fusion.hub.client import explain_hub_errors, same_file
from hf_fusion.hub.formats import ADAPTER_CONFIG
from hf_fusion.hub.provenance import hash_folder, hash_folders, list_local_folders, model_files, strip_local_paths
from hf_fusion.hub.refs_to_files import resolve
from hf_fusion.hub.task_heads import architectures, default_task, head_of_adapter, label_names
from hf_fusion.io.files import own_file, read_file, read_text
from hf_fusion.io.json_files import parse, read_json
from hf_fusion.merging.loaded_merges import CONTENTS_ATTRIBUTE
from hf_fusion.recipe import RECIPE_FILE, Recipe
from hf_fusion.types import ExpertInfo, ModelRef

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from transformers import PreTrainedModel

README = "README.md"
_SMALL_FILES = (".json", ".yaml", ".txt", ".jinja", ".model", ".py", ".md")


def folder_info(name: str | Path, public_name: str = "") -> ExpertInfo:
    """Metadata of the model in a folder, from its files.

    Args:
        name: the folder.
        public_name: ``NAME@sha256:…`` or ``owner/name``; default is the folder's name.
    """
    source = resolve(name)
    ref = ModelRef.parse_repo(public_name) if public_name else ModelRef(source.name)
    card, config = source.card, source.config
    license_id, head = card.get("license"), head_of_adapter(source.adapter) if source.is_adapter else None
    head_task = head.tasks[0] if head else default_task(next(iter(architectures(config)), None))
    base = source.adapter.get("base_model_name_or_path")
    return ExpertInfo(
        id=ref.id,
        sha=ref.revision or "",
        task=card.get("pipeline_tag") or head_task,
        labels=label_names(config),
        license=license_id.lower() if isinstance(license_id, str) else None,
        base_model=base if isinstance(base, str) and base and not Path(base).expanduser().is_dir() else None,
        base_revision=source.adapter.get("revision"),
        is_adapter=source.is_adapter,
    )


def local_base(name: str | Path) -> str | None:
    """The folder of an adapter's base; None for full models, and where the base is not a local folder."""
    base = str(_adapter_config(Path(name)).get("base_model_name_or_path") or "")
    return str(Path(base).expanduser().resolve()) if base and Path(base).expanduser().is_dir() else None


def public_names(recipe: Recipe, folder: Path, model: PreTrainedModel | None = None) -> dict[str, str]:
    """Path of every folder in a recipe → ``NAME@sha256:…``, by its content at the time of the fusion.

    Args:
        recipe: recipe of the fused model, with local paths.
        folder: folder of the fused model.
        model: the fused model, if it is in memory.

    Raises:
        FusionError: a folder's content at that time is unknown, because it was removed or changed since.
    """
    known = dict(getattr(model, CONTENTS_ATTRIBUTE, {}))
    config = read_json(folder / "config.json", str(folder)) if (folder / "config.json").exists() else {}
    if isinstance(recorded := config.get("recipe"), Mapping):
        published = Recipe.from_dict(recorded, f"{folder}/config.json")
        pairs = zip([*recipe.experts], [*published.experts], strict=False)
        known |= {here.model: there.model for here, there in pairs if ModelRef.parse_repo(there.model).is_content}
        if recipe.base and published.base and ModelRef.parse_repo(published.base).is_content:
            known[recipe.base] = published.base
    unknown = [path for path in list_local_folders(recipe) if path not in known]
    made = (folder / RECIPE_FILE).stat().st_mtime_ns if (folder / RECIPE_FILE).exists() else 0
    for path in unknown:
        if not Path(path).is_dir():
            raise FusionError(
                f"{path}, which {folder} was made from, does not exist", "restore it, or fuse again from owner/name@sha"
            )
        changed = max(((Path(path) / name).stat().st_ctime_ns for name in model_files(Path(path))), default=0)
        if changed > made:
            raise FusionError(f"{path} was changed after {folder} was made from it", "fuse again")
    return {path: known[path] for path in list_local_folders(recipe) if path in known} | hash_folders(unknown)


def refuse_changed_folders(names: Mapping[str, str]) -> None:
    """Raises FusionError for folders that were removed or changed since the fusion.

    Args:
        names: path → ``NAME@sha256:…``.
    """
    for path, name in names.items():
        if not Path(path).is_dir():
            raise FusionError(f"{path} does not exist", "restore it, or publish without --push-experts")
        if hash_folder(path) != ModelRef.parse_repo(name).revision:
            raise FusionError(f"{path} was changed after the model was made from it", "fuse again")


def target_repos(names: Mapping[str, str], repo_id: str) -> dict[str, str]:
    """Path → ``owner/name`` to push it to, for each folder and for the local bases of adapters among them.

    Raises:
        FusionError: two folders have the same name, or that of the model; or a folder contains no model.
    """
    owner = repo_id.partition("/")[0]
    paths = [path for name in names for path in (local_base(name), name) if path]  # a base before its adapters
    repos = {path: f"{owner}/{Path(path).name}" for path in dict.fromkeys(paths)}
    taken: dict[str, str] = {repo_id.lower(): "the model itself"}
    for path, repo in repos.items():
        if other := taken.get(repo.lower()):
            raise FusionError(f"{path} and {other} would both be pushed to {repo}", "rename the folder, and fuse again")
        # a recipe from someone else could name any folder of this machine
        if not any(file.endswith((".safetensors", ".bin")) for file in model_files(Path(path))):
            raise FusionError(f"{path} has no weights", "publish without --push-experts")
        taken[repo.lower()] = path
    return repos


def push_folders(repos: Mapping[str, str], private: bool, api: HfApi) -> dict[str, str]:
    """Push folders, each as one commit, unless the repo already contains that model; returns path → ``owner/name@sha``.

    Raises:
        FusionError: a repo contains another model, or the Hub refuses a request.
    """
    pinned: dict[str, str] = {}
    for path, repo in repos.items():
        pinned[path] = str(ModelRef(repo, _push_folder(Path(path), repo, private, pinned, api)))
    return pinned


def _push_folder(folder: Path, repo: str, private: bool, pinned: Mapping[str, str], api: HfApi) -> str:
    """Push the model and the card of a folder; returns the commit."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.hf_api import RepoFile

    with explain_hub_errors(repo), tempfile.TemporaryDirectory(prefix="hf-fusion-") as staging:
        files = {name: folder / name for name in model_files(folder)}
        files |= {name: folder / name for name in (README,) if own_file(folder / name)}
        for name, path in files.items():
            if (text := _without_local_paths(path, pinned)) is not None:
                files[name] = Path(staging, name.replace("/", "--"))
                files[name].write_text(text, encoding="utf-8")
        api.create_repo(repo, private=private, exist_ok=True)
        info = api.model_info(repo)
        tree = {
            entry.path: entry
            for entry in api.list_repo_tree(repo, recursive=True, revision=info.sha)
            if isinstance(entry, RepoFile)
        }
        model = [name for name in files if name != README]  # the card may have been edited on the Hub
        if all(name in tree and same_file(files[name], tree[name]) for name in model):
            return str(info.sha)
        if foreign := [name for name in tree if name.endswith((".safetensors", ".bin"))]:
            raise FusionError(
                f"{repo} already contains {foreign[0]}, and its files differ from those in {folder}",
                "rename the folder, or push it yourself and fuse from owner/name@sha",
            )
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        return api.create_commit(repo, operations, commit_message="Push an expert", parent_commit=info.sha).oid


def _without_local_paths(file: Path, pinned: Mapping[str, str]) -> str | None:
    """The text of a card or JSON file with local paths replaced; None if it has none."""
    if file.name == README:
        text = replaced = read_text(file)
        for path, name in pinned.items():
            replaced = replaced.replace(path, ModelRef.parse_repo(name).id)
        return replaced if replaced != text else None
    if not file.name.endswith(".json") or file.name.endswith((".index.json", "tokenizer.json", "vocab.json")):
        return None
    content = parse(read_file(file), file.name, str(file.parent))
    public = strip_local_paths(content, {path: ModelRef.parse_repo(name).id for path, name in pinned.items()})
    if file.name == ADAPTER_CONFIG and (base := local_base(file.parent)) in pinned:
        ref = ModelRef.parse_repo(pinned[str(base)])
        public["base_model_name_or_path"], public["revision"] = ref.id, ref.revision
    return None if public == content else json.dumps(public, indent=2, ensure_ascii=False) + "\n"


def stage_folder(
    folder: Path, files: Mapping[str, int], recipe: Recipe, names: Mapping[str, str], parent: Path
) -> Path:
    """Make the folder that is pushed: links to the weights, and copies of small files with local paths replaced.

    Args:
        folder: of the fused model.
        files: the files to publish, as paths in the folder.
        recipe: without local paths.
        names: local path → public name.
        parent: directory in which the folder is made.

    Returns:
        The new folder.
    """
    staged = parent / folder.resolve().name
    for name in files:
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(_SMALL_FILES):
            (staged / name).write_bytes(read_file(folder / name, folder))
        else:
            (staged / name).symlink_to((folder / name).resolve())
    for name in files:
        if not name.endswith(".json") or name.endswith((".index.json", "tokenizer.json", "vocab.json")):
            continue
        content = parse(read_file(staged / name), name, str(folder))
        public = strip_local_paths(content, names)
        if name == "config.json" and public.get("model_type") in FAMILIES:
            public = _with_recipe(public, recipe, names)
        if public != content:
            (staged / name).write_text(json.dumps(public, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (staged / RECIPE_FILE).unlink(missing_ok=True)
    recipe.save(staged / RECIPE_FILE)
    if (folder / README).exists():
        (staged / README).write_bytes(read_file(folder / README))
    return staged


def _with_recipe(config: dict[str, Any], recipe: Recipe, names: Mapping[str, str]) -> dict[str, Any]:
    """A family's config with the recipe replaced, and with ids and commits of the experts that were pushed."""
    rows, ids = [], {}
    for row, expert in zip(config["experts"], recipe.experts, strict=True):
        ref = ModelRef.parse_repo(expert.model)
        is_pushed = expert.model in names.values() and not ref.is_content
        ids[row["name"]] = ref.id if is_pushed else row["name"]
        rows.append({**row, "name": ref.id, "revision": ref.revision} if is_pushed else row)
    public = {**config, "experts": rows, "recipe": recipe.to_dict()}
    if config.get("default_task") in ids:
        public["default_task"] = ids[config["default_task"]]
    if recipe.base and recipe.base in names.values() and isinstance(config.get("base"), Mapping):
        base = ModelRef.parse_repo(recipe.base)
        public["base"] = {"id": base.id, "revision": None if base.is_content else base.revision}
    return public


def _adapter_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / ADAPTER_CONFIG, str(folder)) if (folder / ADAPTER_CONFIG).exists() else {}
