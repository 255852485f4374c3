"""WEMoE on suites of real fine-tunes, before and after its routers adapt, beside static merges and the experts.

    python tests/benchmarks/wemoe_suites.py --data DIR --suite minilm-8 --output FILE
    python tests/benchmarks/wemoe_suites.py --data DIR --suite minilm-8 --transductive     # adapts on the test rows
    python tests/benchmarks/wemoe_suites.py --data DIR --suite vision-6 --corrupted 1 2 3 4 5
    python tests/benchmarks/wemoe_suites.py --data DIR --suite vision-6 --adapt-on gaussian_noise:5 --transductive
    python tests/benchmarks/wemoe_suites.py --data DIR --suite unseen-few --static        # all static merges beside

`examples/train_experts.py` trains the experts. Routers and coefficients learn without labels, from rows that neither
trained the experts nor are tested. What does not depend on the seed is measured once.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_fusion import WEMoEModel, adapt_routers
from hf_fusion.bench.corruptions import corrupted as under
from hf_fusion.bench.setups.merging import MergingSetup
from hf_fusion.demo.merging_suites import SUITES, trained_experts
from hf_fusion.evaluation.evaluate import evaluate
from hf_fusion.evaluation.image_corruptions import CORRUPTIONS
from hf_fusion.evaluation.merging import INDIVIDUAL, WEMOE, TaskModel
from hf_fusion.evaluation.results import HELD_IN, Results
from hf_fusion.hub.load import load_experts
from hf_fusion.merging.in_memory import merge_states
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.training.adamerging import CoefficientMerge

UNADAPTED = "WEMoE, not adapted"


class Suite:
    """The experts and rows of one run, and what is made of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, suite = args, SUITES[args.suite]
        base, folders = trained_experts(suite, args.experts)
        tasks = {name: replace(task, expert=str(folders[name])) for name, task in suite.declared.tasks.items()}
        self.declared = replace(suite.declared, base=str(base), tasks=tasks)
        [self.base] = load_experts([base], gates=False)
        self.experts = load_experts(list(folders.values()))
        parts = {task: suite.rows(args.data, task) for task in suite.tasks}
        self.test = {task: some(rows[2], args.limit) for task, rows in parts.items()}
        self.tune = {task: some(rows[1], TUNED) for task, rows in parts.items()}
        self.adapt = self.test if args.transductive else {task: rows[1] for task, rows in parts.items()}
        if args.adapt_on:
            name, _, severity = args.adapt_on.partition(":")
            self.adapt = corrupted(self.adapt, name, int(severity))
            self.test = self.adapt if args.transductive else corrupted(self.test, name, int(severity))

    def routers(self, seed: int, **options: Any) -> Any:
        """A WEMoE, adapted unless it is told otherwise."""
        model = WEMoEModel.from_experts(self.experts, base=self.base, modules=self.args.modules)
        return self._adapted(model, seed, **options)

    def coefficients(self, seed: int, granularity: str, **options: Any) -> Any:
        """AdaMerging."""
        return self._adapted(CoefficientMerge(self.experts, self.base.model, granularity), seed, **options)

    def _adapted(self, model: Any, seed: int, **options: Any) -> Any:
        if options.pop("skip", False):
            return model, None
        given = {name: getattr(self.args, name) for name in ("steps", "batch_size", "learning_rate")}
        how = {name: value for name, value in given.items() if value is not None} | options
        return model, adapt_routers(model, self.adapt, seed=seed, experts=self.experts, base=self.base, **how)

    def static(self) -> list[TaskModel]:
        """Every static merge that needs no data, with its defaults."""
        merge = CoefficientMerge(self.experts, self.base.model, "task")
        base, states = merge.states()
        found = []
        for name, row in MERGE_METHODS.items():
            if row.merges == "models" and row.experts[1] is None and not row.plans and not row.statistics:
                merged = merge_states(name, base, states)
                shown = partial(CoefficientMerge.showing, tensors={key: merged[key] for key in base})
                found.append(TaskModel(row.title, merge, "baseline", shown))
        return found

    def tuned(self, rule: str) -> tuple[float, CoefficientMerge]:
        """The static merge by a rule, with the λ that is best on labelled rows that neither trained nor are tested."""
        setup, scores = MergingSetup(self.declared, self.args.data, self.args.limit, TUNED), {}
        for scaling in SCALINGS:
            setup.show(merge_states(rule, setup.base, setup.states, scaling=scaling))
            scores[scaling] = evaluate(setup.merge, self.tune)[WEMOE].means[HELD_IN].score
        print(f"# {rule} on {TUNED} rows of each task kept apart: {scores}", flush=True)
        best = max(scores, key=lambda scaling: scores[scaling])
        setup.show(merge_states(rule, setup.base, setup.states, scaling=best))
        return best, setup.merge

    def measure(self, seed: int, models: Mapping[str, Any], test: Mapping[str, Dataset], **settings: Any) -> Any:
        """All models on some rows; with the first seed the experts and their simple merges as well."""
        args = self.args
        return evaluate(
            models[WEMOE],
            test,
            experts=self.experts if seed == 0 else (),
            base=self.base.model,
            more=[
                *(
                    TaskModel(name, model, "fused" if isinstance(model, WEMoEModel) else "baseline")
                    for name, model in models.items()
                    if name != WEMOE
                ),
                *(self.static() if args.static and seed == 0 else ()),
            ],
            settings={"suite": args.suite, "seed": seed, "modules": args.modules, **settings},
            command=args.command,
        )


# what is learned without labels: from the experts, or by the papers' loss, watched or not
PLAIN = {"loss": "entropy", "diversity": 0.0}
LEARNED: dict[str, Callable[[Suite, int], Any]] = {
    WEMOE: Suite.routers,
    "WEMoE, information": partial(Suite.routers, loss="entropy"),
    "WEMoE, entropy": partial(Suite.routers, **PLAIN, guard=False),
    "WEMoE, entropy, watched": partial(Suite.routers, **PLAIN),
    "AdaMerging, by task": partial(Suite.coefficients, granularity="task"),
    "AdaMerging, by layer": partial(Suite.coefficients, granularity="layer"),
    "AdaMerging, by layer, entropy": partial(Suite.coefficients, granularity="layer", **PLAIN, guard=False),
}
# beside the simple average and task arithmetic with the model's λ: rules at the best of some λ
TUNABLE = {"task arithmetic": "task_arithmetic", "TIES": "ties"}
SCALINGS, TUNED = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0), 100


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per data set")
    parser.add_argument("--suite", choices=SUITES, default="minilm-8")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--limit", type=int, default=1000, help="test rows of each task")
    parser.add_argument("--steps", type=int, help="default: the library's")
    parser.add_argument("--batch-size", type=int, help="rows of each task a step; default: the library's")
    parser.add_argument("--learning-rate", type=float, help="default: the library's")
    parser.add_argument("--modules", default="mlp")
    parser.add_argument("--transductive", action="store_true", help="adapt on the test rows themselves")
    parser.add_argument("--adapt-on", help="NAME:SEVERITY, the corruption of the rows to adapt on and to test")
    parser.add_argument("--corrupted", type=int, nargs="*", default=(), help="severities to test after clean rows")
    parser.add_argument("--learned", nargs="*", choices=LEARNED, default=list(LEARNED), help="what to adapt")
    parser.add_argument("--static", action="store_true", help="also every static merge that needs no data")
    parser.add_argument("--experts", type=Path, help="folder of the experts (default: where the example puts them)")
    parser.add_argument("--join", type=Path, nargs="*", default=(), help="outputs of earlier runs of the same rows")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    given = ["DIR" if word == str(args.data) else word for word in sys.argv[1:]]
    args.command = f"python tests/benchmarks/wemoe_suites.py {shlex.join(given)}"
    suite = Suite(args)
    runs = [Results.from_dict(run) for file in args.join for run in json.loads(file.read_text())["runs"]]
    for seed in args.seeds:
        models, facts = {}, {}
        for name in args.learned:
            began = time.process_time()
            models[name], adaptation = LEARNED[name](suite, seed)
            facts[name] = {**adaptation.for_config(), "cpu_seconds": round(time.process_time() - began)}
            print(f"# seed {seed}, {name}: {json.dumps(facts[name])}", flush=True)
        if seed == 0:
            models[UNADAPTED], _ = suite.routers(seed, skip=True)
            for name, rule in () if args.static else TUNABLE.items():
                scaling, models[f"{name}, λ tuned"] = suite.tuned(rule)
                facts[f"{name}, λ tuned"] = {"scaling": scaling}
        for test, condition in conditions(suite.test, args.corrupted):
            results = suite.measure(
                seed, models, test, condition=condition, adapted_on=args.adapt_on or "clean",
                transductive=args.transductive, adaptations=facts,
            )  # fmt: skip
            print(f"\n{condition}, seed {seed}\n{results.text()}", flush=True)
            runs.append(results)
            if args.output:
                write(args.output, runs)
    if args.output:
        write(args.output, runs)
    for condition, rows in summary(runs)["conditions"].items():
        for name, row in rows.items():
            print(f"{condition:20} {name:36} {row['mean']:.1%} ± {row['spread']:.1%}  {row['normalised']:.1%}")


def conditions(test: Mapping[str, Dataset], severities: Any) -> Any:
    """Rows as they are, then under every corruption at some severities."""
    yield test, "clean"
    for severity in severities:
        for name in CORRUPTIONS:
            yield corrupted(test, name, severity), f"{name}:{severity}"


def corrupted(rows: Mapping[str, Dataset], name: str, severity: int) -> dict[str, Dataset]:
    """The rows of every task under a corruption."""
    return {task: under(own, f"{name}:{severity}") for task, own in rows.items()}


def some(rows: Dataset, limit: int) -> Dataset:
    return rows.shuffle(seed=0).select(range(min(limit, len(rows))))


def write(file: Path, runs: list[Results]) -> None:
    file.write_text(json.dumps(summary(runs), indent=1) + "\n", encoding="utf-8")


def summary(runs: list[Results]) -> dict[str, Any]:
    """By condition and predictor, over the seeds: mean, half of the range, and the share of the experts' mean."""
    found: dict[str, dict[str, Any]] = {}
    names = dict.fromkeys(run.settings["condition"] for run in runs)
    for condition in names:
        own = [run for run in runs if run.settings["condition"] == condition]
        experts = own[0][INDIVIDUAL].means[HELD_IN].score if own[0].settings["seed"] == 0 else float("nan")
        for name in dict.fromkeys(p.name for run in own for p in run.predictors):
            means = [s.means[HELD_IN].score for run in own for s in run.predictors if s.name == name]
            mean = sum(means) / len(means)
            row = {"mean": mean, "spread": (max(means) - min(means)) / 2, "seeds": len(means)}
            found.setdefault(condition, {})[name] = {**row, "normalised": mean / experts}
    return {
        "commands": list(dict.fromkeys(run.command for run in runs)),
        "machine": runs[0].machine,
        "conditions": found,
        "runs": [asdict(run) for run in runs],
    }


if __name__ == "__main__":
    main()
