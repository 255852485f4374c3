"""Export a fused model for servers without this package: a dense model, a LoRA adapter, or a GGUF file."""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_fusion.cli.checks import check_columns, read_model_config
from hf_fusion.cli.errors import UsageError
from hf_fusion.cli.output import Out
from hf_fusion.cli.parser import COUNT
from hf_fusion.cli.progress import loading_libraries
from hf_fusion.exporting.forms import FORMS, QUANTIZATIONS
from hf_fusion.extras import need
from hf_fusion.io.folders import refuse_to_replace

EXAMPLES = (
    ("hf-fusion export wemoe --to dense --task mnist", "the WEMoE, merged for the task of its expert mnist"),
    ("hf-fusion export wemoe --to dense --input rows.parquet", "merged with the mean coefficients of these rows"),
    ("hf-fusion export router --to adapter", "the experts of a PHATGOOSE router, averaged, as one PEFT adapter"),
    ("hf-fusion export router --to dense --task sums", "its base with one expert, merged"),
    ("hf-fusion export merged --to gguf --quantize Q8_0", "a static merge for llama.cpp, with weights of 8 bits"),
)
INPUTS = ("prompt", "text", "image")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, the form, what determines the weights of the experts, and the output."""
    parser.add_argument(
        "folder", metavar="MODEL_DIR", help="a fused model's folder; for GGUF, that of any language model"
    )
    parser.add_argument("--to", required=True, choices=FORMS, help="what to export")
    parser.add_argument("--task", metavar="NAME", help="the expert whose weights, or whose head, the model gets")
    parser.add_argument(
        "--input", metavar="FILE", help="rows (prompt, text or image) whose routing gives the weights of the experts"
    )
    parser.add_argument("--split", default="test", help="split of a folder or a data set on the Hub (default: test)")
    parser.add_argument("--rank", type=COUNT, metavar="R", help="truncate the adapter to this rank (default: exact)")
    parser.add_argument(
        "--quantize", metavar="TYPE", choices=QUANTIZATIONS,
        help=f"type of the weights of a GGUF file: {', '.join(QUANTIZATIONS)} (default: as they are)",
    )  # fmt: skip
    parser.add_argument("-o", "--output", metavar="DIR", help="folder to write (default: NAME-FORM)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is already in DIR")


def run(args: argparse.Namespace, out: Out) -> None:
    """Export, and show what was read back."""
    if args.rank is not None and args.to != "adapter":
        raise UsageError("--rank goes with --to adapter", "omit --rank")
    if args.quantize is not None and args.to != "gguf":
        raise UsageError("--quantize goes with --to gguf", "omit --quantize")
    if args.to == "gguf":
        need("gguf", "hf-fusion export --to gguf")
    read_model_config(args.folder)
    folder = args.output or f"{Path(args.folder).resolve().name}-{args.to}"
    refuse_to_replace(folder, args.overwrite)
    if args.input is not None:
        check_columns(args.input, args.split, [INPUTS])
    with loading_libraries():
        from hf_fusion.data import load_rows
        from hf_fusion.exporting.export import export

    done = export(
        args.folder,
        folder,
        args.to,
        task=args.task,
        rows=None if args.input is None else load_rows(args.input, args.split),
        rank=args.rank,
        quantize=args.quantize,
        overwrite=args.overwrite,
    )
    for warning in done.warnings:
        out.warning(warning)
    shown = {
        "folder": str(done.folder),
        "what": done.sentence,
        "file": done.file,
        "tensors_read_back": done.tensors,
        "mb": round(done.nbytes / 1e6, 1),
        **({"relative_error": float(f"{done.facts['relative_error']:.3g}")} if args.to == "gguf" else {}),
        "seconds": round(done.seconds, 1),
    }
    out.result("Exported", **{**shown, **({"facts": done.facts} if out.mode == "json" else {})})
    out.hint(HINTS[args.to].format(folder=done.folder, file=done.file))


HINTS = {
    "dense": 'pipeline(model="{folder}")  # transformers alone',
    "gguf": "llama-server -m {folder}/{file}",
    "adapter": 'PeftModel.from_pretrained(base, "{folder}")  # base: see adapter_config.json',
}
