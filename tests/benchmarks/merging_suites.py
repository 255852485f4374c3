"""Static merging of suites of real fine-tunes: every method with its defaults, and with λ tuned on labelled rows.

    python tests/benchmarks/merging_suites.py --data DIR --suite minilm-8 --output FILE
    python tests/benchmarks/merging_suites.py --data DIR --suite vision-6 --methods ties tsv_m regmean

`examples/train_experts.py` trains the experts. Everything but their heads is merged; each task is answered by its own
expert's head. λ is the best of `SCALINGS` on rows that neither trained the experts nor are tested.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from hf_fusion import CoefficientMerge
from hf_fusion.demo.merging_suites import SUITES, trained_experts
from hf_fusion.evaluate import machine
from hf_fusion.evaluate_tasks import WEMOE, evaluate_merging
from hf_fusion.hub.load import load_experts
from hf_fusion.merging.in_memory import merge_states
from hf_fusion.merging.methods import MERGE_METHODS
from hf_fusion.merging.tensors import InMemory, Statistic
from hf_fusion.suite_results import HELD_IN

# label -> (method, parameters that are not its defaults, whether λ can be tuned)
VARIANTS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "base": ("task_arithmetic", {"scaling": 0.0}, False),
    "average": ("linear", {}, False),
    "task arithmetic": ("task_arithmetic", {}, True),
    "magnitude pruning": ("magnitude", {}, True),
    "TIES": ("ties", {}, True),
    "TIES, sum (fusion_bench)": ("ties", {"merge": "sum", "scaling": 0.3}, True),
    "TIES, trimmed over the model": ("ties", {"trim": "model", "ties": "all"}, True),
    "DARE task arithmetic": ("dare_linear", {}, True),
    "DARE-TIES": ("dare_ties", {}, True),
    "DELLA": ("della", {}, True),
    "breadcrumbs": ("breadcrumbs", {}, True),
    "SCE": ("sce", {}, False),
    "model stock": ("model_stock", {}, False),
    "Karcher mean": ("karcher", {}, False),
    "multi-SLERP": ("multislerp", {}, False),
    "TSV-Merge": ("tsv_m", {}, True),
    "Iso-C": ("iso_c", {}, True),
    "Iso-CTS": ("iso_cts", {}, True),
    "WUDI": ("wudi", {}, True),
    "Fisher": ("fisher", {}, False),
    "Fisher, normalised": ("fisher", {"normalize": True}, False),
    "RegMean": ("regmean", {}, False),
}
SCALINGS = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 1.5)


class StaticMerges:
    """Experts of one base and their merges, one at a time."""

    def __init__(self, experts: list[Any], base: Any) -> None:
        self.merge = CoefficientMerge(experts, base.model, "task", 0.0)
        known = {**dict(self.merge.backbone.named_parameters()), **dict(self.merge.backbone.named_buffers())}
        self._targets = {name: known[name] for name in self.merge.tensors}
        self._base = {name: tensor.detach().clone() for name, tensor in self._targets.items()}
        vectors = [getattr(self.merge, f"vectors_{number}") for number in range(len(self.merge.tensors))]
        self._experts = [
            {name: self._base[name] + own[i] for name, own in zip(self._base, vectors)} for i in range(len(experts))
        ]

    @torch.no_grad()
    def by(self, method: str, statistics: Any = (), **parameters: Any) -> CoefficientMerge:
        """The merge by a method; it is good until the next."""
        merged = merge_states(method, self._base, self._experts, statistics=statistics, **parameters)
        for name, tensor in merged.items():
            self._targets[name].copy_(tensor)
        return self.merge


def main() -> None:
    """Merges, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per data set")
    parser.add_argument("--suite", choices=SUITES, default="minilm-8")
    parser.add_argument("--methods", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--limit", type=int, default=500, help="test rows of each task")
    parser.add_argument("--tuned-on", type=int, default=100, help="rows of each task that λ is tuned on")
    parser.add_argument("--experts", type=Path, help="folder of the experts (default: where the example puts them)")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    suite = SUITES[args.suite]
    base_folder, folders = trained_experts(suite, args.experts)
    [base] = load_experts([base_folder], gates=False)
    experts = load_experts(list(folders.values()))
    parts = {task: suite.rows(args.data, task) for task in suite.tasks}
    test = {task: some(rows[2], args.limit) for task, rows in parts.items()}
    tune = {task: some(rows[1], args.tuned_on) for task, rows in parts.items()}
    merges, measured = StaticMerges(experts, base), {}
    content: dict[str, Any] = {
        "command": f"python tests/benchmarks/merging_suites.py {shlex.join(sys.argv[1:])}",
        "machine": machine(),
        "suite": args.suite,
        "n": sum(map(len, test.values())),
        "tuned_on": args.tuned_on,
        "rows": {},
    }
    print(f"{'method':32}{'default':>9}{'95 %':>14}{'tuned':>9}{'95 %':>14}{'λ':>6}{'CPU s':>8}")
    for label in args.methods:
        method, parameters, tunable = VARIANTS[label]
        kind = MERGE_METHODS[method].statistics
        if kind and kind not in measured:
            measured[kind] = statistics(kind, experts, {task: rows[1] for task, rows in parts.items()})
        given = {"statistics": measured[kind]} if kind else {}
        began = time.process_time()
        merges.by(method, **given, **parameters)
        row: dict[str, Any] = {"method": method, "parameters": parameters, "cpu_seconds": time.process_time() - began}
        row["default"] = score(merges.merge, test)
        if tunable:
            found = {}
            for scaling in SCALINGS:
                merges.by(method, **given, **{**parameters, "scaling": scaling})
                found[scaling] = score(merges.merge, tune)["mean"]
            best = max(found, key=lambda scaling: found[scaling])
            merges.by(method, **given, **{**parameters, "scaling": best})
            row |= {"scaling": best, "tuning": found, "tuned": score(merges.merge, test)}
        content["rows"][label] = row
        tuned = row.get("tuned")
        print(
            f"{label:32}{row['default']['mean']:9.1%}{interval(row['default']):>14}"
            + (f"{tuned['mean']:9.1%}{interval(tuned):>14}{row['scaling']:6g}" if tuned else " " * 29)
            + f"{row['cpu_seconds']:8.1f}",
            flush=True,
        )
        if args.output:
            args.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def score(merge: CoefficientMerge, rows: Mapping[str, Dataset]) -> dict[str, Any]:
    """Mean over the tasks with its interval, and each task's score."""
    results = evaluate_merging(merge, rows)
    [system] = [one for one in results.systems if one.name == WEMOE]
    mean = system.means[HELD_IN]
    tasks = {task: own.score for task, own in system.scores.items()}
    return {"mean": mean.score, "ci95": list(mean.ci95), "tasks": tasks}


def statistics(kind: str, experts: list[Any], rows: Mapping[str, Dataset]) -> list[dict[str, Statistic]]:
    """What Fisher merging and RegMean need: of every expert, on 256 rows of its task."""
    from hf_fusion.training.statistics import measure_fisher, measure_gram

    measure = {"fisher": measure_fisher, "gram": measure_gram}[kind]
    found = []
    for expert in experts:
        own = measure(expert, rows[expert.name].shuffle(seed=0).select(range(min(256, len(rows[expert.name])))))
        readers = {key: InMemory(tensor) for key, tensor in own.tensors.items()}
        found.append({name: Statistic(readers[key], axis, own.norm) for name, (key, axis) in own.places.items()})
    return found


def interval(measured: Mapping[str, Any]) -> str:
    low, high = measured["ci95"]
    return f"{100 * low:.0f} to {100 * high:.0f}"


def some(rows: Dataset, limit: int) -> Dataset:
    return rows.shuffle(seed=0).select(range(min(limit, len(rows))))


if __name__ == "__main__":
    main()
