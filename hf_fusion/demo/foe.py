"""The demo of Fusion of Experts: handwritten digits, and experts that each know some of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.demo.digits import DIGITS, EXPERTS, LABEL_MAPS, digit_expert, digits, misfits
from hf_fusion.demo.workspace import (
    Workspace,
    hub_commands,
    publish_to,
    relative_path,
    report_push,
    run_in_fresh_process,
    show_hub,
    show_next,
)
from hf_fusion.errors import FusionError
from hf_fusion.extras import refuse_missing

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_fusion.cli.output import Out
    from hf_fusion.evaluation.results import Results
    from hf_fusion.hub.compat import Compatibility
    from hf_fusion.models.modeling_foe import FoEModel
    from hf_fusion.types import Expert

STEPS = 7
TASK = "image-classification"
NAME = "foe-digits"
DATA = "MNIST and scanned digits"
PICTURE = "accuracy-cost.png"
FRESH_IMAGES = 16  # images for the fresh process
RIVALS = ("mean ensemble", "max confidence")


def run(workspace: Workspace, out: Out, seed: int = 0) -> dict[str, Any]:
    """Push experts, discover, fuse, fit, evaluate and publish; then load the model in a fresh process.

    Args:
        workspace: folder and Hub.
        out: output of the command.
        seed: of the fuser's initialisation.

    Returns:
        A summary: repo, folder and results.
    """
    with out.step(1, STEPS, f"A Hub at {workspace.endpoint}"):
        show_hub(workspace, out)

    with out.step(2, STEPS, "Push compatible experts, and some incompatible ones"):
        for name in EXPERTS:
            report_push(workspace.push(name, digit_expert(name)), workspace.repo(name), out)
        for misfit in misfits(workspace.folder / "misfits"):
            report_push(workspace.push(misfit.name, misfit.folder, misfit.settings), workspace.repo(misfit.name), out)

    with out.step(3, STEPS, "Discover them by their tag, and check compatibility"):
        verdict = _discover(workspace)
        _show_verdict(verdict, out)

    with out.step(4, STEPS, "Fuse, fit and evaluate"):
        model, results, fused = _fuse_fit_measure(workspace, verdict, out, seed)
        out.table(results.table(), title=f"Accuracy on {results.tasks[0].n:,} held-out images", human_only=True)
        for line in _comparison(results):
            out.log(f"      {line}")

    with out.step(5, STEPS, f"Publish as {workspace.repo(NAME)}"):
        published = publish_to(workspace, fused, NAME, out)

    with out.step(6, STEPS, "Load it in a fresh process without hf_fusion"):
        identical = _compare_with_fresh_process(workspace, model, published.repo_id, published.sha, out)

    summary = {
        "model": published.repo_id,
        "revision": published.sha,
        "folder": str(fused),
        "plot": str(fused / PICTURE),
        "identical": identical,
    }
    with out.step(7, STEPS, "Results, and commands to run next"):
        _show_next(workspace, fused, out)
    return summary | {
        "rejected": {entry.info.id: "; ".join(map(str, entry.reasons)) for entry in verdict.rejected},
        "measured": {p.name: {"accuracy": p.only_score.score, "cost": p.cost} for p in results.predictors},
    }


def _discover(workspace: Workspace) -> Compatibility:
    """Discover experts without a token, and check their compatibility over the ten digits."""
    from hf_fusion.hub.compat import check_compatibility
    from hf_fusion.hub.discover import discover

    found = sorted(discover(author=workspace.namespace, api=workspace.anyone), key=lambda info: info.id)
    labels = {*DIGITS, *(label for mapping in LABEL_MAPS.values() for label in mapping)}
    return check_compatibility(found, task=TASK, labels=labels, api=workspace.anyone)


def _show_verdict(verdict: Compatibility, out: Out) -> None:
    """Print two tables: accepted experts, and rejected ones with reasons."""
    accepted = [
        {
            "expert": info.id,
            "architecture": (info.architecture or "").removesuffix("ForImageClassification"),
            "labels": info.labels,
            "license": info.license,
            "MB": round(info.size / 1e6, 2),
        }
        for info in verdict.accepted
    ]
    rejected = [{"rejected": entry.info.id, "reason": "; ".join(map(str, entry.reasons))} for entry in verdict.rejected]
    out.table(
        accepted,
        title=f"{len(accepted)} are compatible, by their configs and the headers of their weights",
        human_only=True,
    )
    out.table(rejected, title=f"{len(rejected)} are not", human_only=True)


def _fuse_fit_measure(
    workspace: Workspace, verdict: Compatibility, out: Out, seed: int
) -> tuple[FoEModel, Results, Path]:
    """The fitted model, its results, and the folder of both."""
    from hf_fusion.evaluation.evaluate import evaluate
    from hf_fusion.evaluation.plots import plot_accuracy_cost
    from hf_fusion.evaluation.results import RESULTS_FILE
    from hf_fusion.fusion import fuse, save_fused
    from hf_fusion.training.fuser import fit_fuser

    maps = {workspace.repo(name): mapping for name, mapping in LABEL_MAPS.items()}
    experts = _load(workspace, verdict, out)
    model = fuse("foe", experts, label_maps=maps, labels=list(DIGITS))
    out.log(f"      fused {len(experts)} experts, {model.num_parameters() / 1e6:.1f} million parameters")
    train, test = _rows(workspace, "train"), _rows(workspace, "test")
    out.log(f"      running them on {len(train):,} images for fitting and {len(test):,} for evaluation …")
    fit = fit_fuser(model, train, frugal=True, seed=seed)
    out.log(
        f"      fitted on {fit.train_rows:,} images that no expert saw; cross-validation chose the fuser {fit.fuser!r}"
    )
    results = evaluate(model, test, name=DATA, command="hf-fusion demo")
    fused = save_fused(model, workspace.folder / NAME, overwrite=True)
    results.save(fused / RESULTS_FILE)
    plot_accuracy_cost(results, fused / PICTURE)
    return model, results, fused


def _load(workspace: Workspace, verdict: Compatibility, out: Out) -> list[Expert]:
    """The accepted experts, but for those that turn out to be broken once their weights are read."""
    from hf_fusion.hub.load import load_experts

    experts = []
    for info in verdict.accepted:
        try:
            experts += load_experts([info], api=workspace.api)
        except FusionError as error:
            refuse_missing(error, "the demo", extra="demo")
            out.log(f"      left out: {error.message}")
    return experts


def _rows(workspace: Workspace, split: str) -> Dataset:
    """The images to fit on ("train") or to evaluate on ("test"), saved for the commands that are printed at the end."""
    from hf_fusion.data import load_rows

    folder = workspace.folder / "data"
    if not (folder / "test.parquet").is_file():
        folder.mkdir(exist_ok=True)
        rows = digits()
        rows["fit"].to_parquet(folder / "train.parquet")
        rows["test"].to_parquet(folder / "test.parquet")
    return load_rows(folder, split)


def _comparison(results: Results) -> list[str]:
    """The comparison in words."""
    against = {"the best expert": results.best("expert"), **{f"the {name}": results[name] for name in RIVALS}}
    foe, frugal = results.best("fused").only_score.score, results.best("frugal")
    gains = [f"{100 * (foe - other.only_score.score):+.1f} points over {name}" for name, other in against.items()]
    return [
        f"FoE {foe:.1%}: {', '.join(gains)}",
        f"frugal {frugal.only_score.score:.1%} at {frugal.cost:.0%} of the cost",
    ]


def _compare_with_fresh_process(workspace: Workspace, model: FoEModel, repo: str, revision: str, out: Out) -> bool:
    """Whether a fresh process gets bit for bit the logits of the model in memory, and the same from a pipeline."""
    import torch
    from safetensors.torch import load_file

    folder = workspace.folder / "asked"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    images = [row.convert("RGB") for row in _rows(workspace, "test").select(range(FRESH_IMAGES))["image"]]
    for number, image in enumerate(images):
        image.save(folder / f"{number:02}.png")
    with torch.no_grad():
        here = model(**model.processor(images=images)).logits
    answers = run_in_fresh_process(workspace, repo, revision, folder)["answers"]

    top = here.softmax(-1).max(-1)
    same = {
        f"{name}.from_pretrained: logits": torch.equal(here, logits)
        for name, logits in load_file(folder / "logits.safetensors").items()
    }
    names: dict[Any, str] = model.config.id2label or {}
    same["pipeline: labels"] = [answer["label"] for answer in answers] == [
        names[index] for index in top.indices.tolist()
    ]
    # One image at a time takes other paths through the processor than a batch: the last bits may differ.
    same["pipeline: scores to 1e-5"] = torch.allclose(
        top.values, torch.tensor([answer["score"] for answer in answers]), rtol=0, atol=1e-5
    )
    for what, identical in same.items():
        out.log(f"      {what:56} {'identical' if identical else 'DIFFERENT'}")
    return all(same.values())


def _show_next(workspace: Workspace, fused: Path, out: Out) -> None:
    """Prints the folders, and commands to try."""
    repo, data, asked = (
        workspace.repo(NAME),
        relative_path(workspace.folder / "data"),
        relative_path(workspace.folder / "asked"),
    )
    files = {
        relative_path(fused): f"the model, its recipe, results.json and {PICTURE}",
        data: "the images that it was fitted on (train) and evaluated on (test)",
    }
    commands = [
        f"hf-fusion eval {relative_path(fused)} --data {data}",
        *hub_commands(workspace),
        f"hf-fusion discover --author {workspace.namespace} --check",
        f'python -c \'from transformers import pipeline; classify = pipeline("{TASK}", model="{repo}", '
        f'trust_remote_code=True); print(classify("{asked}/00.png", top_k=2))\'',
    ]
    show_next(workspace, out, files, commands)
