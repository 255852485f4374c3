"""Train the fuser or the routers of a fused model, or the gates of an adapter; the experts stay frozen."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from hf_fusion.cli.checks import (
    check_columns,
    check_known_columns,
    check_models,
    columns_of_adapter,
    columns_to_evaluate,
    columns_to_fit,
    read_model_config,
)
from hf_fusion.cli.errors import UsageError
from hf_fusion.cli.output import Out
from hf_fusion.cli.parser import COUNT, POSITIVE, SEED, add_consent, at_least
from hf_fusion.cli.progress import loading_libraries
from hf_fusion.errors import FusionError
from hf_fusion.families import FIT_PARTS, FITTED_BY
from hf_fusion.recipe import Recipe
from hf_fusion.types import ModelRef

FUSER_EXAMPLES = (
    ("hf-fusion fit fuser fused --data train.parquet --frugal", "fit the fuser, and learn to run fewer experts"),
    (
        "hf-fusion fit fuser fused --data me/rows --split train --by loss",
        "learn to select the expert with the lowest loss",
    ),
)
GATES_EXAMPLES = (
    (
        "hf-fusion fit gates my-adapter --data train.parquet",
        "train an adapter's PHATGOOSE gates, and save them in its folder",
    ),
    (
        "hf-fusion fit gates me/my-adapter --data me/rows --push",
        "the same for an adapter on the Hub; the gates are added to its repo",
    ),
    (
        "hf-fusion fit gates you/adapter --data rows.parquet --kind average --output gates",
        "gates without training, for somebody else's adapter",
    ),
)
ROUTERS_EXAMPLES = (
    (
        "hf-fusion fit routers fused --data unlabelled.parquet",
        "adapt a WEMoE's routers without labels; the column task names the expert",
    ),
    ("hf-fusion fit routers fused --data rows.parquet --loss labels", "train the routers on labels instead"),
)
EXAMPLES = (*FUSER_EXAMPLES, *GATES_EXAMPLES, *ROUTERS_EXAMPLES)
CHECKPOINTS = "gate_checkpoints"  # in the output folder while gates are trained
ROUTER_CHECKPOINTS = "{}-router-checkpoints"  # beside the model's folder while its routers are trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand for each target."""
    targets = parser.add_subparsers(dest="target", required=True, metavar="TARGET", title="what to fit")
    for name, fit in FIT_COMMANDS.items():
        title = FIT_PARTS[name].title
        command = targets.add_parser(name, help=title, description=f"Fit {title}.", examples=fit.examples)
        fit.add_arguments(command)


def _add_fuser(fuser: argparse.ArgumentParser) -> None:
    fuser.add_argument("folder", metavar="MODEL_DIR", help="a folder that hf-fusion fuse wrote; the fit is saved in it")
    _add_data(fuser)
    fuser.add_argument(
        "--fuser",
        choices=("auto", "mlp", "stacking", "gating", "gated-stacking", "attention"),
        default="auto",
        help="kind of fuser: chosen by cross-validation (default), the paper's mlp, or another",
    )
    fuser.add_argument("--frugal", action="store_true", help="also learn to predict with fewer experts")
    fuser.add_argument(
        "--by",
        choices=("domain", "loss"),
        default="domain",
        help="which expert a fuser in selection mode learns to choose: the domain's, or the one with the lowest loss",
    )
    fuser.add_argument("--label-column", metavar="NAME", help="column with the label (default: label)")
    fuser.add_argument("--expert-column", metavar="NAME", help="column with the domain's expert (default: expert)")


def _add_gates(gates: argparse.ArgumentParser) -> None:
    gates.add_argument("adapter", metavar="ADAPTER", help="an adapter's folder, or owner/name on the Hub")
    _add_data(gates)
    gates.add_argument("--base", metavar="ID", help="the adapter's base model, instead of the recorded one")
    gates.add_argument(
        "--kind",
        choices=("gaussian", "paper", "average"),
        help="gaussian: densities of a few inputs of the base, one pass without training (default; where the base has "
        "no such inputs, or with --reference, paper); paper: a trained vector per linear layer; average: the mean "
        "input of each linear layer",
    )
    gates.add_argument(
        "--reference",
        metavar="DATA",
        help="rows of all domains; the gates (paper, average) then read inputs that are whitened by these rows",
    )
    gates.add_argument("--steps", type=COUNT, metavar="N", help="optimizer steps of the paper's gates (default: 100)")
    gates.add_argument("--learning-rate", type=POSITIVE, metavar="X", help="default: 0.005; with --reference: 0.0001")
    gates.add_argument("--batch-size", type=COUNT, default=16, metavar="N", help="examples per step (default: 16)")
    gates.add_argument(
        "--max-length", type=COUNT, default=512, metavar="N", help="maximum tokens per example (default: 512)"
    )
    gates.add_argument("--output", metavar="DIR", help="folder for the gates (default: the adapter's folder)")
    gates.add_argument("--push", action="store_true", help="add the gates to the adapter's repo, tags and card")


def _add_routers(routers: argparse.ArgumentParser) -> None:
    routers.add_argument(
        "folder", metavar="MODEL_DIR", help="a folder that hf-fusion fuse wrote; the fit is saved in it"
    )
    _add_data(routers)
    routers.add_argument(
        "--task-column", metavar="NAME", help="column with the task, named like its expert (default: task)"
    )
    routers.add_argument(
        "--expert-column", metavar="NAME", help="column with the task's expert, if the names differ (default: expert)"
    )
    routers.add_argument(
        "--loss",
        choices=("expert", "entropy", "labels"),
        default="expert",
        help="imitate the task's expert (default), minimise entropy (as in the paper), or learn from labels, which "
        "the others do not need",
    )
    routers.add_argument("--steps", type=COUNT, default=100, metavar="N", help="optimizer steps (default: 100)")
    routers.add_argument("--learning-rate", type=POSITIVE, metavar="X", help="learning rate (default: 0.0005)")
    routers.add_argument("--batch-size", type=COUNT, default=8, metavar="N", help="rows per task and step (default: 8)")
    routers.add_argument(
        "--max-length", type=COUNT, default=512, metavar="N", help="maximum tokens per row (default: 512)"
    )
    routers.add_argument(
        "--diversity",
        type=at_least(0, float),
        metavar="X",
        help="weight in the loss of the entropy of the mean prediction (default: 1; in the paper: 0)",
    )
    routers.add_argument(
        "--no-guard",
        dest="guard",
        action="store_false",
        help="keep the routers of the last step, rather than those that predict most like the experts on held-out rows",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", required=True, help="a Parquet, CSV or JSON file, a folder, or a data set's id on the Hub"
    )
    parser.add_argument("--split", default="train", help="split of a folder or a data set on the Hub (default: train)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier fit and the results measured with it"
    )
    add_consent(parser, "a local folder or of a model that is pinned to a commit")
    parser.add_argument(
        "--seed", type=SEED, default=0, help="random seed; the same seed gives the same weights (default: 0)"
    )


def run(args: argparse.Namespace, out: Out) -> None:
    """Load, fit and save; the save is atomic."""
    FIT_COMMANDS[args.target].run(args, out)


def _refuse_refit(args: argparse.Namespace) -> None:
    """Raises FusionError, before anything is loaded, if there is an earlier fit or a ``results.json`` to replace."""
    from hf_fusion.io.json_files import read_json

    folder = Path(args.folder)
    if args.overwrite or not (folder / "config.json").exists():
        return
    config = read_json(folder / "config.json", args.folder)
    if config.get("model_type") != FITTED_BY[args.target].name:
        return  # not a model to fit: loading it raises the error
    found = list(dict.fromkeys(word for key, word in FIT_PARTS[args.target].recorded.items() if config.get(key)))
    found += ["evaluated (results.json)"] if (folder / "results.json").exists() else []
    if found:
        raise FusionError(
            f"{args.folder} was already {' and '.join(found)}, and fitting would replace that",
            f"add --overwrite, or fit another copy: hf-fusion fuse {args.folder} --output OTHER",
        )


def _fit_fuser(args: argparse.Namespace, out: Out) -> None:
    config = read_model_config(args.folder)
    family = FITTED_BY["fuser"]
    if config.get("model_type") != family.name or config.get("rule"):
        made = config.get("rule") or config.get("model_type") or "another method"
        raise FusionError(
            f"{args.folder} was made by {made}: it has no fuser", f"hf-fusion fuse --method {family.name} …"
        )
    if args.frugal and args.fuser == "mlp" and config.get("mode") == "selection":
        raise UsageError("--frugal in the mode selection needs another fuser than mlp", "omit --fuser")
    label, expert = args.label_column or "label", args.expert_column or "expert"
    needed = columns_to_fit(config, args.by, label, expert)
    named = (args.label_column, args.expert_column)
    check_columns(args.data, args.split, needed, named)
    _refuse_refit(args)

    from hf_fusion.data import load_rows

    rows = load_rows(args.data, args.split)
    check_known_columns(rows.column_names, args.data, needed, named)
    with loading_libraries():
        from hf_fusion.fusion import load_fused, save_fused
        from hf_fusion.training.fuser import fit_fuser

    model, recipe = load_fused(args.folder, trust_remote_code=args.trust_remote_code)
    fit = fit_fuser(
        model,
        rows,
        fuser=args.fuser,
        by=args.by,
        frugal=args.frugal,
        seed=args.seed,
        label_column=label,
        expert_column=expert,
    )
    folder = save_fused(model, args.folder, recipe, overwrite=True)
    facts = asdict(fit)
    compared = facts.pop("compared")
    out.table(
        [{**each, "loss": round(each["loss"], 4), "accuracy": round(each["accuracy"], 4)} for each in compared],
        title="fusers in cross-validation",
        human_only=True,
    )
    out.result("Fitted", folder=str(folder), **facts)
    out.hint(f"hf-fusion eval {args.folder} --data {args.data} --split test")


def _fit_gates(args: argparse.Namespace, out: Out) -> None:
    is_folder, ref = Path(args.adapter).is_dir(), ModelRef.parse(args.adapter)
    folder = Path(args.output or args.adapter) if args.output or is_folder else None
    if args.push and is_folder:
        raise FusionError(f"{args.adapter} is a folder, not a repo", "hf-fusion fit gates owner/name --data … --push")
    if folder is None and not args.push:
        again = f"hf-fusion fit gates {args.adapter} --data {args.data}"
        raise UsageError(
            f"{args.adapter} is a repo, so the command must say where to save the gates",
            f"{again} --output DIR, or --push",
        )

    check_models([args.adapter, args.base])
    needed = columns_of_adapter(args.adapter) if is_folder else ()
    check_columns(args.data, args.split, needed)
    if args.reference:
        check_columns(args.reference, args.split, needed)

    from hf_fusion.data import load_rows
    from hf_fusion.hub.gates_file import GATES_FILE, refuse_gates, save_gates
    from hf_fusion.hub.refs_to_files import resolve

    if folder:
        refuse_gates(folder, args.overwrite)
    if args.push and not args.overwrite and GATES_FILE in resolve(args.adapter).sizes:
        raise FusionError(f"{args.adapter} already has gates: {GATES_FILE}", "add --overwrite to replace them")
    rows = load_rows(args.data, args.split)
    check_known_columns(rows.column_names, args.data, needed)

    with loading_libraries():
        from hf_fusion.hub.load import load_experts
        from hf_fusion.publishing.push_gates import push_gates
        from hf_fusion.training.gates import average_activation, train_gates
        from hf_fusion.training.whitening import fit_whitening

    given: dict[str, Any] = {"batch_size": args.batch_size, "max_length": args.max_length}
    consent = {"trust_remote_code": args.trust_remote_code}
    (adapter,) = load_experts([args.adapter], base=args.base, gates=False, **consent)
    if args.reference:
        given["whitening"] = fit_whitening(adapter, load_rows(args.reference, args.split), **given)
    if args.kind == "average":
        gates = average_activation(adapter, rows, **given)
    else:
        gates = train_gates(
            adapter,
            rows,
            gates=args.kind,
            steps=args.steps,
            learning_rate=args.learning_rate,
            seed=args.seed,
            output_dir=folder / CHECKPOINTS if folder else None,
            **given,
        )
    written: dict[str, str] = {}
    if folder:
        written["file"] = str(save_gates(gates, folder, overwrite=args.overwrite).resolve())
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    if args.push:
        pushed = push_gates(gates, ref.id, revision=ref.revision)
        written |= {"repo": pushed.repo_id, "revision": pushed.sha, "url": pushed.url}
    verb = {"gaussian": "Fitted", "trained": "Trained", "average": "Averaged"}[gates.kind]
    out.result(verb, **written, gates=len(gates.vectors or gates.gaussians), **gates.facts)
    use = f"hf-fusion fuse --method phatgoose --experts {args.adapter} OTHERS --output fused"
    name = Path(args.adapter).resolve().name if is_folder else ref.id
    needs_path = args.output and not args.push
    out.hint(f"{use} --set 'missing_gates={{{name}: {args.output}}}'" if needs_path else use)


def _experts_of(recipe: Recipe, out: Out) -> dict[str, Any]:
    """The experts and the base that a model was fused from, to learn from; empty if they cannot be loaded."""
    from hf_fusion.hub.load import load_experts

    try:
        base = load_experts([recipe.base], gates=False)[0] if recipe.base else None
        experts = load_experts([expert.model for expert in recipe.experts], base=base, gates=False)
    except FusionError as error:
        out.warning(f"the routers learn from what the model holds of its experts: {error}")
        return {}
    return {"experts": experts, "base": base}


def _fit_routers(args: argparse.Namespace, out: Out) -> None:
    options: dict[str, Any] = {} if args.diversity is None else {"diversity": args.diversity}
    if args.loss == "labels" and (options or not args.guard):
        raise UsageError("--diversity and --no-guard do not apply to --loss labels", "omit them")
    if args.loss != "labels":
        options |= {"loss": args.loss, "guard": args.guard}

    config = read_model_config(args.folder)
    family = FITTED_BY["routers"]
    if (made := config.get("model_type")) != family.name:
        raise FusionError(
            f"{args.folder} was made by {made}: it has no routers", f"hf-fusion fuse --method {family.name} …"
        )
    task, expert = args.task_column or "task", args.expert_column or "expert"
    needed: list[tuple[str, ...]] = [(task,), *columns_to_evaluate(config, "label")]
    if args.loss != "labels":
        needed = [column for column in needed if column not in (("label",), ("target",))]
    check_columns(args.data, args.split, needed, (args.task_column, args.expert_column))
    _refuse_refit(args)

    from hf_fusion.data import load_rows, match_experts_by_name, split_tasks

    rows = load_rows(args.data, args.split)
    check_known_columns(rows.column_names, args.data, needed, (args.task_column, args.expert_column))

    with loading_libraries():
        from hf_fusion.fusion import load_fused, save_fused
        from hf_fusion.models.modeling_wemoe import WEMoEModel
        from hf_fusion.training.routers import adapt_routers, fit_routers, reset_routers

    model, recipe = load_fused(args.folder, trust_remote_code=args.trust_remote_code)
    assert isinstance(model, WEMoEModel)
    if model.config.adaptation:  # a new fit replaces the earlier one, it does not continue it
        reset_routers(model)
    suite, owners = split_tasks(rows, model.experts, task, expert)
    owners = match_experts_by_name(suite, model.experts) | owners
    if args.loss != "labels":
        options |= _experts_of(recipe, out)
    folder = Path(args.folder).resolve()
    checkpoints = folder.with_name(ROUTER_CHECKPOINTS.format(f".{folder.name}"))
    facts = (fit_routers if args.loss == "labels" else adapt_routers)(
        model,
        {owners.get(task, task): data for task, data in suite.items()},
        steps=args.steps,
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        max_length=args.max_length,
        seed=args.seed,
        output_dir=checkpoints,
        **options,
    )
    save_fused(model, folder, recipe, overwrite=True)
    shutil.rmtree(checkpoints, ignore_errors=True)
    predictions = [
        {
            "task": task,
            "rows": str(facts.rows[task]),
            "confidence": f"{first.confidence:.2f} → {facts.after[task].confidence:.2f}",
            "agreement with the expert": f"{first.agreement:.0%} → {facts.after[task].agreement:.0%}",
            "beyond chance (κ)": f"{first.kappa:.2f} → {facts.after[task].kappa:.2f}",
        }
        for task, first in facts.before.items()
    ]
    if predictions:
        out.table(predictions, title="Predictions on the validation split, before → after", human_only=True)
    out.result("Fitted" if args.loss == "labels" else "Adapted", folder=str(folder), **facts.for_config())
    out.hint(f"hf-fusion eval {args.folder} --data {args.data} --split test")


class FitCommand(NamedTuple):
    """Examples, arguments and action of ``hf-fusion fit NAME``."""

    examples: tuple[tuple[str, str], ...]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Out], None]


FIT_COMMANDS = {
    "fuser": FitCommand(FUSER_EXAMPLES, _add_fuser, _fit_fuser),
    "gates": FitCommand(GATES_EXAMPLES, _add_gates, _fit_gates),
    "routers": FitCommand(ROUTERS_EXAMPLES, _add_routers, _fit_routers),
}
"""Name, as in `families.FIT_PARTS` → its command."""
