"""WEMoE on suites of real fine-tunes, before and after its routers adapt, beside static merges and the experts.

    python tests/benchmarks/wemoe_suites.py --data DIR --suite minilm-8 --seeds 3 --limit 1000 --output FILE
    python tests/benchmarks/wemoe_suites.py --data DIR --suite minilm-8 --transductive       # adapts on the test rows

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
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from hf_fusion import CoefficientMerge, WEMoEModel, adapt_routers
from hf_fusion.demo.merging_suites import SUITES, trained_experts
from hf_fusion.evaluate_tasks import INDIVIDUAL, WEMOE, System, evaluate_merging
from hf_fusion.hub.load import load_experts
from hf_fusion.models.wemoe.merging_wemoe import RULES
from hf_fusion.suite_results import HELD_IN, SuiteResults

PLAIN = {"diversity": 0.0, "least_classes": 0.0}  # the papers' loss, unwatched


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per data set")
    parser.add_argument("--suite", choices=SUITES, default="minilm-8")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=1000, help="test rows of each task")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16, help="rows of each task a step")
    parser.add_argument("--scaling", type=float, default=0.3)
    parser.add_argument("--modules", default="mlp")
    parser.add_argument("--transductive", action="store_true", help="adapt on the test rows themselves")
    parser.add_argument("--learned", nargs="*", choices=LEARNED, default=list(LEARNED), help="what to adapt")
    parser.add_argument("--experts", type=Path, help="folder of the experts (default: where the example puts them)")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    command = f"python tests/benchmarks/wemoe_suites.py {shlex.join(sys.argv[1:])}"
    suite = SUITES[args.suite]
    base, folders = trained_experts(suite, args.experts)
    parts = {task: suite.rows(args.data, task) for task in suite.tasks}
    test = {task: _some(rows[2], args.limit) for task, rows in parts.items()}
    adapt = {task: own.remove_columns("label") for task, own in (test.items() if args.transductive else
             ((task, rows[1]) for task, rows in parts.items()))}  # fmt: skip
    [start] = load_experts([base], gates=False)
    experts = load_experts(list(folders.values()))
    make = partial(WEMoEModel.from_experts, experts, base=start, scaling=args.scaling, modules=args.modules)
    runs: list[SuiteResults] = []
    for seed in range(args.seeds):
        more, facts = {}, {}
        for name in args.learned:
            began = time.process_time()
            model, adaptation = LEARNED[name](make, experts, start, adapt, args, seed)
            facts[name] = {**adaptation.for_config(), "cpu_seconds": round(time.process_time() - began)}
            print(f"# seed {seed}, {name}: {json.dumps(facts[name])}", flush=True)
            more[name] = (
                System(model, "router") if isinstance(model, WEMoEModel) else System(model, within=model.merged)
            )
        lead = more.pop(WEMOE, None)
        if seed == 0:
            more |= {"WEMoE, not adapted": System(make(), "router")} | _static(experts, start, args.scaling)
        results = evaluate_merging(
            lead.model if lead else make(),
            test,
            experts=experts if seed == 0 else (),
            base=start.model,
            more=more,
            settings={"seed": seed, "suite": suite.name, "transductive": args.transductive, "adaptation": facts,
                      "modules": args.modules},
            command=command,
        )  # fmt: skip
        print(results.text(), flush=True)
        runs.append(results)
        if args.output:
            args.output.write_text(json.dumps(_summary(runs, command), indent=1) + "\n", encoding="utf-8")
    for name, row in _summary(runs, command)["systems"].items():
        print(f"{name:32} {row['mean']:.1%} ± {row['spread']:.1%}  {row['normalised']:.1%} of the experts")


def _some(rows: Dataset, limit: int) -> Dataset:
    return rows.shuffle(seed=0).select(range(min(limit, len(rows))))


def _routers(make: Any, experts: Any, base: Any, rows: Any, args: Any, seed: int, **options: Any) -> Any:
    model = make()
    return model, adapt_routers(model, rows, steps=args.steps, batch_size=args.batch_size, seed=seed, **options)


def _coefficients(granularity: str, make: Any, experts: Any, base: Any, rows: Any, args: Any, seed: int,
                  **options: Any) -> Any:  # fmt: skip
    model = CoefficientMerge(experts, base.model, granularity, args.scaling)
    return model, adapt_routers(model, rows, steps=args.steps, batch_size=args.batch_size, seed=seed, **options)


# what is learned without labels, each by the information loss with the watch unless it says otherwise
LEARNED: dict[str, Callable[..., Any]] = {
    WEMOE: _routers,
    "WEMoE, plain entropy": partial(_routers, **PLAIN),
    "WEMoE, plain entropy, watched": partial(_routers, diversity=0.0),
    "AdaMerging, by task": partial(_coefficients, "task"),
    "AdaMerging, by layer": partial(_coefficients, "layer"),
    "AdaMerging, by layer, plain entropy": partial(_coefficients, "layer", **PLAIN),
}


def _static(experts: Any, base: Any, scaling: float) -> dict[str, System]:
    """Static merges that are no sum of whole task vectors, or of another λ."""
    found = {}
    for name, rule, own in (("task arithmetic, λ .4", "task_arithmetic", 0.4), ("TIES, λ .3", "ties", 0.3),
                            ("TIES, λ 1", "ties", 1.0)):  # fmt: skip
        merge = CoefficientMerge(experts, base.model, "task", 0.0)
        known = {**dict(merge.backbone.named_parameters()), **dict(merge.backbone.named_buffers())}
        with torch.no_grad():
            for number, tensor in enumerate(merge.tensors):
                vectors = list(getattr(merge, f"vectors_{number}"))
                known[tensor].copy_(RULES[rule](known[tensor].clone(), vectors, own))
        found[name] = System(merge, within=merge.merged)
    return found


def _summary(runs: list[SuiteResults], command: str) -> Mapping[str, Any]:
    """Over the seeds: means, half the range between the least and the largest, share of the experts' mean."""
    experts = runs[0][INDIVIDUAL].means[HELD_IN].score
    systems = {}
    for name in dict.fromkeys(system.name for run in runs for system in run.systems):
        means = [s.means[HELD_IN].score for run in runs for s in run.systems if s.name == name]
        mean = sum(means) / len(means)
        spread = (max(means) - min(means)) / 2
        systems[name] = {"mean": mean, "spread": spread, "seeds": len(means), "normalised": mean / experts}
    return {"command": command, "machine": runs[0].machine, "systems": systems, "runs": [asdict(run) for run in runs]}


if __name__ == "__main__":
    main()
