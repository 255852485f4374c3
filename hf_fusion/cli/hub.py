"""Run a Hub of your own on this machine, for air-gapped work and for trying things; every client works with it."""

from __future__ import annotations

import argparse

from .output import Out

EXAMPLES = (
    ("hf-fusion hub serve hub --port 8000", "serve the folder ./hub; people find its pages at http://127.0.0.1:8000"),
    ("export HF_TOKEN=$(hf-fusion hub user hub me --format quiet)", "a token for the user me, created if new"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Serving, and its users."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", title="actions")
    server = actions.add_parser("serve", help="answer requests until interrupted")
    server.add_argument("folder", metavar="DIR", help="holds everything; created if missing")
    server.add_argument("--host", default="127.0.0.1", help="the only address it answers on (default: 127.0.0.1)")
    server.add_argument("--port", type=int, default=0, help="default: any free one")
    user = actions.add_parser("user", help="print a new token for a user; works beside a running server")
    user.add_argument("folder", metavar="DIR", help="the Hub's folder")
    user.add_argument("name", metavar="NAME", help="the user, created if new")


def run(args: argparse.Namespace, out: Out) -> None:
    """Serves, or makes a token."""
    from hf_fusion.hub.server import add_user, serve

    if args.action == "user":
        out.dict({"token": add_user(args.folder, args.name), "user": args.name})
        out.hint("keep it: it is shown this once.  export HF_TOKEN=…")
        return

    def ready(endpoint: str) -> None:
        out.result("The Hub is up", endpoint=endpoint, folder=args.folder)
        out.hint(f"export HF_ENDPOINT={endpoint}")
        out.log("Ctrl+C stops it.")

    serve(args.folder, args.host, args.port, on_ready=ready)
