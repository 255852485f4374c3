"""FoE on real text experts, beside every expert, the ensembles and the oracle expert.

    python examples/train_text_experts.py --data DIR --suite tasks-8     # once; the other suites alike
    python tests/benchmarks/foe_text.py --data DIR --suite tasks-8       # selection, 8 tasks pooled
    python tests/benchmarks/foe_text.py --data DIR --suite banking-groups  # output fusion

Writes tests/benchmarks/results/foe_text_SUITE.json. The experts' outputs are cached: a second run takes seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Value, concatenate_datasets
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel, AutoTokenizer

from hf_fusion import FoEModel, fit_fuser, load_experts
from hf_fusion.assets.minilm import minilm_folder
from hf_fusion.demo.text_suites import SUITES, TextSuite, splits
from hf_fusion.evaluation.baselines import max_confidence, mean_ensemble
from hf_fusion.evaluation.evaluate import evaluate
from hf_fusion.evaluation.intervals import wilson
from hf_fusion.evaluation.results import Results
from hf_fusion.io.cache import cache_folder
from hf_fusion.training.outputs import collect_outputs

COMMAND = "python tests/benchmarks/foe_text.py --data DIR --suite"
RESULTS = Path(__file__).parent / "results"
EXPERTS = cache_folder() / "text_experts"
SEEDS = (0, 1, 2)  # of the fuser's fit; what is reported in full is the first
TEST_ROWS = 500  # of each task, where several are pooled
FIT_ROWS = 400


def pooled(suite: TextSuite, data: Path) -> tuple[Dataset, Dataset]:
    """The rows that fit the fuser and the test rows of all the suite's tasks, as text, text_pair, label, expert."""
    parts: tuple[list[Dataset], list[Dataset]] = ([], [])
    for task in suite.tasks:
        _, fit, test = splits(data, task, suite.fit_share)
        for part, rows, most in ((0, fit, FIT_ROWS), (1, test, TEST_ROWS)):
            if len(suite.tasks) > 1:
                rows = rows.shuffle(seed=0).select(range(min(most, len(rows))))
            parts[part].append(as_strings(rows, task, pooled=len(suite.tasks) > 1))
    fit_rows, test_rows = (concatenate_datasets(part) for part in parts)
    return by_length(fit_rows), by_length(test_rows)


def as_strings(rows: Dataset, task: str, pooled: bool) -> Dataset:
    """Labels by name, since each task counts its own from zero; and where tasks are pooled, the expert of each row."""
    feature = rows.features["label"]
    assert isinstance(feature, ClassLabel)
    names = [feature.names[label] for label in rows["label"]]
    rows = rows.remove_columns("label").add_column("label", names)
    if pooled:
        rows = rows.add_column("expert", [task] * len(rows))
        if "text_pair" not in rows.column_names:
            rows = rows.add_column("text_pair", [""] * len(rows))
        rows = rows.cast_column("text_pair", Value("string"))
    return rows.select_columns(sorted(rows.column_names))


def by_length(rows: Dataset) -> Dataset:
    """Short texts first: batches without much padding."""
    return rows.select(np.argsort([len(text) for text in rows["text"]], kind="stable"))


def build(suite: TextSuite, experts: Sequence[Any], **options: Any) -> FoEModel:
    return FoEModel.from_experts(experts, mode=suite.mode, fuser_hidden=suite.fuser_hidden, **options)


def linear_probe(fit: Dataset, test: Dataset) -> float:
    """How often logistic regression on the base's frozen embeddings names the right task."""
    model, tokenizer = AutoModel.from_pretrained(minilm_folder()).eval(), AutoTokenizer.from_pretrained(minilm_folder())

    @torch.no_grad()
    def embed(rows: Dataset) -> np.ndarray:
        parts = []
        for start in range(0, len(rows), 64):
            batch = rows[start : start + 64]
            texts = [f"{a} {b}".strip() for a, b in zip(batch["text"], batch["text_pair"], strict=True)]
            inputs = tokenizer(texts, padding="longest", truncation=True, max_length=256, return_tensors="pt")
            mask = inputs["attention_mask"][..., None]
            parts.append((model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1))
        return torch.cat(parts).numpy()

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(embed(fit), fit["expert"])
    return float(np.mean(probe.predict(embed(test)) == np.array(test["expert"])))


def per_task(model: FoEModel, test: Dataset) -> dict[str, dict[str, float]]:
    """For each task: rows, accuracy of its own expert and of the FoE, how often the FoE chose that expert."""
    collected = collect_outputs(model, test)
    with torch.no_grad():
        choice = model.fuser(collected.features).argmax(1)
    rows = torch.arange(len(choice))
    right = collected.outputs.argmax(2) == collected.labels[:, None]
    table = {}
    for index, expert in enumerate(model.config.experts):
        own = collected.experts == index
        table[expert["name"]] = {
            "n": int(own.sum()),
            "own_expert": float(right[own, index].float().mean()),
            "foe": float(right[rows, choice][own].float().mean()),
            "chosen": float((choice[own] == index).float().mean()),
        }
    return table


def measure_selection(suite: TextSuite, experts: Sequence[Any], fit: Dataset, test: Dataset, source: str) -> dict:
    """FoE over all embeddings and over those of one expert, and the probe that names the task."""
    index = [expert.name for expert in experts].index(source)
    model, alone = build(suite, experts), build(suite, experts, features_from=index)
    extra: dict[str, Any] = {"seeds": {}}
    for seed in reversed(SEEDS):
        for name, foe in (("foe", model), (f"features from {source}", alone)):
            fit_fuser(foe, fit, seed=seed)
            results = measure(suite, foe, test)
            score = results.best("fused").only_score.score
            extra["seeds"].setdefault(name, {})[seed] = [score, results.selection_accuracy]
            if foe is model:
                main = results
            else:
                lone = results
    main.predictors.insert(1, replace(lone.predictors[0], name=f"FoE, features from {source}"))
    probe = linear_probe(fit, test)
    extra["names_the_task"] = {
        "foe": main.selection_accuracy,
        f"foe, features from {source}": lone.selection_accuracy,
        "linear probe on the base": probe,
        "linear probe ci95": wilson(probe, len(test)),
        "foe ci95": wilson(main.selection_accuracy, len(test)),
    }
    extra["per_task"] = per_task(model, test)
    extra["share_of_oracle"] = main.predictors[0].only_score.score / main.best("oracle").only_score.score
    return asdict(main) | extra


def measure_output(suite: TextSuite, experts: Sequence[Any], fit: Dataset, test: Dataset) -> dict:
    """FoE of outputs fitted with and without the frugal variant."""
    full, frugal = build(suite, experts), build(suite, experts)
    extra: dict[str, Any] = {"seeds": {"foe": {}, "frugal": {}}}
    for seed in reversed(SEEDS):
        report = fit_fuser(full, fit, seed=seed)
        main = measure(suite, full, test)
        extra["fuser"], extra["cross_validation"] = report.fuser, [asdict(each) for each in report.compared]
        if seed == SEEDS[0]:
            extra["against"] = against(full, fit, test)
        fit_fuser(frugal, fit, fuser=report.fuser, seed=seed, frugal=True)
        results = measure(suite, frugal, test)
        point = results.best("frugal")
        extra["seeds"]["foe"][seed] = main.predictors[0].only_score.score
        scores = [predictor.only_score.score for predictor in (results.predictors[0], point)]
        extra["seeds"]["frugal"][seed] = [*scores, point.cost]
    main.curve = results.curve
    main.predictors[1:1] = [replace(results.predictors[0], name="FoE, fitted frugally, all experts"), point]
    return asdict(main) | extra


def against(model: FoEModel, fit: Dataset, test: Dataset) -> dict[str, list[float]]:
    """By how much FoE is above each baseline on the same rows, with the 95 % interval of the paired difference."""
    known, new = collect_outputs(model, fit), collect_outputs(model, test)
    with torch.no_grad():
        right = {"FoE": model.fuser(new.features).argmax(1) == new.labels}
    right["mean ensemble"] = mean_ensemble(new.outputs).argmax(1) == new.labels
    right["max confidence"] = max_confidence(new.outputs).argmax(1) == new.labels
    experts = new.outputs.argmax(2) == new.labels[:, None]
    right["best expert"] = experts[:, experts.float().mean(0).argmax()]
    for name, read in (("probabilities", lambda p: p), ("log-probabilities", lambda p: p.clamp(min=1e-6).log())):
        stacker = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
        stacker.fit(read(known.outputs.flatten(1)).numpy(), known.labels.numpy())
        predicted = stacker.predict(read(new.outputs.flatten(1)).numpy())
        right[f"stacking on {name}"] = torch.from_numpy(predicted) == new.labels
    found = {}
    for name, own in right.items():
        lead = right["FoE"].double() - own.double()
        error = 1.96 * float(lead.std()) / len(lead) ** 0.5
        found[name] = [
            float(own.double().mean()),
            float(lead.mean()),
            float(lead.mean()) - error,
            float(lead.mean()) + error,
        ]
    return found


def measure(suite: TextSuite, model: FoEModel, test: Dataset) -> Results:
    """The model beside its experts and baselines on the pooled test rows."""
    return evaluate(model, test, name=suite.name, command=f"{COMMAND} {suite.name}")


def show(values: dict) -> None:
    results = Results.from_dict(values)
    print(f"{results.tasks[0].name}: n = {results.tasks[0].n}, {results.tasks[0].metric}\n{results.text()}")
    for name in ("share_of_oracle", "names_the_task", "per_task", "seeds", "fuser", "cross_validation", "against"):
        if name in values:
            print(f"  {name}: {json.dumps(values[name])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per data set")
    parser.add_argument("--suite", choices=SUITES, default="tasks-8")
    parser.add_argument("--experts", type=Path, default=EXPERTS, help=f"default: {EXPERTS}")
    parser.add_argument("--source", default="banking77", help="the expert of features_from, in selection")
    args = parser.parse_args()
    suite = SUITES[args.suite]
    start = time.perf_counter()
    experts = load_experts([args.experts / suite.name / e.name for e in suite.experts], base=minilm_folder())
    fit, test = pooled(suite, args.data)
    if suite.mode == "selection":
        values = measure_selection(suite, experts, fit, test, args.source)
    else:
        values = measure_output(suite, experts, fit, test)
    values |= {"fit_rows": len(fit), "seed": SEEDS[0], "minutes": round((time.perf_counter() - start) / 60, 1)}
    show(values)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"foe_text_{suite.name}.json"
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
