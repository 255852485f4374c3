"""Find experts on the Hub: by tag, author, base model, task, collection or id."""

from __future__ import annotations

import argparse

from hf_fusion.cli.errors import checking_arguments
from hf_fusion.cli.output import Out
from hf_fusion.cli.parser import COUNT

EXAMPLES = (
    ("hf-fusion discover --author me", "all repos of an author with the tag hf-fusion-expert"),
    (
        "hf-fusion discover --task image-classification --check --format quiet",
        "pinned ids of compatible experts, for hf-fusion fuse --experts",
    ),
    (
        "hf-fusion discover --tag phatgoose-gates --base-model me/base --check --gates",
        "adapters of one base that PHATGOOSE can route among, and why others were rejected",
    ),
    ("hf-fusion discover --base-model me/base --check --merging", "experts that WEMoE can merge with their base"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the filters and the compatibility check."""
    parser.add_argument(
        "--tag", action="append", metavar="TAG", help="repos with this tag; may be repeated (default: hf-fusion-expert)"
    )
    parser.add_argument("--author", help="repos of this user or organisation")
    parser.add_argument("--base-model", metavar="ID", help="experts fine-tuned from this model")
    parser.add_argument("--task", help="pipeline tag, for example text-classification")
    parser.add_argument("--collection", metavar="SLUG", help="models in this collection")
    parser.add_argument("--id", action="append", metavar="ID", help="the repo with this id; may be repeated")
    parser.add_argument("--limit", type=COUNT, metavar="N", help="list at most N repos")
    parser.add_argument(
        "--check", action="store_true", help="check which experts are compatible, and why others are not"
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="LABEL",
        help="with --check: only experts that predict no other labels than these",
    )
    parser.add_argument("--gates", action="store_true", help="with --check: only adapters with PHATGOOSE gates")
    parser.add_argument(
        "--merging",
        action="store_true",
        help="with --check: only experts that can be merged with --base-model, as for WEMoE",
    )


def run(args: argparse.Namespace, out: Out) -> None:
    """List the experts; with --check the accepted ones first, then the rejected ones with reasons."""
    from hf_fusion.families import method_needing
    from hf_fusion.hub.compat import check_compatibility
    from hf_fusion.hub.discover import EXPERT_TAG, discover
    from hf_fusion.hub.groups import drop_broken, group_rows
    from hf_fusion.hub.task_heads import head_of_task

    if args.task:
        with checking_arguments():
            head_of_task(args.task)
    experts = discover(
        tags=args.tag or EXPERT_TAG,
        author=args.author,
        base_model=args.base_model,
        task=args.task,
        collection=args.collection,
        ids=args.id,
        limit=args.limit,
    )
    if not args.check:
        out.table(experts.table() if out.mode != "quiet" else [{"id": info.pinned} for info in experts])
        out.hint("check which of them are compatible: hf-fusion discover … --check")
        return
    verdict = check_compatibility(
        experts,
        task=args.task,
        base_model=args.base_model,
        labels=args.labels,
        need_gates=args.gates,
        merging=args.merging,
    )
    method = method_needing(gates=args.gates, mergeable=args.merging)
    groups = drop_broken(verdict, method, args.base_model)
    group_of = {info.id: str(index) for index, group in enumerate(groups, 1) for info in group.experts}
    rows = [{"group": group_of.get(row["id"], ""), **row} for row in verdict.table()]
    proposed = groups[0] if groups else None
    chosen = proposed.experts if proposed and proposed.command else verdict.accepted
    out.table(
        [{"id": info.pinned} for info in chosen] if out.mode == "quiet" else rows,
        title=f"{len(verdict.accepted)} of {len(experts)} experts are compatible",
        key="id",
    )
    if len(verdict.accepted) > 1:
        out.table(group_rows(groups), title="Groups by labels and base", human_only=True)
    if proposed and proposed.command:
        out.hint(proposed.command)
