"""Tasks of lm-evaluation-harness by name, or from YAML files of one's own."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError, first_line, path_suggestion, suggestion
from hf_fusion.extras import refuse_missing
from hf_fusion.progress import phase

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

logger = logging.getLogger(__name__)

YAML = (".yaml", ".yml")
LISTING = "lm_eval ls tasks"
FEWSHOT_SEED = 1234  # the harness's own, for the choice of examples


def path_of_task(word: str) -> Path | None:
    """The file or folder that a word means; None for the name of a task.

    Raises:
        FusionError: it is written as a path, but does not exist or is not a YAML file.
    """
    path = Path(word)
    if path.is_dir() and any(path.rglob("*.yaml")):
        return path
    if path.suffix not in YAML and "/" not in word and "\\" not in word:
        return None
    if path.is_file() and path.suffix in YAML:
        return path
    if path.exists():
        raise FusionError(f"{word} is neither a task's YAML file nor a folder that contains one", "--harness TASK.yaml")
    raise FusionError(
        f"the task file {word} does not exist", path_suggestion(path, "check the path: --harness TASK.yaml")
    )


def load_tasks(words: Sequence[str], fewshot: int | None = None) -> TaskDict:
    """Loads tasks with their data.

    Args:
        words: names of tasks, groups and tags, with wildcards; YAML files; and folders, all of whose tasks are meant.
        fewshot: examples before each document; default: as each task says.

    Returns:
        The tasks and groups, as the harness's `evaluate` takes them.

    Raises:
        FusionError: a task is unknown or wrong, its data cannot be reached, or it runs code that a model writes.
    """
    paths = {word: path for word in words if (path := path_of_task(word))}
    with phase("Reading the tasks"):
        manager = _manager([*paths.values()], defaults=len(paths) < len(words))
        specs = [spec for word in words for spec in _specs(word, paths.get(word), manager)]
        loaded: Any = {"tasks": {}, "groups": {}, "group_map": {}}
        for spec in dict.fromkeys(specs):
            for part, rows in _load(spec, manager).items():
                loaded[part] |= rows
    for name, task in loaded["tasks"].items():
        _refuse_others(name, task)
        _set_fewshot(name, task, fewshot)
    tasks: TaskDict = loaded
    return tasks


def _manager(paths: Sequence[Path], defaults: bool) -> TaskManager:
    """The harness's index of tasks; its own 14,000 files are read only where a task is named."""
    from lm_eval.tasks import TaskManager

    folders = [path if path.is_dir() else path.resolve().parent for path in paths]
    return TaskManager(include_path=[*dict.fromkeys(map(str, folders))] or None, include_defaults=defaults)


def _specs(word: str, path: Path | None, manager: TaskManager) -> Iterator[str]:
    """What the harness loads for a word: names, or the path of a file."""
    if path is None:
        if not (names := manager.match_tasks([word])):
            raise FusionError(
                f"lm-evaluation-harness has no task {word!r}", suggestion(word, manager.all_tasks, LISTING)
            )
        yield from names
    elif path.is_file():
        yield str(path)
    else:
        yield from _in_folder(path)


def _in_folder(folder: Path) -> list[str]:
    """The groups of a folder, and the tasks that are in none of them."""
    index = _manager([folder], defaults=False).task_index
    groups = [entry for entry in index.values() if entry.kind.name == "GROUP"]
    members = [member for group in groups for member in (group.cfg or {}).get("task") or ()]
    inside = {
        member if isinstance(member, str) else member.get("task", member.get("group"))
        for member in members
        if isinstance(member, (str, dict))
    }
    names = [name for name, entry in index.items() if entry.kind.name != "TAG" and name not in inside]
    if not names:
        raise FusionError(
            f"no YAML file in {folder} has a task", f"lm_eval validate --tasks NAME --include_path {folder}"
        )
    return names


def _load(spec: str, manager: TaskManager) -> TaskDict:
    """The task, group or tag of a name or file, with its data."""
    from lm_eval.tasks import TaskManager

    try:
        try:
            return manager.load([spec])
        except KeyError:  # a group of one's own may name tasks that come with the harness
            if manager.include_path is None:
                raise
            return TaskManager(include_path=manager.include_path).load([spec])
    except FusionError:
        raise
    except Exception as error:
        refuse_missing(error, f"the task {spec}")
        if _is_unreachable(error):
            raise FusionError(
                f"the data of the task {spec} cannot be reached ({first_line(error)})",
                "check the connection, HF_ENDPOINT and the login (hf auth login), or name a task with local data: "
                "--harness TASK.yaml",
            ) from error
        raise FusionError(
            f"the task {spec} cannot be loaded ({type(error).__name__}: {first_line(error)})",
            f"lm_eval validate --tasks {spec}",
        ) from error


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether a data set, or a file of it, could not be read from the Hub or from disk."""
    while error is not None:
        if isinstance(error, OSError) or "httpx" in type(error).__module__ or "Offline" in type(error).__name__:
            return True
        error = error.__cause__ or error.__context__
    return False


def _refuse_others(name: str, task: Any) -> None:
    """Raises for tasks that are not of texts alone, or that run what a model writes."""
    if getattr(task, "UNSAFE_CODE", False):
        raise FusionError(
            f"the task {name} runs code that the model writes, which hf-fusion does not do",
            f"in a sandbox: lm_eval run --model_args pretrained=MODEL --tasks {name} --confirm_run_unsafe_code",
        )
    if getattr(task, "MULTIMODAL", False):
        raise FusionError(f"the task {name} has images, which language models do not read", LISTING)


def _set_fewshot(name: str, task: Any, fewshot: int | None) -> None:
    """Examples before each document, as the harness sets them: a task that says 0 keeps it."""
    default = task.get_config("num_fewshot")
    if fewshot is None:
        task.set_config(key="num_fewshot", value=default or 0)
    elif default == 0 and fewshot:
        logger.warning("%s takes no examples: its file says num_fewshot: 0", name)
    else:
        task.set_config(key="num_fewshot", value=fewshot)


__all__ = ["FEWSHOT_SEED", "load_tasks", "path_of_task"]
