"""Runs tasks of lm-evaluation-harness on a fused model, and on its experts and their base beside it."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError, first_line
from hf_fusion.evaluation.harness_results import HarnessRun, HarnessScore
from hf_fusion.evaluation.loop import check_names
from hf_fusion.evaluation.machine import machine
from hf_fusion.evaluation.merging import MERGED, WEMOE, load_whole
from hf_fusion.evaluation.results import FUSED, Results
from hf_fusion.evaluation.routing import PHATGOOSE
from hf_fusion.extras import need
from hf_fusion.families import FAMILIES
from hf_fusion.fusion import load_fused
from hf_fusion.hub.provenance import has_recipe, read_recipe
from hf_fusion.hub.task_heads import WRITERS, head_of_architecture
from hf_fusion.io.json_files import read_json
from hf_fusion.models.fused_config import GENERATING
from hf_fusion.recipe import RECIPE_ATTRIBUTE
from hf_fusion.types import Expert

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from transformers import PreTrainedModel

    from hf_fusion.hub.load import ExpertLike
    from hf_fusion.recipe import Recipe

logger = logging.getLogger(__name__)

EXTRA = "lm-eval"
TITLES = {"foe": "FoE", "phatgoose": PHATGOOSE, "wemoe": WEMOE}
LOCAL_DATA = ("json", "csv", "parquet", "arrow", "text", "pandas", "xml")  # names by which `datasets` reads files
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234}  # the harness's own


def measure_harness(
    model: ExpertLike,
    tasks: str | Sequence[str],
    *,
    fewshot: int | None = None,
    limit: int | None = None,
    compare: bool = False,
    batch_size: int = 1,
    trust_remote_code: bool = False,
    command: str = "",
    api: HfApi | None = None,
) -> Results:
    """Runs tasks of lm-evaluation-harness (Gao et al., https://zenodo.org/records/12608602).

    A dense model scores what ``lm_eval`` gives for its folder, to the last digit if the batch size is the same. Models
    are compared one after the other: with the fused model no more than one other, with an adapter's base two, are in
    memory at a time.

    Args:
        model: a fused language model or its folder; any language model as `load_experts` takes it.
        tasks: names of tasks, groups and tags, with wildcards; YAML files; or folders, all of whose tasks are run. A
            file may name Python functions beside it, which run.
        fewshot: examples before each document; default: as each task says.
        limit: documents of each task, the first ones; default: all.
        compare: also run the experts that the model's recipe names, and their base.
        batch_size: requests per step. The harness's default is 1; rounding, and so the last digits of a score, may
            depend on it.
        trust_remote_code: see `load_experts`; also of the model's own folder.
        command: stored in the results.
        api: the Hub's client.

    Returns:
        Results whose attribute ``harness`` has this run alone.

    Raises:
        FusionError: the harness is not installed, a task is unknown or without data, the model is not a language model,
            or an expert cannot be found.
    """
    need(EXTRA, "evaluation by lm-evaluation-harness")
    words = [tasks] if isinstance(tasks, str) else list(tasks)
    if not words:
        raise FusionError("no task was named", "harness=['arc_easy'], or a YAML file")
    fused, recipe = _opened(model, trust_remote_code, api)
    check_writes(fused.model, fused.name)
    queue = _beside(recipe, fused.name) if compare else []
    from hf_fusion.evaluation.harness_tasks import load_tasks

    with quiet_harness():
        loaded = load_tasks(words, fewshot)
        name = TITLES.get(getattr(fused.model.config, "model_type", ""), MERGED)
        scores = _run(fused, name, FUSED, loaded, limit, batch_size)
        names = [name]
        for kind, given in queue:  # which grows where an adapter records its base
            base = recipe.base if recipe and kind == "expert" else None
            expert = load_whole(given, {"trust_remote_code": trust_remote_code, "api": api}, base)
            if kind == "expert" and expert.adapter and expert.adapter.base and "base" not in dict(queue):
                queue.append(("base", str(expert.adapter.base_ref)))
            name = "base" if kind == "base" else str(given) if expert.name in names else expert.name
            check_names([*names, name])
            names.append(name)
            check_writes(expert.model, name)
            _placed(expert, fused.model.device)
            scores += _run(expert, name, kind, loaded, limit, batch_size)
            del expert  # before the next is loaded
    settings = {"limit": limit, "fewshot": fewshot, "batch_size": batch_size, "lm_eval": version("lm_eval")}
    return Results([], [], harness=[HarnessRun(scores, settings, command, machine())])


def _opened(given: ExpertLike, agreed: bool, api: HfApi | None) -> tuple[Expert, Recipe | None]:
    """A model with its tokenizer, and its recipe if it was fused."""
    if isinstance(given, (str, Path)) and Path(given).is_dir():
        recipe = read_recipe(given) if has_recipe(given) else None
        config = Path(given) / "config.json"
        if config.is_file() and read_json(config, str(given)).get("model_type") in FAMILIES:
            model, _ = load_fused(given, trust_remote_code=agreed)
            return _placed(_as_expert(model)), recipe
        return _placed(load_whole(str(given), {"trust_remote_code": agreed, "api": api})), recipe
    recipe = getattr(given, RECIPE_ATTRIBUTE, None)
    if getattr(getattr(given, "config", None), "model_type", None) in FAMILIES or hasattr(given, "processor"):
        return (given if isinstance(given, Expert) else _as_expert(given)), recipe
    return _placed(load_whole(given, {"trust_remote_code": agreed, "api": api})), recipe


def _placed(expert: Expert, device: object = None) -> Expert:
    """A model that was loaded here, on a device; by default on the GPU, where there is one, as the harness does."""
    import torch

    device = device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    model: Any = expert.model
    model.to(device)
    return expert


def _as_expert(model: Any) -> Expert:
    return Expert(model.name_or_path or type(model).__name__, model, processor=model.processor)


def check_writes(model: PreTrainedModel, name: str) -> None:
    """Raises for a model that is not a language model."""
    head = getattr(model.config, "head", None)
    if head is not None:
        writes = head in GENERATING
    else:
        known = head_of_architecture(type(model).__name__)
        writes = known is not None and known.auto in WRITERS
    if not writes:
        raise FusionError(
            f"{name} is a {type(model).__name__}, but lm-evaluation-harness runs language models",
            "measure it on labelled rows: hf-fusion eval MODEL_DIR --data DATA",
        )


def _beside(recipe: Recipe | None, name: str) -> list[tuple[str, str]]:
    """What a fused model is compared with: kind and name of each."""
    if recipe is None:
        raise FusionError(f"{name} has no recipe that names experts to compare it with", "omit --compare")
    if recipe.elsewhere:
        raise FusionError(
            f"the recipe of {name} names folders of another machine, so its experts cannot be compared",
            "omit --compare, or name their paths in fusion.yaml",
        )
    experts, base = recipe.outer_experts, recipe.outer_base
    return [("expert", expert) for expert in experts] + ([("base", base)] if base else [])


def _run(expert: Expert, name: str, kind: str, loaded: Any, limit: int | None, batch_size: int) -> list[HarnessScore]:
    """The scores of one model on all tasks."""
    from lm_eval.evaluator import evaluate

    from hf_fusion.evaluation.harness_models import harness_model
    from hf_fusion.evaluation.harness_tasks import FEWSHOT_SEED

    lm = harness_model(expert.model, expert.processor, name, batch_size)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)  # the same examples for every model
    try:
        with seeded_as_harness():
            found: Any = evaluate(lm, loaded, limit=limit, log_samples=False)
    except (AssertionError, ValueError, NotImplementedError) as error:  # how the harness refuses
        raise FusionError(
            f"lm-evaluation-harness cannot run {name}: {first_line(error)}",
            "choose tasks that fit the model, or change the task's file: lm_eval ls tasks lists them",
        ) from error
    return list(_scores(found, name, kind, loaded["tasks"]))


def _scores(found: Mapping[str, Any], name: str, kind: str, tasks: Mapping[str, Any]) -> Iterator[HarnessScore]:
    """The harness's results as rows."""
    parts = {task: group for group in found.get("groups", {}) for task in found["group_subtasks"].get(group, ())}
    for task, row in found["results"].items():
        for key, value in row.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            stderr = row.get(f"{metric}_stderr,{filtered}")
            yield HarnessScore(
                predictor=name,
                kind=kind,
                task=task,
                metric=metric if filtered == "none" else key,
                score=float(value),
                stderr=float(stderr) if isinstance(stderr, Real) else None,
                n=int(row.get("sample_len") or 0),
                shots=int(found["n-shot"].get(task) or 0),
                version="" if (given := found["versions"].get(task)) is None else str(given),
                higher_is_better=(found["higher_is_better"].get(task) or {}).get(metric),
                dataset=_dataset_of(tasks.get(task)),
                part_of=parts.get(task),
            )


def _dataset_of(task: Any) -> str:
    """The id of a task's data set on the Hub; "" for local files and groups."""
    name = str((task.get_config("dataset_path") if task is not None else None) or "")
    return "" if name in LOCAL_DATA or Path(name).is_absolute() else name


@contextmanager
def seeded_as_harness() -> Iterator[None]:
    """The harness's seeds, within this context."""
    import numpy
    import torch

    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        random.seed(SEEDS["random"])
        numpy.random.seed(SEEDS["numpy"])
        torch.manual_seed(SEEDS["torch"])
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Within this context the harness and `datasets` report errors alone."""
    import datasets

    harness = logging.getLogger("lm_eval")
    level, bars = harness.level, datasets.are_progress_bars_disabled()
    harness.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        harness.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


__all__ = ["EXTRA", "check_writes", "measure_harness", "quiet_harness", "seeded_as_harness"]
