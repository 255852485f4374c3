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
    check_writes,
    columns_to_evaluate,
    family_of_config,
    pools_rows,
    read_model_config,
)
from hf_fusion.cli.errors import UsageError
from hf_fusion.cli.output import Out
from hf_fusion.cli.parser import COUNT, add_consent, at_least
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
    (
        "hf-fusion eval fused --harness arc_easy,tasks/mine.yaml --compare",
        "on tasks of lm-evaluation-harness, beside each expert and the base",
    ),
)
ROWS = ("split", "label_column", "expert_column", "task_column")
HARNESS = ("fewshot", "limit", "compare")
BATCH_SIZE, HARNESS_BATCH_SIZE = 32, 1  # the second is the harness's own default


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, the data and their columns."""
    parser.add_argument("folder", metavar="MODEL_DIR", help="a fused model's folder; results.json is written into it")
    parser.add_argument(
        "--data", help="labelled rows: a Parquet, CSV or JSON file, a folder, or a data set's id on the Hub"
    )
    parser.add_argument("--split", help="split of a folder or a data set on the Hub (default: test)")
    parser.add_argument("--label-column", metavar="NAME", help="column with the label (default: label)")
    parser.add_argument(
        "--expert-column", metavar="NAME", help="column with the expert of the row's domain (default: expert)"
    )
    parser.add_argument("--task-column", metavar="NAME", help="column with the task (default: task); not for a FoE")
    group = parser.add_argument_group("lm-evaluation-harness, in place of --data")
    group.add_argument(
        "--harness", action="append", metavar="TASK[,TASK]",
        help="tasks to run: names of the harness, YAML files, or folders of them",
    )  # fmt: skip
    group.add_argument(
        "--fewshot", type=at_least(0), metavar="N", help="examples before each document (default: as each task says)"
    )
    group.add_argument("--limit", type=COUNT, metavar="N", help="only the first N documents of each task")
    group.add_argument("--compare", action="store_true", help="run each expert and the base as well")
    add_consent(parser, "the model's folder and of the experts that its fusion.yaml pins")
    parser.add_argument(
        "--batch-size", type=COUNT, metavar="N",
        help=f"examples per step (default: {BATCH_SIZE}; with --harness {HARNESS_BATCH_SIZE}, as the harness itself)",
    )  # fmt: skip


def run(args: argparse.Namespace, out: Out) -> None:
    """Evaluate, save the results and print them."""
    if (args.data is None) == (args.harness is None):
        raise UsageError(
            "a model is evaluated on labelled rows or on tasks of the harness",
            "write --data DATA or --harness TASK",
        )
    for name in HARNESS if args.data else ROWS:
        if getattr(args, name) not in (None, False):
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} goes with {'--harness' if args.data else '--data'}", f"omit {option}")
    (_run_rows if args.data else _run_harness)(args, out)


def _run_harness(args: argparse.Namespace, out: Out) -> None:
    """Run tasks of lm-evaluation-harness; of an earlier evaluation the rest is kept."""
    check_writes(read_model_config(args.folder), args.folder)
    need("lm-eval", "hf-fusion eval --harness")
    from hf_fusion.evaluation.harness_tasks import path_of_task

    words = [word for words in args.harness for word in words.split(",") if word]
    for word in words:
        path_of_task(word)  # raises for files that do not exist
    with loading_libraries():
        import hf_fusion.evaluation.evaluate
        from hf_fusion.cards.card import write_card
        from hf_fusion.hub.provenance import has_recipe, read_recipe
        from hf_fusion.merging.methods import MERGE_METHODS

    earlier = _earlier(args.folder)
    consent = ["--trust-remote-code"] if args.trust_remote_code else []
    compare = ["--compare"] if args.compare else []
    given = [*(("--harness", word) for word in words), ("--fewshot", args.fewshot), ("--limit", args.limit)]
    given.append(("--batch-size", args.batch_size))
    options = [word for name, value in given if value is not None for word in (name, str(value))]
    results = hf_fusion.evaluation.evaluate.evaluate(
        args.folder,
        harness=words,
        fewshot=args.fewshot,
        limit=args.limit,
        compare=args.compare,
        batch_size=args.batch_size or HARNESS_BATCH_SIZE,
        trust_remote_code=args.trust_remote_code,
        command=shlex.join(["hf-fusion", "eval", args.folder, *options, *compare, *consent]),
    )
    [run] = results.harness
    path = _save(results, earlier, args.folder)
    if has_recipe(args.folder) and read_recipe(args.folder).method in MERGE_METHODS:
        write_card(args.folder)  # with the results
    out.table(run.table(), title="scores of lm-evaluation-harness, ± standard error", data=asdict(results))
    out.log(f"The results were written to {path}")
    out.hint(f"hf-fusion publish {args.folder} OWNER/NAME --dry-run")


def _earlier(folder: str) -> Results | None:
    """The results of earlier evaluations, if there are any."""
    from hf_fusion.evaluation.results import RESULTS_FILE, Results

    path = Path(folder) / RESULTS_FILE
    return Results.load(path) if path.exists() else None


def _save(results: Results, earlier: Results | None, folder: str) -> Path:
    """Write the results into the model's folder, with what earlier evaluations found and this one did not measure."""
    from hf_fusion.evaluation.results import RESULTS_FILE

    path = Path(folder) / RESULTS_FILE
    (results.with_earlier(earlier) if earlier else results).save(path)
    return path


def _run_rows(args: argparse.Namespace, out: Out) -> None:
    """Evaluate on labelled rows."""
    args.split, args.batch_size = args.split or "test", args.batch_size or BATCH_SIZE
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
        from hf_fusion.hub.provenance import has_recipe, read_recipe
        from hf_fusion.merging.methods import MERGE_METHODS

    earlier = _earlier(args.folder)
    recipe = read_recipe(args.folder) if has_recipe(args.folder) else None
    evaluate_model: Callable[..., Results] = _evaluate_static
    if recipe is not None and recipe.method not in MERGE_METHODS:
        evaluate_model = EVALUATORS[family_of(recipe.method).name]
    results = evaluate_model(args, rows, recipe, options)
    path = _save(results, earlier, args.folder)
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

    experts = recipe.outer_experts if recipe else []
    named = [ModelRef.parse_pair(name)[1].id for name in experts]
    named = [name if name.count("/") == 1 else Path(name).name for name in named]  # ids, or names of folders
    suite, owners = split_tasks(rows, named, args.task_column, args.expert_column)
    return evaluate(
        args.folder,
        suite,
        experts=experts if recipe and not recipe.elsewhere else [],
        base=recipe.outer_base if recipe and not recipe.elsewhere else None,
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
