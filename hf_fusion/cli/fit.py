"""Teach a fused model, or an adapter's gates, what it has to learn; the experts themselves stay as they are."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from hf_fusion.cli.checks import (
    check_columns,
    check_found,
    check_local,
    columns_of_adapter,
    columns_to_fit,
    columns_to_measure,
    model_in,
)
from hf_fusion.cli.output import Out
from hf_fusion.cli.parser import COUNT, POSITIVE, SEED, add_consent, at_least
from hf_fusion.cli.progress import start
from hf_fusion.errors import FusionError
from hf_fusion.families import FIT_PARTS, FITTED_BY
from hf_fusion.types import ModelRef

FUSER_EXAMPLES = (
    ("hf-fusion fit fuser fused --data train.parquet --frugal", "fit the fuser, and learn to ask fewer experts"),
    ("hf-fusion fit fuser fused --data me/rows --split train --by loss", "choose by least loss, on a Hub data set"),
)
GATES_EXAMPLES = (
    ("hf-fusion fit gates my-adapter --data train.parquet", "train an adapter's PHATGOOSE gates, into its folder"),
    (
        "hf-fusion fit gates me/my-adapter --data me/rows --push",
        "the same for one on the Hub, and add them to its repo",
    ),
    (
        "hf-fusion fit gates you/adapter --data rows.parquet --kind average --output gates",
        "stand-ins that need no training, for an adapter of somebody else",
    ),
)
ROUTERS_EXAMPLES = (
    (
        "hf-fusion fit routers fused --data unlabelled.parquet",
        "adapt a WEMoE's routers; column task names the expert",
    ),
    ("hf-fusion fit routers fused --data rows.parquet --loss labels", "teach them by labels instead"),
)
EXAMPLES = (*FUSER_EXAMPLES, *GATES_EXAMPLES, *ROUTERS_EXAMPLES)
CHECKPOINTS = "gate_checkpoints"  # in the output folder while gates are trained
ROUTER_CHECKPOINTS = "{}-router-checkpoints"  # beside the model's folder while its routers are trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One command per thing that can be fitted."""
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART", title="what to fit")
    for name, part in FIT_COMMANDS.items():
        title = FIT_PARTS[name].title
        command = parts.add_parser(name, help=title, description=f"Fit {title}.", examples=part.examples)
        part.add_arguments(command)


def _add_fuser(fuser: argparse.ArgumentParser) -> None:
    fuser.add_argument("folder", metavar="MODEL_DIR", help="a folder that hf-fusion fuse wrote; it is updated")
    _add_data(fuser)
    fuser.add_argument("--frugal", action="store_true", help="also learn to answer from few of the experts")
    fuser.add_argument(
        "--by", choices=("domain", "loss"), default="domain", help="in selection, the expert to choose is that of ..."
    )
    fuser.add_argument("--label-column", metavar="NAME", help="column of the labels (default: label)")
    fuser.add_argument("--expert-column", metavar="NAME", help="column of the domains (default: expert)")


def _add_gates(gates: argparse.ArgumentParser) -> None:
    gates.add_argument("adapter", metavar="ADAPTER", help="an adapter's folder, or owner/name on the Hub")
    _add_data(gates)
    gates.add_argument("--base", metavar="ID", help="the adapter's base, where it is not the one it records")
    gates.add_argument(
        "--kind", choices=("trained", "average"), default="trained", help="average: the mean inputs, without training"
    )
    gates.add_argument(
        "--reference",
        metavar="DATA",
        help="rows of all that may be asked: gates then read whitened inputs",
    )
    gates.add_argument("--steps", type=COUNT, default=100, metavar="N", help="optimizer steps (default: 100)")
    gates.add_argument("--learning-rate", type=POSITIVE, metavar="X", help="default: 0.005, with --reference 0.0001")
    gates.add_argument("--batch-size", type=COUNT, default=16, metavar="N", help="examples a step (default: 16)")
    gates.add_argument("--max-length", type=COUNT, default=512, metavar="N", help="tokens of an example (default: 512)")
    gates.add_argument("--output", metavar="DIR", help="where the gates go (default: the adapter's folder)")
    gates.add_argument("--push", action="store_true", help="add them to the adapter's repo, its tags and its card")


def _add_routers(routers: argparse.ArgumentParser) -> None:
    routers.add_argument("folder", metavar="MODEL_DIR", help="a folder that hf-fusion fuse wrote; it is updated")
    _add_data(routers)
    routers.add_argument("--task-column", metavar="NAME", help="column of the tasks, named as experts (default: task)")
    routers.add_argument(
        "--expert-column", metavar="NAME", help="column of the tasks' experts (default: expert, if any)"
    )
    routers.add_argument(
        "--loss",
        choices=("expert", "entropy", "labels"),
        default="expert",
        help="learn from the task's expert, from being sure (the paper), both without labels, or from labels",
    )
    routers.add_argument("--steps", type=COUNT, default=100, metavar="N", help="optimizer steps (default: 100)")
    routers.add_argument("--learning-rate", type=POSITIVE, default=5e-4, metavar="X", help="default: 0.0005")
    routers.add_argument("--batch-size", type=COUNT, default=16, metavar="N", help="rows of each task a step (16)")
    routers.add_argument("--max-length", type=COUNT, default=512, metavar="N", help="tokens of a row (default: 512)")
    routers.add_argument(
        "--diversity",
        type=at_least(0, float),
        metavar="X",
        help="weight of what keeps answers spread (default: 1; 0: the paper)",
    )
    routers.add_argument(
        "--tolerance",
        type=at_least(0, float),
        metavar="X",
        help="stop where answers narrow, or leave the expert's, by more (0.1)",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="a parquet, csv or json file, a folder, or a Hub data set's id")
    parser.add_argument("--split", default="train", help="of a folder or Hub data set (default: train)")
    parser.add_argument("--overwrite", action="store_true", help="replace what was fitted, or measured, before")
    add_consent(parser, "the folder, or of what is named with its commit")
    parser.add_argument("--seed", type=SEED, default=0, help="the same seed gives the same weights (default: 0)")


def run(args: argparse.Namespace, out: Out) -> None:
    """Loads, fits and writes back, all of it or nothing."""
    FIT_COMMANDS[args.part].run(args, out)


def _refuse_again(args: argparse.Namespace) -> None:
    """Refuses, before anything is loaded, to replace what an earlier fit learned, or what was measured of it."""
    from hf_fusion.io.json_files import read_json

    folder = Path(args.folder)
    if args.overwrite or not (folder / "config.json").exists():
        return
    config = read_json(folder / "config.json", args.folder)
    if config.get("model_type") != FITTED_BY[args.part].name:
        return  # there is nothing to fit, which loading it says
    found = list(dict.fromkeys(what for key, what in FIT_PARTS[args.part].recorded.items() if config.get(key)))
    found += ["measured (results.json)"] if (folder / "results.json").exists() else []
    if found:
        raise FusionError(
            f"{args.folder} was {' and '.join(found)} already, which fitting replaces",
            f"--overwrite, or fit another: hf-fusion fuse {args.folder} --output OTHER",
        )


def _fit_fuser(args: argparse.Namespace, out: Out) -> None:
    config = model_in(args.folder)
    family = FITTED_BY["fuser"]
    if config.get("model_type") != family.name or config.get("rule"):
        made = config.get("rule") or config.get("model_type") or "another method"
        raise FusionError(
            f"{args.folder} was made by {made}: it has no fuser", f"hf-fusion fuse --method {family.name} …"
        )
    if args.frugal and config.get("mode") == "selection":
        raise FusionError("in selection only the chosen expert answers", "leave --frugal out")
    label, expert = args.label_column or "label", args.expert_column or "expert"
    needed = columns_to_fit(config, args.by, label, expert)
    named = (args.label_column, args.expert_column)
    check_columns(args.data, args.split, needed, named)
    _refuse_again(args)

    from hf_fusion.data import load_rows

    rows = load_rows(args.data, args.split)
    check_found(rows.column_names, args.data, needed, named)
    start("fusion", "training.fuser")
    from hf_fusion.fusion import load_fused, save_fused
    from hf_fusion.training.fuser import fit_fuser

    model, recipe = load_fused(args.folder, trust_remote_code=args.trust_remote_code)
    fit = fit_fuser(
        model,
        rows,
        by=args.by,
        frugal=args.frugal,
        seed=args.seed,
        label_column=label,
        expert_column=expert,
    )
    folder = save_fused(model, args.folder, recipe, overwrite=True)
    out.result("Fitted", folder=str(folder), **asdict(fit))
    out.hint(f"hf-fusion eval {args.folder} --data {args.data} --split test")


def _fit_gates(args: argparse.Namespace, out: Out) -> None:
    is_folder, ref = Path(args.adapter).is_dir(), ModelRef.parse(args.adapter)
    folder = Path(args.output or args.adapter) if args.output or is_folder else None
    if args.push and is_folder:
        raise FusionError(f"{args.adapter} is a folder, not a repo", "hf-fusion fit gates owner/name --data … --push")
    if folder is None and not args.push:
        again = f"hf-fusion fit gates {args.adapter} --data {args.data}"
        raise FusionError("nothing says where the gates go", f"{again} --output DIR, or --push")

    check_local([args.adapter, args.base])
    needed = columns_of_adapter(args.adapter) if is_folder else ()
    check_columns(args.data, args.split, needed)
    if args.reference:
        check_columns(args.reference, args.split, needed)

    from hf_fusion.data import load_rows
    from hf_fusion.hub.gates import GATES_FILE, refuse_gates, save_gates
    from hf_fusion.hub.resolve import resolve

    if folder:
        refuse_gates(folder, args.overwrite)
    if args.push and not args.overwrite and GATES_FILE in resolve(args.adapter).sizes:
        raise FusionError(f"{args.adapter} has gates already: {GATES_FILE}", "--overwrite replaces them")
    rows = load_rows(args.data, args.split)
    check_found(rows.column_names, args.data, needed)

    start("training.gates")
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
            steps=args.steps,
            learning_rate=args.learning_rate,
            seed=args.seed,
            output_dir=folder / CHECKPOINTS if folder else None,
            **given,
        )
    where: dict[str, str] = {}
    if folder:
        where["file"] = str(save_gates(gates, folder, overwrite=args.overwrite).resolve())
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    if args.push:
        pushed = push_gates(gates, ref.id, revision=ref.revision)
        where |= {"repo": pushed.repo_id, "revision": pushed.sha, "url": pushed.url}
    out.result(
        {"trained": "Trained", "average": "Averaged"}[args.kind], **where, gates=len(gates.vectors), **gates.facts
    )
    use = f"hf-fusion fuse --method phatgoose --experts {args.adapter} OTHERS --output fused"
    name = Path(args.adapter).resolve().name if is_folder else ref.id
    elsewhere = args.output and not args.push
    out.hint(f"{use} --set 'missing_gates={{{name}: {args.output}}}'" if elsewhere else use)


def _fit_routers(args: argparse.Namespace, out: Out) -> None:
    spread: dict[str, Any] = {
        name: value
        for name, value in {"diversity": args.diversity, "tolerance": args.tolerance}.items()
        if value is not None
    }
    if args.loss == "labels" and spread:
        raise FusionError("--loss labels knows neither --diversity nor --tolerance", "leave them out")
    if args.loss != "labels":
        spread["loss"] = args.loss

    config = model_in(args.folder)
    family = FITTED_BY["routers"]
    if (made := config.get("model_type")) != family.name:
        raise FusionError(
            f"{args.folder} was made by {made}: it has no routers", f"hf-fusion fuse --method {family.name} …"
        )
    task, expert = args.task_column or "task", args.expert_column or "expert"
    needed: list[tuple[str, ...]] = [(task,), *columns_to_measure(config, "label")]
    if args.loss != "labels":
        needed = [column for column in needed if column not in (("label",), ("target",))]
    check_columns(args.data, args.split, needed, (args.task_column, args.expert_column))
    _refuse_again(args)

    from hf_fusion.data import load_rows, match_experts_by_name, split_tasks

    rows = load_rows(args.data, args.split)
    check_found(rows.column_names, args.data, needed, (args.task_column, args.expert_column))

    start("fusion", "training.routers")
    from hf_fusion.fusion import load_fused, save_fused
    from hf_fusion.models.modeling_wemoe import WEMoEModel
    from hf_fusion.training.routers import adapt_routers, fit_routers

    model, recipe = load_fused(args.folder, trust_remote_code=args.trust_remote_code)
    assert isinstance(model, WEMoEModel)
    suite, owners = split_tasks(rows, model.experts, task, expert)
    owners = match_experts_by_name(suite, model.experts) | owners
    folder = Path(args.folder).resolve()
    checkpoints = folder.with_name(ROUTER_CHECKPOINTS.format(f".{folder.name}"))
    facts = (fit_routers if args.loss == "labels" else adapt_routers)(
        model,
        {owners.get(task, task): own for task, own in suite.items()},
        steps=args.steps,
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        max_length=args.max_length,
        seed=args.seed,
        output_dir=checkpoints,
        **spread,
    )
    save_fused(model, folder, recipe, overwrite=True)
    shutil.rmtree(checkpoints, ignore_errors=True)
    answers = [
        {
            "task": task,
            "rows": str(facts.rows[task]),
            "confidence": f"{first.confidence:.2f} → {facts.after[task].confidence:.2f}",
            "effective classes": f"{first.classes:.1f} → {facts.after[task].classes:.1f}",
            "as the expert answers": f"{first.agreement:.0%} → {facts.after[task].agreement:.0%}",
        }
        for task, first in facts.before.items()
    ]
    if answers:
        out.table(answers, title="The answers on rows that were not learned from, before → after", aside=True)
    out.result("Fitted" if args.loss == "labels" else "Adapted", folder=str(folder), **facts.for_config())
    out.hint(f"hf-fusion eval {args.folder} --data {args.data} --split test")


class FitCommand(NamedTuple):
    """What ``hf-fusion fit NAME`` takes, does, and shows as examples."""

    examples: tuple[tuple[str, str], ...]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Out], None]


FIT_COMMANDS = {
    "fuser": FitCommand(FUSER_EXAMPLES, _add_fuser, _fit_fuser),
    "gates": FitCommand(GATES_EXAMPLES, _add_gates, _fit_gates),
    "routers": FitCommand(ROUTERS_EXAMPLES, _add_routers, _fit_routers),
}
"""Name of a part, as in `families.FIT_PARTS` → its command."""
