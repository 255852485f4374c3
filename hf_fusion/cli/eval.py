"""Evaluate a fused model beside its experts and simpler baselines, and write results.json."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.cli.checks import (
    check_columns,
    check_known_columns,
    columns_to_evaluate,
    family_of_config,
    pools_rows,
    read_model_config,
)
from hf_fusion.cli.errors import UsageError
from hf_fusion.cli.output import Out
from hf_fusion.cli.parser import COUNT, add_consent
from hf_fusion.cli.progress import loading_libraries
from hf_fusion.extras import need
from hf_fusion.families import family_of

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_fusion.evaluation.results import Results
    from hf_fusion.recipe import Recipe

EXAMPLES = (
    ("hf-fusion eval fused --data test.parquet", "on the rows of a file"),
    (
        "hf-fusion eval fused --data me/rows --split test --format json",
        "on a data set on the Hub; the results are printed as JSON",
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, the data and their columns."""
    parser.add_argument("folder", metavar="MODEL_DIR", help="a fused model's folder; results.json is written into it")
    parser.add_argument(
        "--data", required=True, help="a Parquet, CSV or JSON file, a folder, or a data set's id on the Hub"
    )
    parser.add_argument("--split", default="test", help="split of a folder or a data set on the Hub (default: test)")
    parser.add_argument("--label-column", metavar="NAME", help="column with the label (default: label)")
    parser.add_argument(
        "--expert-column", metavar="NAME", help="column with the expert of the row's domain (default: expert)"
    )
    parser.add_argument("--task-column", metavar="NAME", help="column with the task (default: task); not for a FoE")
    add_consent(parser, "the model's folder and of the experts that its fusion.yaml pins")
    parser.add_argument("--batch-size", type=COUNT, default=32, metavar="N", help="examples per step (default: 32)")


def run(args: argparse.Namespace, out: Out) -> None:
    """Evaluate, save the results and print them."""
    config = read_model_config(args.folder)
    family = family_of_config(config)
    if args.task_column and family and not family.by_task:
        raise UsageError(f"{family.title} is evaluated on one data set, not task by task", "omit --task-column")
    if family and family.map:
        need("plots", f"hf-fusion eval of a model of the family {family.name}")
    needed = columns_to_evaluate(config, args.label_column or "label")
    named = (args.label_column, args.expert_column, args.task_column)
    check_columns(args.data, args.split, needed, named)

    from hf_fusion.data import load_rows

    rows = load_rows(args.data, args.split)
    check_known_columns(rows.column_names, args.data, needed, named)
    if not pools_rows(config) and args.label_column and args.label_column != "label":
        rows = rows.remove_columns([name for name in ("label",) if name in rows.column_names])
        rows = rows.rename_column(args.label_column, "label")
    options = {"batch_size": args.batch_size, "command": _command(args)}
    args.label_column, args.expert_column = args.label_column or "label", args.expert_column or "expert"
    args.task_column = args.task_column or "task"
    with loading_libraries():
        import hf_fusion.evaluation.evaluate
        import hf_fusion.fusion  # noqa: F401
        from hf_fusion.cards.card import write_card
        from hf_fusion.evaluation.results import RESULTS_FILE
        from hf_fusion.hub.provenance import has_recipe, read_recipe
        from hf_fusion.merging.methods import MERGE_METHODS

    recipe = read_recipe(args.folder) if has_recipe(args.folder) else None
    evaluate_model: Callable[..., Results] = _evaluate_static
    if recipe is not None and recipe.method not in MERGE_METHODS:
        evaluate_model = EVALUATORS[family_of(recipe.method).name]
    results = evaluate_model(args, rows, recipe, options)
    path = Path(args.folder) / RESULTS_FILE
    results.save(path)
    if evaluate_model is _evaluate_static and recipe is not None:
        write_card(args.folder)  # with the results
    metric, shown = (results.tasks[0].metric, "") if results.pooled else (None, ", with 95 % intervals")
    title = f"{metric or 'right answers in %'} on {len(rows)} examples{shown}"
    out.table(results.table(), title=title, key=metric, data=asdict(results))
    out.log(f"The results were written to {path}")
    out.hint(f"hf-fusion publish {args.folder} OWNER/NAME --dry-run")


def _command(args: argparse.Namespace) -> str:
    """The command that repeats the evaluation."""
    given = {f"--{name}-column": getattr(args, f"{name}_column") for name in ("label", "expert", "task")}
    columns = [word for option, value in given.items() if value for word in (option, value)]
    consent = ["--trust-remote-code"] if args.trust_remote_code else []
    return shlex.join(
        ["hf-fusion", "eval", args.folder, "--data", args.data, "--split", args.split, *columns, *consent]
    )


def _evaluate_foe(args: argparse.Namespace, rows: Dataset, recipe: Recipe, options: dict[str, Any]) -> Results:
    """Evaluate a Fusion of Experts."""
    from hf_fusion.evaluation.evaluate import evaluate
    from hf_fusion.fusion import load_fused

    columns = {"label_column": args.label_column, "expert_column": args.expert_column}
    model, _ = load_fused(args.folder, trust_remote_code=args.trust_remote_code)
    return evaluate(model, rows, name=args.data, split=args.split, **columns, **options)


def _evaluate_phatgoose(args: argparse.Namespace, rows: Dataset, recipe: Recipe, options: dict[str, Any]) -> Results:
    """Evaluate a PHATGOOSE router task by task; saves each task's routing weights, also as a figure."""
    from hf_fusion.data import split_tasks
    from hf_fusion.evaluation.evaluate import evaluate
    from hf_fusion.evaluation.plots import plot_routing
    from hf_fusion.evaluation.routing_map import ROUTING_FILE, ROUTING_PICTURE, map_routing
    from hf_fusion.fusion import load_fused
    from hf_fusion.hub.load import load_experts
    from hf_fusion.models.modeling_phatgoose import PhatgooseRouter

    consent = {"trust_remote_code": args.trust_remote_code}
    experts = load_experts([e.model for e in recipe.experts], base=recipe.base, dtype=recipe.dtype, **consent)
    suite, owners = split_tasks(rows, [expert.name for expert in experts], args.task_column, args.expert_column)
    given = {
        key: recipe.parameters[key] for key in ("top_k", "temperature", "missing_gates") if key in recipe.parameters
    }
    results = evaluate(experts, suite, owners=owners, **given, **options)
    router, _ = load_fused(args.folder, **consent)
    assert isinstance(router, PhatgooseRouter)
    routing = map_routing(router, suite, owners=owners, batch_size=args.batch_size)
    routing.save(Path(args.folder) / ROUTING_FILE)
    plot_routing(routing, Path(args.folder) / ROUTING_PICTURE)
    return results


def _evaluate_wemoe(args: argparse.Namespace, rows: Dataset, recipe: Recipe, options: dict[str, Any]) -> Results:
    """Evaluate a WEMoE and its experts task by task; saves each task's coefficients, also as a figure."""
    from hf_fusion.data import split_tasks
    from hf_fusion.evaluation.coefficient_map import COEFFICIENT_FILE, COEFFICIENT_PICTURE, map_coefficients
    from hf_fusion.evaluation.evaluate import evaluate
    from hf_fusion.evaluation.plots import plot_coefficients
    from hf_fusion.fusion import load_fused
    from hf_fusion.models.modeling_wemoe import WEMoEModel

    model, _ = load_fused(args.folder, trust_remote_code=args.trust_remote_code)
    assert isinstance(model, WEMoEModel)
    suite, owners = split_tasks(rows, model.experts, args.task_column, args.expert_column)
    results = evaluate(
        model,
        suite,
        experts=[] if recipe.elsewhere else [expert.model for expert in recipe.experts],
        base=None if recipe.elsewhere else recipe.base,
        owners=owners,
        trust_remote_code=args.trust_remote_code,
        **options,
    )
    coefficients = map_coefficients(model, suite, owners=owners, batch_size=args.batch_size)
    coefficients.save(Path(args.folder) / COEFFICIENT_FILE)
    plot_coefficients(coefficients, Path(args.folder) / COEFFICIENT_PICTURE)
    return results


def _evaluate_static(
    args: argparse.Namespace, rows: Dataset, recipe: Recipe | None, options: dict[str, Any]
) -> Results:
    """Evaluate a static merge task by task, with its experts and base if they can be loaded."""
    from hf_fusion.data import split_tasks
    from hf_fusion.evaluation.evaluate import evaluate
    from hf_fusion.types import ModelRef

    experts = [expert.model for expert in recipe.experts] if recipe else []
    named = [ModelRef.parse_pair(name)[1].id for name in experts]
    named = [name if name.count("/") == 1 else Path(name).name for name in named]  # ids, or names of folders
    suite, owners = split_tasks(rows, named, args.task_column, args.expert_column)
    return evaluate(
        args.folder,
        suite,
        experts=experts if recipe and not recipe.elsewhere else [],
        base=recipe.base if recipe and not recipe.elsewhere else None,
        owners=owners,
        trust_remote_code=args.trust_remote_code,
        settings={"method": recipe.method, **recipe.parameters} if recipe else {},
        **options,
    )


EVALUATORS: dict[str, Callable[..., Results]] = {
    "foe": _evaluate_foe,
    "phatgoose": _evaluate_phatgoose,
    "wemoe": _evaluate_wemoe,
}
"""Family, as in `families.FAMILIES` → the evaluation of its models."""
