"""Deploy the project's Gradio apps to the Hub as Spaces."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING

from hf_fusion.cli.checks import check_repo
from hf_fusion.cli.output import Out
from hf_fusion.cli.parser import add_consent
from hf_fusion.errors import FusionError

if TYPE_CHECKING:
    _Actions = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLES = (
    ("hf-fusion spaces deploy foe --repo me/my-digits --dry-run", "the plan; nothing is uploaded"),
    (
        "hf-fusion spaces deploy foe --repo me/my-digits --model me/digits --trust-remote-code --yes",
        "a private Space that shows your model, whose code you have read",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the action deploy."""
    actions: _Actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")
    text = "upload an app as a Space, with pinned requirements"
    deploy = actions.add_parser("deploy", help=text, description=f"{text.capitalize()}.", examples=EXAMPLES)
    deploy.add_argument("app", metavar="NAME", help="foe, leaderboard, phatgoose or wemoe")
    deploy.add_argument("--repo", required=True, metavar="ID", help="owner/name of the Space; created if missing")
    deploy.add_argument(
        "--model", metavar="ID", help="owner/name[@revision] of the fused model to show (default: the app's own)"
    )
    add_consent(deploy, "the Space's model, in the Space")
    deploy.add_argument("--public", action="store_true", help="make a new Space public (default: private)")
    deploy.add_argument("--overwrite", action="store_true", help="replace the files of a Space that exists")
    deploy.add_argument("--dry-run", action="store_true", help="print the plan, and stop")
    deploy.add_argument("--yes", action="store_true", help="do not ask for confirmation")


def run(args: argparse.Namespace, out: Out) -> None:
    """Plan, and deploy after the confirmation."""
    check_repo(args.repo)

    from hf_fusion.publishing.space import deploy_space, plan_space

    planned = plan_space(
        args.app,
        args.repo,
        model=args.model,
        trust_remote_code=args.trust_remote_code,
        private=not args.public,
        overwrite=args.overwrite,
    )
    words = ["hf-fusion", "spaces", "deploy", args.app, "--repo", args.repo]
    words += ["--model", args.model] if args.model else []
    flags = {"--trust-remote-code": args.trust_remote_code, "--public": args.public, "--overwrite": args.overwrite}
    command = shlex.join([*words, *(flag for flag, is_set in flags.items() if is_set), "--yes"])
    if args.dry_run:
        out.dict(planned.summary())
        out.hint(command)
        return
    if not args.yes:
        if out.mode != "human" or not sys.stdin.isatty():
            raise FusionError(f"deploying to {args.repo} needs confirmation, but stdin is not a terminal", command)
        out.dict(planned.summary())
        if input("Deploy? [y/N] ").strip().lower() not in ("y", "yes"):
            raise FusionError("not deployed", command)
    deployed = deploy_space(planned)
    out.result("Deployed", space=deployed.repo_id, revision=deployed.sha, url=deployed.url)
    if args.model and not args.trust_remote_code:
        out.hint(f"the Space loads {args.model} once TRUST_REMOTE_CODE is true in its settings; read the code first")
