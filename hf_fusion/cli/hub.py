"""Run a Hub on this machine, for offline work and tests; the usual clients work with it unchanged."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hf_fusion.cli.output import Out
from hf_fusion.cli.parser import Examples, at_least

if TYPE_CHECKING:
    _Actions = argparse._SubParsersAction[argparse.ArgumentParser]

SERVE_EXAMPLES = (
    ("hf-fusion hub serve hub --port 8000", "serve the folder ./hub; its web pages are at http://127.0.0.1:8000"),
    ("hf-fusion hub serve hub --format quiet", "on any free port; prints only the address"),
)
USER_EXAMPLES = (
    (
        "export HF_TOKEN=$(hf-fusion hub user hub me --format quiet)",
        "a token for the user me, who is created if missing",
    ),
    ("hf-fusion hub user hub me --format json", "the same, as JSON"),
)
EXAMPLES = (SERVE_EXAMPLES[0], USER_EXAMPLES[0])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions serve and user."""
    actions: _Actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")
    server = _action(actions, "serve", "serve a folder as a Hub until interrupted", SERVE_EXAMPLES)
    server.add_argument("folder", metavar="DIR", help="folder of the Hub; created if missing")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    server.add_argument(
        "--port", type=at_least(0, most=65535), default=0, help="port to listen on (default: any free port)"
    )
    user = _action(actions, "user", "print a new token for a user; the server may be running", USER_EXAMPLES)
    user.add_argument("folder", metavar="DIR", help="the Hub's folder")
    user.add_argument("name", metavar="NAME", help="the user; created if missing")


def _action(actions: _Actions, name: str, description: str, examples: Examples) -> argparse.ArgumentParser:
    return actions.add_parser(
        name, help=description, description=f"{description[0].upper()}{description[1:]}.", examples=examples
    )


def run(args: argparse.Namespace, out: Out) -> None:
    """Serve, or print a token."""
    from hf_fusion.server import add_user, serve

    if args.action == "user":
        out.dict({"token": add_user(args.folder, args.name), "user": args.name})
        out.hint("store the token, which is not shown again: export HF_TOKEN=…")
        return

    def ready(endpoint: str) -> None:
        out.result("The Hub is running", endpoint=endpoint, folder=args.folder)
        out.hint(f"export HF_ENDPOINT={endpoint}")
        out.log("Press Ctrl+C to stop it.")

    serve(args.folder, args.host, args.port, on_ready=ready)
