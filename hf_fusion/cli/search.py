"""Search for the numbers of a recipe with which the merged model is best, and save the best recipe."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fusion.cli.checks import check_columns, check_known_columns, check_models
from hf_fusion.cli.errors import UsageError
from hf_fusion.cli.output import Out
from hf_fusion.cli.parser import COUNT, SEED, add_consent, at_least
from hf_fusion.cli.progress import loading_libraries
from hf_fusion.extras import need

if TYPE_CHECKING:
    from datasets import Dataset

EXAMPLES = (
    ("hf-fusion search recipe.yaml --data rows.parquet", "40 trials; the best recipe is recipe-search/best.yaml"),
    (
        "hf-fusion search recipe.yaml --data me/rows --split validation --budget 100 --output found",
        "100 trials on a split of a data set on the Hub",
    ),
    ("hf-fusion search recipe.yaml --harness tasks/mine.yaml", "on a validation split of lm-evaluation-harness"),
)

ROWS = ("split", "label_column", "task_column")
HARNESS = ("fewshot", "limit")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the recipe, the rows, and how long to search."""
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a recipe, ours or mergekit's, with ranges: scaling: {search: [0.1, 1.0]}"
    )
    parser.add_argument(
        "--data",
        help="labelled rows: a Parquet, CSV or JSON file, a folder, or a data set's id on the Hub",
    )
    parser.add_argument("--split", help="split of a folder or a data set on the Hub (default: train); not test")
    parser.add_argument("--label-column", metavar="NAME", help="column with the label (default: label)")
    parser.add_argument("--task-column", metavar="NAME", help="column with the task (default: task)")
    group = parser.add_argument_group("lm-evaluation-harness, in place of --data")
    group.add_argument(
        "--harness", action="append", metavar="TASK[,TASK]",
        help="tasks with a validation or training split; default: those of a genome of mergekit-evolve",
    )  # fmt: skip
    group.add_argument(
        "--fewshot", type=at_least(0), metavar="N", help="examples before each document (default: as each task says)"
    )
    group.add_argument("--limit", type=COUNT, metavar="N", help="N documents of each task, at random")
    parser.add_argument("--budget", type=COUNT, default=40, metavar="N", help="number of trials (default: 40)")
    parser.add_argument(
        "--held-out", type=at_least(0, float, above=True, most=0.9), default=0.3, metavar="SHARE",
        help="share of the rows that the search never sees, on which the gain is measured (default: 0.3)",
    )  # fmt: skip
    parser.add_argument("--seed", type=SEED, default=0, metavar="N", help="of the search (default: 0)")
    parser.add_argument(
        "-o", "--output", metavar="DIR", help="folder for the trials and the best recipe (default: NAME-search)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="begin a new search where DIR has the trials of another"
    )
    add_consent(parser, "models that are folders or pinned to a commit")
    parser.add_argument("--batch-size", type=COUNT, metavar="N", help="rows per step (default: 32; with --harness 1)")


def run(args: argparse.Namespace, out: Out) -> None:
    """Search, and show the gain on held-out rows."""
    from hf_fusion.recipe import recipe_file
    from hf_fusion.search.space import load_space

    if args.data and args.harness:
        raise UsageError("a search is on labelled rows or on tasks of the harness", "omit --data or --harness")
    for name in HARNESS if args.data else ROWS:
        if getattr(args, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} goes with {'--harness' if args.data else '--data'}", f"omit {option}")
    if args.split == "test":
        raise UsageError("test rows are not searched on: they are to tell how good the result is", "--split train")
    if args.budget < 2:
        raise UsageError("a search has at least two trials, of which the first is its start", "--budget 40")
    space = load_space(args.recipe)
    if not (args.data or args.harness or space.tasks):
        raise UsageError("a search needs labelled rows or tasks of the harness", "--data ROWS or --harness TASK")
    check_models(space.recipe(space.start).models)
    file = recipe_file(args.recipe)
    folder = args.output or f"{file.resolve().parent.name if Path(args.recipe).is_dir() else file.stem}-search"
    suite = _suite(args) if args.data else None
    if suite is None:
        need("lm-eval", "hf-fusion search --harness")
    with loading_libraries():
        from hf_fusion.search.run import search_recipe

    report = search_recipe(
        args.recipe,
        suite,
        folder,
        harness=[word for words in args.harness or () for word in words.split(",") if word] or None,
        budget=args.budget,
        held_out=args.held_out,
        seed=args.seed,
        fewshot=args.fewshot,
        limit=args.limit,
        batch_size=args.batch_size,
        trust_remote_code=args.trust_remote_code,
        overwrite=args.overwrite,
    )
    title = f"% on {report.held_out:,} held-out rows, after a search on {report.searched:,} others; 95 % intervals"
    out.table(report.table(), title=title, human_only=True)
    failed = sum(bool(trial.failed) for trial in report.trials)
    if failed:
        out.warning(
            f"{failed} of {len(report.trials)} trials could not be merged: see {report.folder / 'trials.jsonl'}"
        )
    shown = {
        "folder": str(report.folder),
        "trials": len(report.trials),
        "searched_rows": report.searched,
        "held_out_rows": report.held_out,
    }
    facts = {"best": asdict(report.best), "held_out": [asdict(gain) for gain in report.gains]}
    out.result("Searched", **shown, **(facts if out.mode == "json" else report.best.parameters))
    out.hint(f"hf-fusion fuse {report.folder / 'best.yaml'} --output merged")


def _suite(args: argparse.Namespace) -> dict[str, Dataset]:
    """The labelled rows by task."""
    from hf_fusion.data import load_rows, split_tasks

    split, named = args.split or "train", (args.label_column, args.task_column)
    check_columns(args.data, split, (), named)
    rows = load_rows(args.data, split)
    check_known_columns(rows.column_names, args.data, (), named)
    if args.label_column and args.label_column != "label":
        rows = rows.remove_columns([name for name in ("label",) if name in rows.column_names])
        rows = rows.rename_column(args.label_column, "label")
    return split_tasks(rows, (), args.task_column or "task")[0]


__all__ = ["EXAMPLES", "add_arguments", "run"]
