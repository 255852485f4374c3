"""Make one model of several experts, and write it to a folder with the recipe that makes it again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hf_fusion.errors import FusionError

from .output import Out

EXAMPLES = (
    ("hf-fusion fuse --method foe --experts me/low me/high --output fused", "a Fusion of Experts of two ids"),
    ("hf-fusion fuse --method phatgoose --experts me/sums me/sorting --output fused", "LoRA experts, routed by gates"),
    ("hf-fusion fuse fusion.yaml --output fused", "what a recipe describes"),
)
# method -> what to do with its model first; others are ready
NEXT = {"foe": "hf-fusion fit fuser {} --data DATA"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A recipe, or a method and experts."""
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a fusion.yaml, or a folder that holds one")
    parser.add_argument("--method", help="how to fuse, where there is no recipe")
    parser.add_argument("--experts", nargs="+", default=[], metavar="ID", help="owner/name[@revision], or folders")
    parser.add_argument("--base", metavar="ID", help="base of the adapters, if it is not the one they name")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="an option of the method, as in YAML"
    )
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="dtype of the fused model")
    parser.add_argument("--allow-pickle", action="store_true", help="read .bin weights where there is nothing else")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code of experts with a pinned sha")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write the model to")


def run(args: argparse.Namespace, out: Out) -> None:
    """Fuses and saves."""
    if bool(args.recipe) == bool(args.method or args.experts):
        raise FusionError("name a recipe, or a method and its experts", "hf-fusion fuse --help")
    if not args.recipe and not (args.method and args.experts):
        raise FusionError("--method and --experts belong together", "hf-fusion fuse --help")

    from hf_fusion.fusion import fuse, fuse_recipe, save_fused
    from hf_fusion.recipe import Recipe

    trust = {"allow_pickle": args.allow_pickle, "trust_remote_code": args.trust_remote_code}
    if args.recipe:
        model = fuse_recipe(Recipe.load(args.recipe), **trust)
    else:
        model = fuse(args.method, args.experts, args.base, dtype=args.dtype, **trust, **_parameters(args.set))
    folder = save_fused(model, Path(args.output))
    out.result("Fused", folder=str(folder), parameters=model.num_parameters())
    method = Recipe.load(folder).method
    out.hint(NEXT.get(method, "hf-fusion eval {} --data DATA").format(args.output))


def _parameters(given: list[str]) -> dict[str, Any]:
    """``["mode=selection"]`` -> {"mode": "selection"}; values are YAML."""
    import yaml

    pairs = [text.partition("=") for text in given]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise FusionError(f"--set {wrong[0]} has no value", f"--set {wrong[0]}=VALUE")
    return {name: yaml.safe_load(value) for name, _, value in pairs}
