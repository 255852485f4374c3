"""Fuse several experts into one model, and save it with the recipe that reproduces it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from hf_fusion.cli.checks import check_models, check_repo
from hf_fusion.cli.errors import UsageError, checking_arguments
from hf_fusion.cli.output import Out
from hf_fusion.cli.parser import COUNT, POSITIVE, add_consent
from hf_fusion.cli.progress import loading_libraries
from hf_fusion.errors import FusionError
from hf_fusion.progress import phase

if TYPE_CHECKING:
    from hf_fusion.recipe import Recipe, RecipeExpert

EXAMPLES = (
    ("hf-fusion fuse --method foe --experts me/low me/high --output fused", "a Fusion of Experts"),
    ("hf-fusion fuse --method phatgoose --experts me/sums me/sorting --output fused", "LoRA experts, routed by gates"),
    ("hf-fusion fuse --method ties --base me/base --experts me/a me/b --set density=0.3 --output merged", "a merge"),
    ("hf-fusion fuse recipe.yaml --output merged --dry-run", "the cost of a recipe, ours or mergekit's"),
    ("hf-fusion fuse fusion.yaml --output fused --push me/fused", "fuse from a recipe, then publish"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add recipe, or method and experts; output and publishing."""
    parser.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="a fusion.yaml, a folder that contains one, or a mergekit recipe"
    )
    parser.add_argument("--method", help="fusion method, instead of a recipe; hf-fusion methods lists all")
    parser.add_argument("--experts", nargs="+", default=[], metavar="ID", help="owner/name[@revision] or folders")
    parser.add_argument(
        "--base", metavar="ID", help="base model of the experts; for adapters, instead of the recorded one"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the method, with its value in YAML; may be repeated",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="dtype of the fused model (default: that of the experts)",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read pickle weights (.bin), which can run code, where an expert has no safetensors",
    )
    add_consent(parser, "experts and bases that are folders or pinned to a commit")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write the model to")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is already in DIR or REPO")
    parser.add_argument(
        "--push", metavar="REPO", help="publish the model with its card as owner/name; access is checked before fusing"
    )
    parser.add_argument(
        "--push-experts", action="store_true", help="with --push: first push experts that are local folders"
    )
    merging = parser.add_argument_group("static merges")
    merging.add_argument(
        "--dry-run", action="store_true", help="only print what would be read and written, and the cost"
    )
    merging.add_argument(
        "--stages", metavar="DIR", help="keep the results of the stages of RECIPE, each in a folder of its name in DIR"
    )
    merging.add_argument(
        "--threads", type=COUNT, metavar="N", help="tensors merged in parallel (default: one per core)"
    )
    merging.add_argument(
        "--device", default="cpu", help="device for methods that work on whole matrices: cpu (default), cuda or cuda:N"
    )
    merging.add_argument(
        "--shard-gb", type=POSITIVE, default=5.0, metavar="GB", help="maximum size of a weights file in GB (default: 5)"
    )


def run(args: argparse.Namespace, out: Out) -> None:
    """Fuse, save and optionally publish."""
    if bool(args.recipe) == bool(args.method or args.experts):
        raise UsageError("give either a recipe, or a method and its experts", "hf-fusion fuse --help")
    if not args.recipe and not (args.method and args.experts):
        raise UsageError("--method and --experts must be given together", "hf-fusion fuse --help")

    if args.push_experts and not args.push:
        raise UsageError("--push-experts needs --push", "--push OWNER/NAME --push-experts")

    from hf_fusion.hub.provenance import read_recipe
    from hf_fusion.io.folders import refuse_to_replace
    from hf_fusion.merging.methods import MERGE_METHODS, METHODS_LISTING
    from hf_fusion.merging.recipe_files import load_recipe
    from hf_fusion.recipe import Recipe

    if not args.dry_run:
        refuse_to_replace(args.output, args.overwrite)
    if args.recipe:
        if args.set:
            raise UsageError(
                "--set needs --method: a recipe contains its options", f"write them under parameters: in {args.recipe}"
            )
        recipe = read_recipe(args.recipe) if Path(args.recipe).is_dir() else load_recipe(args.recipe)
        recipe = replace(recipe, base=args.base or recipe.base, dtype=args.dtype or recipe.dtype)
    else:
        with checking_arguments():
            parameters = _parameters(args.set)
            weights = parameters.pop("weights", None) if args.method in MERGE_METHODS else None
            recipe = Recipe(args.method, _experts(args.experts, weights), args.base, parameters, args.dtype)
    about = f"{METHODS_LISTING} {recipe.method} describes its parameters"
    with nullcontext() if args.recipe else checking_arguments(about):
        _check(recipe)
    _check_names(recipe, args)

    with loading_libraries():
        if recipe.method in MERGE_METHODS:
            import hf_fusion.merging.merge
        else:
            import hf_fusion.fusion  # noqa: F401
        from hf_fusion.merging.engine.processes import is_main

    if args.push:
        _check_push(recipe, args)
    if recipe.method in MERGE_METHODS:
        _merge(recipe, args, out)
    else:
        _fuse(recipe, args, out)
    if args.push and not args.dry_run and is_main():
        from hf_fusion.publishing.publish import publish

        try:
            pushed = publish(args.output, args.push, push_experts=args.push_experts, overwrite=args.overwrite)
        except FusionError as error:
            retry = f"hf-fusion publish {args.output} {args.push}"
            raise FusionError(
                error.message, f"{error.hint or 'see above'}; the model in {args.output} is complete: {retry}"
            ) from error
        if pushed is not None:
            out.result("Published", url=pushed.url, revision=pushed.sha)


def _check(recipe: Recipe) -> None:
    """Check method and parameters before torch is imported and models are read."""
    from hf_fusion.merging.methods import MERGE_METHODS
    from hf_fusion.merging.recipe_checks import check_recipe, family_method

    for stage in recipe.stages.values():
        check_recipe(stage)
    if recipe.method in MERGE_METHODS:
        check_recipe(recipe)
    else:
        family_method(recipe.method, {name: value for name, value in recipe.parameters.items() if name != "task"})


def _check_names(recipe: Recipe, args: argparse.Namespace) -> None:
    """Check the models and the repo."""
    from hf_fusion.merging.methods import MERGE_METHODS
    from hf_fusion.merging.recipe_checks import stage_of

    if args.dry_run and recipe.method not in MERGE_METHODS:
        raise UsageError(f"--dry-run works for static merges only; {recipe.method} loads its experts", "omit --dry-run")
    if args.dry_run and recipe.stages:
        raise UsageError("--dry-run works for a single stage, not for a recipe of several", "omit --dry-run")
    if args.stages and not recipe.stages:
        raise UsageError("--stages is for recipes of several stages; this one has a single one", "omit --stages")
    all_stages = (recipe, *recipe.stages.values())
    names = [name for own in all_stages for name in (own.base, *(expert.model for expert in own.experts)) if name]
    check_models([name for name in names if stage_of(name, recipe.stages) is None])
    if args.push:
        check_repo(args.push)


def _fuse(recipe: Recipe, args: argparse.Namespace, out: Out) -> None:
    """Fuse loaded experts into a model of a family."""
    from hf_fusion.families import METHODS
    from hf_fusion.fusion import fuse_recipe, save_fused

    model = fuse_recipe(recipe, allow_pickle=args.allow_pickle, trust_remote_code=args.trust_remote_code)
    folder = save_fused(model, Path(args.output), overwrite=args.overwrite)
    out.result("Fused", folder=str(folder), parameters=model.num_parameters())
    out.hint(METHODS[recipe.method].next_command.format(args.output))


def _merge(recipe: Recipe, args: argparse.Namespace, out: Out) -> None:
    """Merge checkpoints tensor by tensor into a plain model of the experts' class."""
    from hf_fusion.cards.card import write_card
    from hf_fusion.merging.engine.processes import is_main
    from hf_fusion.merging.lora import AdapterReport
    from hf_fusion.merging.merge import count_cores, merge, plan_merge

    if args.dry_run:
        from hf_fusion.merging.engine.estimate import estimate

        planned = plan_merge(recipe)
        models = [*([planned.base] if planned.base else []), *planned.experts]
        rows = [
            {
                "model": model.name,
                "as": "base" if model is planned.base else "expert",
                "tensors": len(model.entries),
                "MB": round(sum(entry.nbytes for entry in model.entries.values()) / 1e6, 1),
            }
            for model in models
        ]
        cost = estimate(planned, args.threads or count_cores())
        planned.files.close()
        if planned.dropped:
            out.table([mismatch.row() for mismatch in planned.dropped], "Tensors that do not match", human_only=True)
        facts = {
            "method": planned.method.title,
            "tensors": len(planned.targets),
            "read_mb": round(cost.read / 1e6, 1),
            "written_mb": round(cost.written / 1e6, 1),
            "peak_memory_mb": round(cost.memory / 1e6),
            "seconds": round(cost.seconds, 1),
        }
        out.table(rows, "Inputs", human_only=True)
        for warning in planned.warnings:
            out.warning(warning)
        out.dict(facts if out.mode != "json" else {**facts, **planned.facts, "inputs": rows})
        return
    with phase("Merging", unit="B") as merging:
        shard_bytes = int(args.shard_gb * 1e9)
        report = merge(
            recipe,
            args.output,
            threads=args.threads,
            shard_bytes=shard_bytes,
            device=args.device,
            overwrite=args.overwrite,
            stages_folder=args.stages,
            progress=merging.reach,
        )
    if not is_main():
        return
    write_card(report.folder)
    for warning in report.warnings:
        out.warning(warning)
    error = report.error if isinstance(report, AdapterReport) else None
    out.result(
        "Merged",
        folder=str(report.folder),
        tensors=report.tensors,
        mb=round(report.nbytes / 1e6, 1),
        seconds=round(report.seconds, 1),
        **({} if error is None else {"relative_error": round(error, 6)}),
        **(report.facts if out.mode == "json" else {}),
    )
    load = f'PeftModel.from_pretrained(base, "{args.output}")  # base: {report.recipe.base}'
    out.hint(f"hf-fusion eval {args.output} --data DATA" if error is None else load)


def _check_push(recipe: Recipe, args: argparse.Namespace) -> None:
    """Check before the fusion that its result can be published."""
    from hf_fusion.merging.engine.processes import Processes
    from hf_fusion.publishing.publish import check_publish

    processes = Processes()
    with processes.step():
        if processes.is_main:
            try:
                check_publish(recipe, args.push, push_experts=args.push_experts, overwrite=args.overwrite)
            except FusionError as error:
                separately = f"without --push, then: hf-fusion publish {args.output} {args.push}"
                raise FusionError(
                    error.message, f"{error.hint}; or fuse {separately}" if error.hint else separately
                ) from error


def _experts(names: list[str], weights: Sequence[float] | None) -> tuple[RecipeExpert, ...]:
    """Experts of a recipe, with the weights of ``--set weights=[…]`` in static merges."""
    from hf_fusion.recipe import RecipeExpert
    from hf_fusion.schema import Expected, KeyPath, read

    if weights is None:
        return tuple(map(RecipeExpert, names))
    each = Expected(f"a list of {len(names)} numbers, one for each expert", lambda value: len(value) == len(names))
    given = read(Annotated[list[float], each], weights, KeyPath("--set", "weights"))
    return tuple(map(RecipeExpert, names, given))


def _parameters(assignments: list[str]) -> dict[str, Any]:
    """``["mode=selection"]`` → ``{"mode": "selection"}``; values are YAML."""
    from hf_fusion.io.yaml_files import parse_yaml

    pairs = [text.partition("=") for text in assignments]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise UsageError(f"--set {wrong[0]} has no value", f"--set {wrong[0]}=VALUE")
    return {name: parse_yaml(value, f"--set {name}") for name, _, value in pairs}
