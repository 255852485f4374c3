"""Push results to the Hub as a data set, and add the scores to the cards of fused models."""

from __future__ import annotations

import argparse

from hf_fusion.cli.checks import check_results
from hf_fusion.cli.errors import UsageError
from hf_fusion.cli.output import Out
from hf_fusion.progress import phase

EXAMPLES = (
    ("hf-fusion bench publish results me/results --dry-run", "the plan; nothing is uploaded"),
    (
        "hf-fusion bench publish results me/results --models ties:tuned=me/ties",
        "the scores are also added to the card of me/ties",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the results, the data set and the fused models."""
    parser.add_argument(
        "folder", metavar="DIR", help="results: the folder of a run, a folder of .jsonl files, or one .jsonl file"
    )
    parser.add_argument("repo", metavar="REPO", help="owner/name of the data set; created if missing")
    parser.add_argument(
        "--models", nargs="+", default=(), metavar="METHOD=OWNER/NAME",
        help="fused models whose cards get the scores of METHOD (METHOD:tuned: those of the tuned method)",
    )  # fmt: skip
    parser.add_argument("--public", action="store_true", help="make a new data set public (default: private)")
    parser.add_argument("--overwrite", action="store_true", help="remove cells of REPO that DIR does not contain")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and stop")


def run(args: argparse.Namespace, out: Out) -> None:
    """Plan, and push unless it is a dry run."""
    from hf_fusion.bench.cells import read_cells
    from hf_fusion.bench.publish import plan_results, push_results

    models = dict(_pair(word) for word in args.models)
    check_results(args.folder)
    cells = read_cells(args.folder)
    with phase("Planning"):
        planned = plan_results(cells, args.repo, models, private=not args.public, overwrite=args.overwrite)
    if args.dry_run:
        for change in planned.models:
            out.text(f"{change.card}\n")
        out.dict(planned.summary())
        return
    with phase("Pushing"):
        done = push_results(planned)
    out.result("Published", repo=done.repo_id, revision=done.sha, url=done.url, cards=list(done.models))
    out.hint(f"load_dataset({done.repo_id!r}, revision={done.sha!r})")


def _pair(word: str) -> tuple[str, str]:
    method, _, repo = word.partition("=")
    if not method or repo.count("/") != 1:
        raise UsageError(f"--models {word} does not name a method and a model", "--models METHOD=OWNER/NAME")
    return method, repo
