"""Run a Hub of your own on this machine, for air-gapped work and for trying things; every client works with it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hf_fusion.cli.output import Out
from hf_fusion.cli.parser import Examples, at_least

if TYPE_CHECKING:
    _Actions = argparse._SubParsersAction[argparse.ArgumentParser]

SERVE_EXAMPLES = (
    ("hf-fusion hub serve hub --port 8000", "serve the folder ./hub; people find its pages at http://127.0.0.1:8000"),
    ("hf-fusion hub serve hub --format quiet", "on any free port; prints its address alone"),
)
USER_EXAMPLES = (
    ("export HF_TOKEN=$(hf-fusion hub user hub me --format quiet)", "a token for the user me, created if new"),
    ("hf-fusion hub user hub me --format json", "the same, as JSON"),
)
EXAMPLES = (SERVE_EXAMPLES[0], USER_EXAMPLES[0])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Serving, and its users."""
    actions: _Actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")
    server = _action(actions, "serve", "answer requests until interrupted", SERVE_EXAMPLES)
    server.add_argument("folder", metavar="DIR", help="holds everything; created if missing")
    server.add_argument("--host", default="127.0.0.1", help="the only address it answers on (default: 127.0.0.1)")
    server.add_argument("--port", type=at_least(0, most=65535), default=0, help="default: any free one")
    user = _action(actions, "user", "print a new token for a user; works beside a running server", USER_EXAMPLES)
    user.add_argument("folder", metavar="DIR", help="the Hub's folder")
    user.add_argument("name", metavar="NAME", help="the user, created if new")


def _action(actions: _Actions, name: str, what: str, examples: Examples) -> argparse.ArgumentParser:
    return actions.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.", examples=examples)


def run(args: argparse.Namespace, out: Out) -> None:
    """Serves, or makes a token."""
    from hf_fusion.server import add_user, serve

    if args.action == "user":
        out.dict({"token": add_user(args.folder, args.name), "user": args.name})
        out.hint("keep it: it is shown this once.  export HF_TOKEN=…")
        return

    def ready(endpoint: str) -> None:
        out.result("The Hub is up", endpoint=endpoint, folder=args.folder)
        out.hint(f"export HF_ENDPOINT={endpoint}")
        out.log("Ctrl+C stops it.")

    serve(args.folder, args.host, args.port, on_ready=ready)
