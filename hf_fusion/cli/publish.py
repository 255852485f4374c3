"""Show the plan, ask, then push a fused model and its card to the Hub. New repos are private by default."""

from __future__ import annotations

import argparse
import sys

from hf_fusion.cli.checks import check_repo, read_model_config
from hf_fusion.cli.output import Out
from hf_fusion.cli.progress import loading_libraries
from hf_fusion.errors import FusionError
from hf_fusion.progress import phase

EXAMPLES = (
    ("hf-fusion publish fused me/fused --dry-run", "the plan and the card; nothing is uploaded"),
    ("hf-fusion publish fused me/fused --public --yes", "push to a public repo, without asking"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, the repo and the confirmation."""
    parser.add_argument("folder", metavar="DIR", help="a fused model's folder")
    parser.add_argument("repo", metavar="REPO", help="owner/name; created if missing")
    parser.add_argument("--public", action="store_true", help="make a new repo public (default: private)")
    parser.add_argument(
        "--license", metavar="ID", help="licence of the model, if those of the experts cannot be combined"
    )
    parser.add_argument(
        "--push-experts",
        action="store_true",
        help="first push experts and bases that are local folders (default: name them by the SHA-256 of their content)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is already in REPO")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the card, and stop")
    parser.add_argument("--yes", action="store_true", help="do not ask for confirmation")


def run(args: argparse.Namespace, out: Out) -> None:
    """Plan, and push after the confirmation."""
    read_model_config(args.folder)
    check_repo(args.repo)

    with loading_libraries():
        from hf_fusion.publishing.plan import plan
        from hf_fusion.publishing.push import push

    with phase("Planning the push"):
        planned = plan(
            args.folder,
            args.repo,
            private=not args.public,
            license=args.license,
            push_experts=args.push_experts,
            overwrite=args.overwrite,
        )
    chosen = {"--public": args.public, "--push-experts": args.push_experts, "--overwrite": args.overwrite}
    options = [f"--license {args.license}"] if args.license else []
    options += [option for option, is_chosen in chosen.items() if is_chosen]
    command = " ".join(["hf-fusion publish", args.folder, args.repo, *options, "--yes"])
    if args.dry_run:
        out.text(f"{planned.card}\n")
        out.dict(planned.summary() if out.mode != "json" else {**planned.summary(), "card": planned.card})
        out.hint(command)
        return
    if not args.yes:
        _confirm(planned.summary(), command, out)
    published = push(planned)
    out.result("Published", repo=published.repo_id, revision=published.sha, url=published.url)
    facts = planned.facts
    code = ", trust_remote_code=True" if facts.options.get("code", True) else ""  # a static merge may have none
    out.hint(f"{facts.auto_class}.from_pretrained({published.repo_id!r}, revision={published.sha!r}{code})")


def _confirm(summary: dict[str, object], command: str, out: Out) -> None:
    if out.mode != "human" or not sys.stdin.isatty():
        raise FusionError(f"the push to {summary['repo']} needs confirmation, but stdin is not a terminal", command)
    out.dict(summary)
    if input("Push? [y/N] ").strip().lower() not in ("y", "yes"):
        raise FusionError("not pushed", command)
