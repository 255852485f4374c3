"""The demo of WEMoE: fine-tunes of one small ViT, whose weights are merged per image."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.assets.weights import demo_weights
from hf_fusion.demo.digit_tasks import BASE, TASKS, task_rows
from hf_fusion.demo.digits import digit_expert
from hf_fusion.demo.workspace import (
    OWNER,
    Workspace,
    hub_commands,
    publish_to,
    relative_path,
    report_push,
    run_in_fresh_process,
    show_hub,
    show_next,
)
from hf_fusion.types import ModelRef

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_fusion.cli.output import Out
    from hf_fusion.evaluation.merging import TaskModel
    from hf_fusion.evaluation.results import Results
    from hf_fusion.hub.compat import Compatibility
    from hf_fusion.hub.load import ExpertLike
    from hf_fusion.models.modeling_wemoe import WEMoEModel
    from hf_fusion.types import Expert

STEPS = 9
NAME, MERGED = "wemoe-digits", "merged"
TAG = "digit-tasks"
FINE_TUNES = {task: f"{BASE}-{task}" for task in TASKS}
ELSEWHERE, OTHER_BASE = f"{BASE}-elsewhere", "vit-letters"
SMALLER, OTHER = f"{BASE}-smaller", "vit-mnist-low"  # a ViT as well, of other sizes
ADAPTED, TESTED = 600, 400  # pictures of each task
ADAPT_STEPS, LEARNING_RATE = 200, 1e-3  # more than by default: the experts of so small a ViT are far from their base
UNADAPTED, STATIC = "WEMoE, not adapted", "AdaMerging by layer"
ASKED = 4  # pictures of each task that a stranger is asked about


def run(workspace: Workspace, out: Out, seed: int = 0) -> dict[str, Any]:
    """Push experts, discover, fuse, adapt, evaluate and publish; then run the model in a fresh process.

    Args:
        workspace: folder and Hub.
        out: output of the command.
        seed: of the order of training images.

    Returns:
        A summary: repo, folder and results.
    """
    with out.step(1, STEPS, f"A Hub at {workspace.endpoint}"):
        show_hub(workspace, out)

    with out.step(2, STEPS, "Push a small ViT, its fine-tunes, and two incompatible copies"):
        for name, folder in _folders(workspace).items():
            report_push(workspace.push(name, folder), workspace.repo(name), out)

    with out.step(3, STEPS, "Discover them by their tags, and check which can be merged"):
        verdict = _discover(workspace)
        _show_verdict(verdict, out)

    with out.step(4, STEPS, "Fuse: every MLP keeps the base's weights and gets four task vectors"):
        from hf_fusion.fusion import fuse

        experts = [info.pinned for info in verdict.accepted]
        model = fuse("wemoe", experts, base=workspace.repo(BASE), api=workspace.api)
        base = str(ModelRef(**model.config.base))
        facts = model.summary()
        out.log(
            f"      {facts['upscaled_linears']} linear layers, merged by routers with {facts['trainable']:,} parameters"
        )

    with out.step(5, STEPS, f"Adapt its routers on {ADAPTED} pictures of each task, without labels"):
        from hf_fusion.hub.load import load_experts

        loaded, start = load_experts(experts, api=workspace.api), load_experts([base], api=workspace.api)[0].model
        more = _adapt(workspace, model, loaded, start, out, seed)

    with out.step(6, STEPS, "Evaluate"):
        results, merged = _measure(workspace, model, loaded, start, more)
        out.table(_scores(results), title=f"Correct answers in % on {TESTED} pictures of each task", human_only=True)
        leads = [f"{results[name].lead['held-in']} points over {name}" for name in ("task arithmetic", STATIC)]
        out.log(f"      WEMoE's lead with its 95 % interval: {', '.join(leads)}")

    with out.step(7, STEPS, f"Publish as {workspace.repo(NAME)}"):
        published = publish_to(workspace, merged, NAME, out)

    with out.step(8, STEPS, "Run it in a fresh process without hf_fusion and peft"):
        identical = _compare_with_fresh_process(workspace, model, published.repo_id, published.sha, out)

    summary = {
        "model": published.repo_id,
        "revision": published.sha,
        "folder": str(merged),
        "picture": str(merged / "coefficients.png"),
        "identical": identical,
    }
    with out.step(9, STEPS, "Results, and commands to run next"):
        _show_next(workspace, merged, out)
    return summary | {
        "rejected": {entry.info.id: "; ".join(map(str, entry.reasons)) for entry in verdict.rejected},
        "measured": {predictor.name: predictor.means["held-in"].score for predictor in results.predictors},
    }


def _folders(workspace: Workspace) -> dict[str, Path]:
    """What is pushed: the base, its fine-tunes, a copy that says it is of another base, and one whose card is wrong."""
    made = workspace.folder / "fine-tunes"
    shutil.rmtree(made, ignore_errors=True)
    experts = demo_weights("vit_experts")
    shutil.copytree(experts, made)
    shutil.copytree(experts / FINE_TUNES["digit"], made / ELSEWHERE)
    shutil.copytree(digit_expert(OTHER), made / SMALLER)
    names = [BASE, *FINE_TUNES.values(), ELSEWHERE, SMALLER]
    for name in names:
        card = made / name / "README.md"
        base = workspace.repo(OTHER_BASE if name == ELSEWHERE else BASE)
        text = card.read_text(encoding="utf-8").replace(f"{OWNER}/{BASE}", base)
        if name == SMALLER:
            text = text.replace("---\n", f"---\nbase_model: {base}\n", 1).replace("- digits\n", f"- {TAG}\n")
        card.write_text(text, encoding="utf-8")
    return {name: made / name for name in names}


def _discover(workspace: Workspace) -> Compatibility:
    """Discovers repos by their tags and checks whether they can be merged with the base."""
    from hf_fusion.hub.compat import check_compatibility
    from hf_fusion.hub.discover import EXPERT_TAG, discover

    found = discover(tags=(EXPERT_TAG, TAG), author=workspace.namespace, api=workspace.anyone)
    judged = sorted(found, key=lambda info: info.id)
    return check_compatibility(judged, base_model=workspace.repo(BASE), merging=True, api=workspace.anyone)


def _show_verdict(verdict: Compatibility, out: Out) -> None:
    """Print two tables: accepted experts, and rejected ones with reasons."""
    accepted = [
        {"fine-tune": info.id, "commit": info.sha[:7], "classes": len(info.labels), "MB": round(info.size / 1e6, 2)}
        for info in verdict.accepted
    ]
    rejected = [{"rejected": entry.info.id, "reason": "; ".join(map(str, entry.reasons))} for entry in verdict.rejected]
    out.table(accepted, title=f"{len(accepted)} can be merged, by their configs and headers", human_only=True)
    out.table(rejected, title=f"{len(rejected)} cannot", human_only=True)


def _adapt(
    workspace: Workspace, model: WEMoEModel, experts: list[Expert], base: ExpertLike, out: Out, seed: int
) -> list[TaskModel]:
    """Adapts the routers; returns what they are compared with: themselves before, and one merge, adapted as well."""
    from hf_fusion.evaluation.merging import TaskModel
    from hf_fusion.training.adamerging import CoefficientMerge
    from hf_fusion.training.routers import adapt_routers

    unlabelled = {
        workspace.repo(FINE_TUNES[task]): own.remove_columns("label") for task, own in _rows(workspace, "train").items()
    }
    before = copy.deepcopy(model)
    static = CoefficientMerge(experts, base)
    for name, adapted, rate in (("WEMoE", model, LEARNING_RATE), (STATIC, static, None)):
        facts = adapt_routers(
            adapted, unlabelled, experts=experts, base=base, steps=ADAPT_STEPS, learning_rate=rate, seed=seed
        )
        sure = [sum(task.confidence for task in own.values()) / len(own) for own in (facts.before, facts.after)]
        out.log(f"      {name}: {facts.steps} steps, mean confidence {sure[0]:.2f} → {sure[1]:.2f}")
    return [TaskModel(UNADAPTED, before), TaskModel(STATIC, static)]


def _rows(workspace: Workspace, split: str) -> dict[str, Dataset]:
    """Task → its pictures; kept as parquet for the commands that are printed at the end."""
    from datasets import concatenate_datasets

    suite = {
        task: task_rows(task, "test", TESTED) if split == "test" else task_rows(task, "adapt", ADAPTED)
        for task in TASKS
    }
    file = workspace.folder / "pictures" / f"{split}.parquet"
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        parts = []
        for task, rows in suite.items():
            names = [TASKS[task].labels[label] for label in rows["label"]]
            own = rows.remove_columns("label")
            own = own.add_column("label", names) if split == "test" else own
            parts.append(own.add_column("task", [task] * len(own)).add_column("expert", [FINE_TUNES[task]] * len(own)))
        concatenate_datasets(parts).to_parquet(file)
    return suite


def _measure(
    workspace: Workspace, model: WEMoEModel, experts: list[Expert], base: ExpertLike, more: list[TaskModel]
) -> tuple[Results, Path]:
    """Returns the results, and the folder with them and the model."""
    from hf_fusion.evaluation.coefficient_map import COEFFICIENT_FILE, COEFFICIENT_PICTURE, map_coefficients
    from hf_fusion.evaluation.evaluate import evaluate
    from hf_fusion.evaluation.plots import plot_coefficients
    from hf_fusion.evaluation.results import RESULTS_FILE
    from hf_fusion.fusion import save_fused

    suite, owners = _rows(workspace, "test"), {task: workspace.repo(name) for task, name in FINE_TUNES.items()}
    results = evaluate(
        model, suite, experts=experts, base=base, owners=owners, more=more, command="hf-fusion demo wemoe"
    )
    coefficients = map_coefficients(model, suite, owners=owners)
    merged = save_fused(model, workspace.folder / MERGED, overwrite=True)
    results.save(merged / RESULTS_FILE)
    coefficients.save(merged / COEFFICIENT_FILE)
    plot_coefficients(coefficients, merged / COEFFICIENT_PICTURE)
    return results, merged


def _scores(results: Results) -> list[dict[str, str]]:
    """One line per predictor: its mean over the tasks, and each task."""
    return [
        {"predictor": predictor.name, "mean (95 %)": str(predictor.means["held-in"])}
        | {task: f"{100 * score.score:.0f}" for task, score in predictor.scores.items()}
        for predictor in results.predictors
    ]


def _compare_with_fresh_process(workspace: Workspace, model: WEMoEModel, repo: str, revision: str, out: Out) -> bool:
    """Whether a fresh process gets bit for bit the logits of the model in memory, and classifies as it does."""
    import torch
    from safetensors.torch import load_file

    folder = workspace.folder / "asked"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    suite = {task: rows.select(range(ASKED)) for task, rows in _rows(workspace, "test").items()}
    names = {workspace.repo(FINE_TUNES[task]): [f"{task}-{i}.png" for i in range(ASKED)] for task in suite}
    for task, rows in suite.items():
        for number, image in enumerate(rows["image"]):
            image.save(folder / f"{task}-{number}.png")
    (folder / "tasks.json").write_text(json.dumps(names))
    answers = iter(run_in_fresh_process(workspace, repo, revision, folder)["answers"])
    logits = load_file(folder / "logits.safetensors")
    same = {"logits": True, "answers": True}
    for (task, rows), expert in zip(suite.items(), names, strict=True):
        with torch.no_grad():
            inputs = model.processor(images=list(rows["image"]), return_tensors="pt")
            here = model(**inputs, task=expert).logits
        labels = model.config.experts[model.experts.index(expert)]["labels"]
        said = [answer["label"] for answer in (next(answers) for _ in range(ASKED))]
        same["logits"] &= torch.equal(here, logits[expert])
        same["answers"] &= said == [labels[chosen] for chosen in here.argmax(-1).tolist()]
        right = [labels[label] for label in rows["label"]]
        out.log(f"      {TASKS[task].question:28} {', '.join(said)}  (correct: {', '.join(right)})")
    for what, identical in zip(
        ("AutoModelForImageClassification.from_pretrained: logits", 'pipeline("image-classification"): answers'),
        same.values(),
        strict=True,
    ):
        out.log(f"      {what:56} {'identical' if identical else 'DIFFERENT'}")
    return all(same.values())


def _show_next(workspace: Workspace, merged: Path, out: Out) -> None:
    """Prints the folders, and commands to try."""
    repo, pictures = workspace.repo(NAME), relative_path(workspace.folder / "pictures")
    picture = relative_path(workspace.folder / "asked" / "turned-0.png")
    task = workspace.repo(FINE_TUNES["turned"])
    files = {
        relative_path(merged): "base, task vectors and routers, the recipe, results.json and coefficients.png",
        pictures: "the pictures for adaptation (train, without labels) and evaluation (test)",
    }
    commands = [
        *hub_commands(workspace),
        f"hf-fusion discover --author {workspace.namespace} --base-model {workspace.repo(BASE)} --check --merging",
        f"hf-fusion fit routers {relative_path(merged)} --data {pictures} --steps 20 --overwrite",
        f"hf-fusion eval {relative_path(merged)} --data {pictures}",
        f'python -c \'from transformers import pipeline; ask = pipeline("image-classification", model="{repo}", '
        f'trust_remote_code=True); ask.model.task = "{task}"; print(ask("{picture}", top_k=1))\'',
    ]
    show_next(workspace, out, files, commands)
