"""Search for the numbers of a recipe with which the merged model is best, and save the best recipe."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from hf_fusion.cli.checks import check_columns, check_known_columns, check_models
from hf_fusion.cli.errors import UsageError
from hf_fusion.cli.output import Out
from hf_fusion.cli.parser import COUNT, SEED, add_consent, at_least
from hf_fusion.cli.progress import loading_libraries

EXAMPLES = (
    ("hf-fusion search recipe.yaml --data rows.parquet", "40 trials; the best recipe is recipe-search/best.yaml"),
    (
        "hf-fusion search recipe.yaml --data me/rows --split validation --budget 100 --output found",
        "100 trials on a split of a data set on the Hub",
    ),
    ("hf-fusion fuse recipe-search/best.yaml --output merged", "merge what was found"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the recipe, the rows, and how long to search."""
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a recipe, ours or mergekit's, with ranges: scaling: {search: [0.1, 1.0]}"
    )
    parser.add_argument(
        "--data",
        required=True,
        help="labelled rows: a Parquet, CSV or JSON file, a folder, or a data set's id on the Hub",
    )
    parser.add_argument(
        "--split", default="train", help="split of a folder or a data set on the Hub (default: train); not test"
    )
    parser.add_argument("--label-column", metavar="NAME", help="column with the label (default: label)")
    parser.add_argument("--task-column", metavar="NAME", help="column with the task (default: task)")
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
    parser.add_argument("--batch-size", type=COUNT, default=32, metavar="N", help="rows per step (default: 32)")


def run(args: argparse.Namespace, out: Out) -> None:
    """Search, and show the gain on held-out rows."""
    if args.split == "test":
        raise UsageError("test rows are not searched on: they are to tell how good the result is", "--split train")
    if args.budget < 2:
        raise UsageError("a search has at least two trials, of which the first is its start", "--budget 40")

    from hf_fusion.recipe import recipe_file
    from hf_fusion.search.space import load_space

    space = load_space(args.recipe)
    first = space.recipe(space.start)
    check_models(first.models)
    named = (args.label_column, args.task_column)
    check_columns(args.data, args.split, (), named)
    file = recipe_file(args.recipe)
    folder = args.output or f"{file.resolve().parent.name if Path(args.recipe).is_dir() else file.stem}-search"

    from hf_fusion.data import load_rows, split_tasks

    rows = load_rows(args.data, args.split)
    check_known_columns(rows.column_names, args.data, (), named)
    if args.label_column and args.label_column != "label":
        rows = rows.remove_columns([name for name in ("label",) if name in rows.column_names])
        rows = rows.rename_column(args.label_column, "label")
    suite, _ = split_tasks(rows, (), args.task_column or "task")
    with loading_libraries():
        from hf_fusion.search.run import search_recipe

    report = search_recipe(
        args.recipe,
        suite,
        folder,
        budget=args.budget,
        held_out=args.held_out,
        seed=args.seed,
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


__all__ = ["EXAMPLES", "add_arguments", "run"]
