"""`search_recipe`: the best numbers of a recipe, and how much they gain on rows that the search did not see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fusion.errors import FusionError
from hf_fusion.extras import need
from hf_fusion.io.folders import refuse_to_replace
from hf_fusion.io.saving import in_folder
from hf_fusion.merging.engine.output import output_folder
from hf_fusion.merging.engine.processes import Processes
from hf_fusion.merging.held_merge import HeldMerge
from hf_fusion.progress import phase
from hf_fusion.search.halving import row_counts, search_dimensions
from hf_fusion.search.objective import Objective, RowsObjective, Scores, divide_rows, mean_score
from hf_fusion.search.plot import plot_trials
from hf_fusion.search.report import SearchReport, gains_of
from hf_fusion.search.space import SearchSpace, load_space
from hf_fusion.search.trials import TRIALS_FILE, TrialsFile, best_of

if TYPE_CHECKING:
    from datasets import Dataset
    from huggingface_hub import HfApi

EXTRA = "search"
PICTURE = "trials.png"
BATCH_SIZE = 32
BUDGET, HELD_OUT = 40, 0.3
"""Defaults: the number of trials, and the share of the rows that is held out."""


def search_recipe(
    recipe: str | Path,
    data: Mapping[str, Dataset] | None,
    folder: str | Path,
    *,
    harness: str | Sequence[str] | None = None,
    budget: int = BUDGET,
    held_out: float = HELD_OUT,
    seed: int = 0,
    metrics: Mapping[str, str] | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    max_length: int = 512,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    api: HfApi | None = None,
) -> SearchReport:
    """Searches for the numbers of a recipe with which the merged model is best.

    Any number of a recipe may be ``{search: [low, high]}`` (`hf_fusion.search.space`). CMA-ES proposes numbers; most of
    the proposals are measured on a part of the rows alone, the best on all (`hf_fusion.search.halving`). The models are
    read once, and held in memory with the merged model.

    The rows are divided at random: the search sees one part, and on the other the best recipe is compared with the
    first trial. Rows that are to tell the quality of the result, test rows, do not belong in `data`.

    A search that was interrupted continues with the trials that `folder` has, also with a larger budget.

    Args:
        recipe: a file of a static merge with ranges, ours or one of mergekit; or a genome of mergekit-evolve.
        data: task → labelled rows; columns as for `hf_fusion.evaluate` of a static merge. None for tasks of
            lm-evaluation-harness.
        folder: for the trials and the result.
        harness: tasks of lm-evaluation-harness in place of rows, see `hf_fusion.evaluation.harness.measure_harness`;
            default: those of the genome. Documents of their validation splits are measured, or else of their training
            splits, but never of their test splits.
        budget: number of trials. The first is the start: of each range its ``start``, else the method's default, else
            its middle.
        held_out: share of the rows that is held out.
        seed: of the division of the rows, and of CMA-ES.
        metrics: of language models: task → "exact" (default), "tokens" or "ranked"; of tasks of the harness: task →
            metric, by default the first that the task names.
        fewshot: examples before each document of the harness; default: as each task says.
        limit: documents of each task of the harness; default: all.
        batch_size: rows per step; default: 32, or the harness's 1.
        max_length: the longest sequence, in tokens.
        trust_remote_code: whether custom code of the models may run.
        overwrite: whether to begin a new search where `folder` has the trials of another.
        api: the Hub's client.

    Returns:
        The best recipe, and its gain on the held-out rows.

    Raises:
        FusionError: cma or matplotlib is not installed, the recipe has no ranges or cannot be merged, rows are missing,
            or the folder has the trials of another search.
    """
    need(EXTRA, "the search over recipes")
    space = load_space(recipe)
    if budget < 2:
        raise FusionError(f"a search of {budget} trials is none: the first is its start", "--budget 40")
    if not 0 < held_out < 1:
        raise FusionError(f"the share of rows to hold out is {held_out:g}, expected a number between 0 and 1")
    if Processes().count > 1:
        raise FusionError("a search runs in a single process", "run it without accelerate launch")
    evolved = space.genome
    words = [harness] if isinstance(harness, str) else list(harness or ())
    if data is None and not words:
        words = [task.name for task in space.tasks]
    if (data is None) == (not words):
        raise FusionError("a search is on labelled rows or on tasks of the harness, one of the two", "--data ROWS")
    folder = output_folder(folder)
    refuse_to_replace(folder, overwrite=False)
    division = None if data is None else divide_rows(data, held_out, seed)
    held = HeldMerge(space.recipe(space.start), trust_remote_code=trust_remote_code, api=api)
    objective: Objective
    if division is not None:
        objective = RowsObjective(
            held.model, division, metrics=metrics, batch_size=batch_size or BATCH_SIZE, max_length=max_length
        )
    else:
        from hf_fusion.search.harness import HarnessObjective

        named = {task.name: task.metric for task in space.tasks} | dict(metrics or {})
        objective = HarnessObjective(
            held.model,
            words,
            held_out=held_out,
            seed=seed,
            fewshot=evolved.num_fewshot if fewshot is None and evolved else fewshot,
            limit=limit or (evolved.limit if evolved else None),
            metrics=named,
            weights={task.name: task.weight for task in space.tasks},
            chat_template=evolved is not None and evolved.apply_chat_template,
            multiturn=evolved is not None and evolved.fewshot_as_multiturn,
            batch_size=batch_size or 1,
        )
    with in_folder(folder):
        about = {
            "recipe": held.recipe.to_dict(),
            "ranges": {d.name: [d.low, d.high] for d in space.dimensions},
            "tasks": [[task.name, task.metric, task.n] for task in objective.tasks],
            "rows": objective.searched,
            **objective.about,
            "held_out": held_out,
            "seed": seed,
        }
        kept = TrialsFile(folder / TRIALS_FILE, about, overwrite)
        return _search(space, held, objective, kept, budget, seed)


def _search(
    space: SearchSpace, held: HeldMerge, objective: Objective, kept: TrialsFile, budget: int, seed: int
) -> SearchReport:
    rows, folder = row_counts(objective.searched), kept.path.parent

    def measure(values: Sequence[float]) -> Iterator[float]:
        held.show(space.recipe(values))
        parts: list[Scores] = []
        for first, last in zip([0, *rows], rows, strict=False):
            parts.append(objective.scores(first, last))
            yield mean_score(parts, objective.weights)

    with phase("Searching", budget) as searching:
        searching.reach(len(kept.trials))
        search_dimensions(
            space.dimensions, measure, rows, kept, budget=budget, seed=seed, progress=lambda trial: searching.advance()
        )
    start, best = kept.trials[0], best_of(kept.trials)
    found = []
    with phase("Measuring on held-out rows"):
        for trial in (start, best):
            held.show(space.recipe([trial.parameters[dimension.name] for dimension in space.dimensions]))
            found.append(objective.held_out_scores())
    trials, gains = list(kept.trials), gains_of(objective.tasks, *found)
    report = SearchReport(folder, held.recipe, trials, best, objective.searched, objective.held_out, gains)
    report.save()
    plot_trials(trials, folder / PICTURE)
    return report


__all__ = ["BUDGET", "EXTRA", "HELD_OUT", "PICTURE", "search_recipe"]
