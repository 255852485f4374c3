"""Serve a model by OpenAI's API: chats, completions, embeddings or classes, until interrupted."""

from __future__ import annotations

import argparse

from hf_fusion.cli.checks import check_models
from hf_fusion.cli.output import Out
from hf_fusion.cli.parser import COUNT, at_least
from hf_fusion.cli.progress import loading_libraries

EXAMPLES = (
    ("hf-fusion serve router --port 8000", "the fused model in ./router; clients take http://127.0.0.1:8000/v1"),
    ("hf-fusion serve me/fused@1f2e3d4 --name fused", "a published one, which requests name fused"),
    ("hf-fusion serve router --dtype float32 --max-batch 32 --max-queue 64", "at most 32 answers at a time, 64 wait"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, the address and the limits."""
    parser.add_argument(
        "model", metavar="MODEL", help="a fused, merged or plain model: owner/name[@revision] or a folder"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument(
        "--port",
        type=at_least(0, most=65535),
        default=8000,
        help="port to listen on; 0 for any free one (default: 8000)",
    )
    parser.add_argument("--name", help="how requests name the model (default: the folder's name, or the id)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU, where there is one)")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="of the weights (default: as stored)"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run custom code that the model brings")
    limits = parser.add_argument_group("limits; more is refused with a 4xx or 503")
    limits.add_argument(
        "--max-batch", type=COUNT, default=16, metavar="N", help="answers computed together (default: 16)"
    )
    limits.add_argument("--max-queue", type=COUNT, default=256, metavar="N", help="answers that wait (default: 256)")
    limits.add_argument("--max-tokens", type=COUNT, default=2048, metavar="N", help="of an answer (default: 2048)")
    limits.add_argument(
        "--timeout", type=at_least(0, float, above=True), default=300.0, metavar="SECONDS",
        help="from a request to its whole answer (default: 300)",
    )  # fmt: skip


def run(args: argparse.Namespace, out: Out) -> None:
    """Load the model, and serve it."""
    check_models([args.model])
    with loading_libraries():
        from hf_fusion.serving import Limits, ModelServer, load_served

    served = load_served(args.model, args.name, args.device, args.dtype, args.trust_remote_code)
    limits = Limits(args.max_batch, args.max_queue, args.max_tokens, args.timeout)

    def ready(endpoint: str) -> None:
        out.result("Serving", endpoint=f"{endpoint}/v1", model=served.name, gives=served.kind)
        out.hint(f"curl {endpoint}/v1/models")
        out.log("Press Ctrl+C to stop; running requests are finished.")

    ModelServer(served, args.host, args.port, limits).run(ready)
