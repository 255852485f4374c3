"""What tiny models of every kind score: recorded once, to be given by every later version.

``python tests/evaluation/golden_cells.py`` (with ``PYTHONPATH=tests``) records it again.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, Value
from tiny import TEXTS, adapter, bert, gpt2, llama, make_tokenizer, merged, t5
from tiny_fused import base_expert, bert_base, experts_of, fine_tuned
from tiny_routed import save_base, save_lora

from hf_fusion import (
    Expert,
    FoEModel,
    Gates,
    PhatgooseRouter,
    Recipe,
    RecipeExpert,
    WEMoEModel,
    evaluate,
    fit_fuser,
    fuse,
    merge,
)
from hf_fusion.evaluation.results import Results
from hf_fusion.training.adamerging import CoefficientMerge

GOLDEN = Path(__file__).parent / "golden"
ABC = ["a", "b", "c"]
WORDS = ["fox", "dog", "gate", "router", "model", "expert", "stitch", "time"]
MANY = [f"{text} {word}" for word in WORDS for text in TEXTS]
QUESTIONS = [f"name the {word}:" for word in WORDS]


def plain(results: Results) -> dict[str, Any]:
    """Cells, means and leads, as JSON holds them."""
    found: dict[str, Any] = {"cells": {}, "means": {}, "lead": {}}
    for predictor in results.predictors:
        cost = () if predictor.cost is None else (predictor.cost,)
        found["cells"][predictor.name] = {
            task: (predictor.kind, score.score, *score.ci95, *cost) for task, score in predictor.scores.items()
        }
        if not results.pooled:
            for name in ("means", "lead"):
                groups = getattr(predictor, name).items()
                found[name][predictor.name] = {group: (score.score, *score.ci95) for group, score in groups}
    if results.curve:
        points = ((point["cost_weight"], point["score"], *point["ci95"], point["cost"]) for point in results.curve)
        found["curve"] = list(points)
    if results.selection_accuracy is not None:
        found["selection_accuracy"] = results.selection_accuracy
    return json.loads(json.dumps(found))


# ---------------------------------------------------------------- Fusion of Experts


def classifiers(**config: Any) -> list[Expert]:
    labels = ["score"] if config else ABC
    return [
        Expert(f"me/{seed}", bert(labels, seed, **config), processor=make_tokenizer(), labels=labels)
        for seed in range(3)
    ]


def labelled(owned: bool = False) -> Dataset:
    rows = Dataset.from_dict({"text": MANY, "label": [ABC[number * 7 % 3] for number in range(len(MANY))]})
    return rows.add_column("expert", [number * 5 % 3 for number in range(len(MANY))]) if owned else rows


def foe_output() -> Any:
    model: Any = FoEModel.from_experts(classifiers(), costs=[1.0, 3.0, 2.0])
    fit_fuser(model, labelled(), fuser="mlp", epochs=3, frugal=True, cost_weight=32.0)
    return evaluate(model, labelled(), name="words", batch_size=5)


def foe_selection() -> Any:
    model: Any = FoEModel.from_experts(classifiers(), mode="selection", features_from=1, costs=[1.0, 3.0, 2.0])
    fit_fuser(model, labelled(owned=True), fuser="mlp", by="domain", epochs=3)
    return evaluate(model, labelled(owned=True), name="words")


def foe_regression() -> Any:
    model: Any = FoEModel.from_experts(classifiers(problem_type="regression"))
    rows = Dataset.from_dict({"text": MANY, "label": [number * 5 % 7 / 7 for number in range(len(MANY))]})
    fit_fuser(model, rows, fuser="mlp", epochs=3)
    return evaluate(model, rows, name="words")


def foe_language() -> Any:
    experts = [Expert(f"me/{seed}", llama(seed), processor=make_tokenizer()) for seed in range(2)]
    torch.manual_seed(0)
    model: Any = FoEModel.from_experts(experts, mode="selection")
    return evaluate(model, generated(llama(1)), name="words", batch_size=3)


def foe_encoder_decoder() -> Any:
    experts = [Expert(f"me/{seed}", t5(seed), processor=make_tokenizer()) for seed in range(2)]
    torch.manual_seed(0)
    model: Any = FoEModel.from_experts(experts, mode="selection")
    return evaluate(model, generated(t5(1), skipped=1), name="words")


def generated(model: Any, skipped: int | None = None) -> Dataset:
    """Prompts, and for two in three what a model answers to them."""
    targets = []
    for number, prompt in enumerate(QUESTIONS):
        tokens = make_tokenizer()(prompt, return_tensors="pt")
        with torch.no_grad():
            answer = model.generate(**tokens, max_new_tokens=64, do_sample=False)[0]
        said = make_tokenizer().decode(answer[skipped or tokens["input_ids"].shape[1] :], skip_special_tokens=True)
        targets.append(said if number % 3 else "fox")
    return Dataset.from_dict({"prompt": QUESTIONS, "target": targets})


def ensemble(rule: str) -> Any:
    model = fuse("ensemble", classifiers(), rule=rule)
    return evaluate(model, labelled(owned=True), name="words")


# ---------------------------------------------------------------- PHATGOOSE


def letters(texts: list[str]) -> torch.Tensor:
    """Embeds texts by their letters."""
    return torch.tensor([[float(text.count(letter)) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts])


def routed(base: Any, count: int, targets: list[str]) -> list[Expert]:
    experts = []
    for seed in range(count):
        lora = adapter(base, 4, None, seed, targets)
        generator = torch.Generator().manual_seed(seed)
        gates = Gates({path: torch.randn(a.shape[1], generator=generator) for path, (a, _) in lora.lora.items()})
        experts.append(Expert(f"expert-{seed}", base, lora, make_tokenizer(), gates=gates))
    return experts


def said(router: Any, expert: str | None, wrong: int) -> Dataset:
    """Prompts, and the next word of an expert; each so-many-th target is another."""
    targets = []
    for number, prompt in enumerate(QUESTIONS):
        with torch.no_grad(), router.using(expert):
            inputs = make_tokenizer()(prompt, return_tensors="pt")
            best = router.backbone(**inputs).logits[0, -1].argmax()
        targets.append(make_tokenizer().decode([int(best)]) if number % wrong else " fox")
    return Dataset.from_dict({"prompt": QUESTIONS, "target": targets})


def phatgoose_causal() -> Any:
    experts = routed(llama(), 3, ["layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"])
    router: Any = PhatgooseRouter.from_experts(experts)
    suite = {"zero": said(router, "expert-0", 3), "one": said(router, "expert-1", 4), "other": said(router, None, 2)}
    train = {expert.name: said(router, expert.name, 9) for expert in experts}
    return evaluate(
        experts,
        suite,
        train_rows=train,
        owners={"zero": "expert-0", "one": "expert-1"},
        metrics=dict.fromkeys(suite, "tokens"),
        embedder=letters,
        batch_size=3,
    )


def phatgoose_encoder_decoder() -> Any:
    experts = routed(t5(), 2, [".q", ".v", ".wo"])
    router: Any = PhatgooseRouter.from_experts(experts)
    with torch.no_grad():
        inputs = make_tokenizer()(QUESTIONS, padding=True, return_tensors="pt")
        answers = make_tokenizer().batch_decode(router.generate(**inputs, max_new_tokens=3)[:, 1:])
    suite = {"t": Dataset.from_dict({"prompt": QUESTIONS, "target": answers})}
    systems = ["base", "PHATGOOSE", "merged", "uniform"]
    return evaluate(experts, suite, train_rows={}, owners={}, predictors=systems, metrics={"t": "tokens"})


def phatgoose_classifier() -> Any:
    base = bert(["x", "y"])
    experts, suite = [], {}
    for seed, labels in enumerate((["no", "yes"], ["dog", "fox", "hen"])):
        lora = adapter(base, 4, len(labels), seed, ["query", "value"])
        vectors = {path: torch.randn(32, generator=torch.Generator().manual_seed(seed)) for path in lora.lora}
        vectors["classifier"] = torch.randn(32, generator=torch.Generator().manual_seed(seed))
        experts.append(Expert(f"expert-{seed}", base, lora, make_tokenizer(), labels, gates=Gates(vectors)))
        with torch.no_grad():
            inputs = make_tokenizer()(MANY, padding=True, return_tensors="pt")
            classes = merged(base, lora, labels)(**inputs).logits.argmax(1).tolist()
        features = Features({"text": Value("string"), "label": ClassLabel(names=labels)})
        suite[f"task-{seed}"] = Dataset.from_dict({"text": MANY, "label": classes}, features=features)
    train = {expert.name: rows for expert, rows in zip(experts, suite.values(), strict=True)}
    owners = dict(zip(suite, train, strict=True))
    return evaluate(experts, suite, train_rows=train, owners=owners, embedder=letters, batch_size=5)


# ---------------------------------------------------------------- merges


ROWS = Dataset.from_dict({"text": MANY, "label": [number * 3 % 2 for number in range(len(MANY))]})


def merging_experts(base: Any, **options: Any) -> list[Expert]:
    experts = experts_of(base, 3, scale=0.5, **options)
    for expert in experts:
        expert.processor = make_tokenizer()
    return experts


def wemoe_classifier() -> Any:
    experts = merging_experts(bert_base(), labels=["no", "yes"])
    model: Any = WEMoEModel.from_experts(experts, base=base_expert(bert_base()), scaling=0.4)
    suite = dict.fromkeys([expert.name for expert in experts[:2]], ROWS)
    return evaluate(model, suite, experts=experts, base=bert_base(), batch_size=3)


def wemoe_causal() -> Any:
    experts = merging_experts(gpt2())
    model: Any = WEMoEModel.from_experts(experts, base=base_expert(gpt2()), scaling=0.4)
    owners = {"foxes": experts[1].name}
    suite = {"foxes": generated_words(experts[1].model)}
    return evaluate(model, suite, experts=experts, base=gpt2(), owners=owners, metrics={"foxes": "tokens"})


def generated_words(model: Any) -> Dataset:
    """Prompts, and for three in four a model's next word."""
    targets = []
    for number, prompt in enumerate(QUESTIONS):
        with torch.no_grad():
            best = model(**make_tokenizer()(prompt, return_tensors="pt")).logits[0, -1].argmax()
        targets.append(make_tokenizer().decode([int(best)]) if number % 4 else " fox")
    return Dataset.from_dict({"prompt": QUESTIONS, "target": targets})


def coefficients() -> Any:
    experts = merging_experts(bert_base(), labels=["no", "yes"])
    model = CoefficientMerge(experts, bert_base(), "task", 0.2)
    return evaluate(model, {experts[0].name: ROWS}, experts=experts, base=bert_base())


def static(folder: Path) -> Any:
    """Whole models, from folders."""
    for name, model in (("base", bert_base()), *((f"e{seed}", fine_tuned(bert_base(), seed, 0.5)) for seed in (0, 1))):
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    experts = [folder / "e0", folder / "e1"]
    model = fuse("task_arithmetic", experts, folder / "base", scaling=0.5)
    suite = {"e0": ROWS, "all": ROWS.select(range(6))}
    return evaluate(model, suite, experts=experts, base=folder / "base", batch_size=3)


def static_adapters(folder: Path) -> Any:
    """Adapters, whose base is the one that they record."""
    save_base(folder / "base")
    for seed in (0, 1):
        save_lora(folder / f"e{seed}", base=str(folder / "base"), seed=seed, targets=["q_proj", "up_proj"])
    recipe = Recipe("linear", tuple(RecipeExpert(str(folder / name)) for name in ("e0", "e1")))
    merged_folder = merge(recipe, folder / "merged").folder
    suite = {"e0": generated_words(llama()), "other": generated_words(llama(3))}
    experts = [expert.model for expert in recipe.experts]
    return evaluate(merged_folder, suite, experts=experts, metrics={"e0": "tokens"})


CASES: dict[str, Callable[[Path], Any]] = {
    "foe-output": lambda folder: foe_output(),
    "foe-selection": lambda folder: foe_selection(),
    "foe-regression": lambda folder: foe_regression(),
    "foe-language": lambda folder: foe_language(),
    "foe-encoder-decoder": lambda folder: foe_encoder_decoder(),
    "ensemble-mean": lambda folder: ensemble("mean"),
    "ensemble-max": lambda folder: ensemble("max_model"),
    "phatgoose-causal": lambda folder: phatgoose_causal(),
    "phatgoose-encoder-decoder": lambda folder: phatgoose_encoder_decoder(),
    "phatgoose-classifier": lambda folder: phatgoose_classifier(),
    "wemoe-classifier": lambda folder: wemoe_classifier(),
    "wemoe-causal": lambda folder: wemoe_causal(),
    "coefficients": lambda folder: coefficients(),
    "static": static,
    "static-adapters": static_adapters,
}

if __name__ == "__main__":
    into = Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN
    for name, measure in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            (into / f"{name}.json").write_text(json.dumps(plain(measure(Path(folder)))) + "\n")
