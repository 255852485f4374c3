"""Extract a LoRA adapter from a full fine-tune: PEFT's base with the adapter computes what the fine-tune computes."""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_fusion.cli.checks import check_models
from hf_fusion.cli.output import Out
from hf_fusion.cli.parser import COUNT, at_least
from hf_fusion.cli.progress import loading_libraries
from hf_fusion.types import ModelRef

EXAMPLES = (
    ("hf-fusion extract-lora me/tuned --base me/base --rank 16", "an adapter of rank 16 in the folder tuned-lora"),
    (
        "hf-fusion extract-lora me/tuned --base me/base --energy 0.9 --output lora",
        "ranks by layer, 90 % of each change",
    ),
    ("hf-fusion extract-lora me/tuned --base me/base --rank 16 --linear-only", "an expert for PHATGOOSE"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two models, the size of the adapter, and the output."""
    parser.add_argument("model", metavar="MODEL", help="the fine-tune: owner/name[@revision] or a folder")
    parser.add_argument("--base", required=True, metavar="ID", help="the model that it was fine-tuned from")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=COUNT, metavar="R", help="rank of each linear layer; at most its own dimensions")
    size.add_argument(
        "--energy",
        type=at_least(0, float, above=True, most=1),
        metavar="E",
        help="share of the squared norm of each layer's change to keep, at most 1; ranks follow from it",
    )
    parser.add_argument("-o", "--output", metavar="DIR", help="folder to write the adapter to (default: NAME-lora)")
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter that is already in DIR")
    parser.add_argument(
        "--linear-only",
        action="store_true",
        help="leave out changed norms, biases and embeddings, which PHATGOOSE cannot route; they are listed",
    )
    parser.add_argument("--exact", action="store_true", help="decompose exactly also for low ranks, which takes longer")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="dtype of the factors (default: float32); what is saved in full keeps its own",
    )
    parser.add_argument("--device", default="cpu", help="device of the decompositions: cpu (default), cuda or cuda:N")


def run(args: argparse.Namespace, out: Out) -> None:
    """Extract, and show the error of each module."""
    check_models([args.model, args.base])

    from hf_fusion.io.folders import refuse_to_replace

    folder = args.output or f"{Path(ModelRef.parse_pair(args.model)[1].id).resolve().name}-lora"
    refuse_to_replace(folder, args.overwrite)
    with loading_libraries():
        from hf_fusion.merging.extract_lora import extract_lora

    done = extract_lora(
        args.model,
        args.base,
        folder,
        rank=args.rank,
        energy=args.energy,
        linear_only=args.linear_only,
        exact=args.exact,
        dtype=args.dtype,
        device=args.device,
        overwrite=args.overwrite,
    )
    out.table([part.row() for part in done.parts], "Changed modules", human_only=True)
    for warning in done.warnings:
        out.warning(warning)
    shown = {
        "folder": str(done.folder),
        "linear_layers": len(done.ranks),
        "relative_error": done.error,
        "mb": round(done.nbytes / 1e6, 1),
        "seconds": round(done.seconds, 1),
    }
    out.result("Extracted", **{**shown, **(done.facts() if out.mode == "json" else {})})
    if args.linear_only:
        out.hint(f"hf-fusion fit gates {folder} --data DATA")
    else:
        out.hint(f'PeftModel.from_pretrained(base, "{folder}")  # base: {done.base}')
