"""The demo of PHATGOOSE: adapters of SmolLM2 for small tasks, among which each token is routed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.assets.language_tasks import CHAT, TASKS, rows
from hf_fusion.assets.smollm2 import SMOLLM2, smollm2_folder
from hf_fusion.assets.weights import demo_weights
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

if TYPE_CHECKING:
    from hf_fusion.cli.output import Out
    from hf_fusion.evaluation.results import Results
    from hf_fusion.evaluation.routing_map import RoutingMap
    from hf_fusion.hub.compat import Compatibility
    from hf_fusion.models.modeling_phatgoose import PhatgooseForGeneration

STEPS = 8
NAME, FOLDER = "phatgoose-smollm2", "router"
WITH_GATES = ("word-sorting", "word-reversal", "number-sorting", "number-range")
WITHOUT_GATES = "chain-sum"  # gets them on the way
ELSEWHERE, OTHER_BASE = "word-sorting-360m", "HuggingFaceTB/SmolLM2-360M-Instruct"
BASE_CARD = "---\nlicense: apache-2.0\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n"
GATE_ROWS = 256  # as those of the other experts
PREDICTORS = ("base", "PHATGOOSE", "merged", "experts", "oracle")
TESTED = 40  # rows of each task
QUESTIONS = (
    "Write from last to first: red, green, blue",
    "Which numbers are the extremes? 88, 14, 52, 61",
    "What is 27 + 15?",
)
ANSWER_TOKENS = 16


def run(workspace: Workspace, out: Out, seed: int = 0) -> dict[str, Any]:
    """Push experts, discover, add gates, fuse, evaluate and publish; then run the model in a fresh process.

    Args:
        workspace: folder and Hub.
        out: output of the command.
        seed: of the order of training rows.

    Returns:
        A summary: repo, folder and results.
    """
    with out.step(1, STEPS, f"A Hub at {workspace.endpoint}"):
        show_hub(workspace, out)

    with out.step(2, STEPS, "Push SmolLM2, and adapters that each learned one task"):
        _push_all(workspace, out)

    with out.step(3, STEPS, "Discover them by their tags, and check compatibility"):
        verdict = _discover(workspace)
        _show_verdict(verdict, out)

    with out.step(4, STEPS, f"Train gates for {WITHOUT_GATES}, and push them to its repo"):
        _add_gates(workspace, verdict, out, seed)

    with out.step(5, STEPS, "Fuse and evaluate"):
        model, results, routing, fused = _fuse_and_measure(workspace, out)
        count = len(results.tasks)
        out.table(
            _scores(results), title=f"Correct answers in % on {count} tasks of {TESTED} questions each", human_only=True
        )
        for line in _comparison(results, routing):
            out.log(f"      {line}")

    with out.step(6, STEPS, f"Publish as {workspace.repo(NAME)}"):
        published = publish_to(workspace, fused, NAME, out)

    with out.step(7, STEPS, "Run it in a fresh process without hf_fusion and peft"):
        identical = _compare_with_fresh_process(workspace, model, published.repo_id, published.sha, out)
        out.table(
            _answer_table(model),
            title="Routing weight of each expert by token of the first answer, in %",
            human_only=True,
        )

    summary = {
        "model": published.repo_id,
        "revision": published.sha,
        "folder": str(fused),
        "picture": str(fused / "routing.png"),
        "identical": identical,
    }
    with out.step(8, STEPS, "Results, and commands to run next"):
        _show_next(workspace, fused, out)
    return summary | {
        "rejected": {entry.info.id: "; ".join(map(str, entry.reasons)) for entry in verdict.rejected},
        "measured": {predictor.name: predictor.means["held-in"].score for predictor in results.predictors},
        "routed_to_owner": routing.owner_weight(),
    }


def _push_all(workspace: Workspace, out: Out) -> None:
    """The base under its own id, adapters with gates, one without, and one that says it is of another base."""
    if workspace.embedded:  # the real Hub has it
        report_push(push_base(workspace), SMOLLM2, out)
    for name in WITH_GATES:
        report_push(workspace.push(name, demo_weights(f"smollm2_experts/{name}")), workspace.repo(name), out)
    for name, folder in _misfits(workspace.folder / "misfits").items():
        # What an earlier run pushed has gates by now: it stays.
        known = workspace.api.repo_exists(workspace.repo(name))
        report_push(not known and workspace.push(name, folder), workspace.repo(name), out)


def push_base(workspace: Workspace) -> bool:
    """SmolLM2 as its owner would push it."""
    from huggingface_hub import HfApi

    from hf_fusion.server import add_user

    owner, _, name = SMOLLM2.partition("/")
    theirs = HfApi(endpoint=workspace.endpoint, token=add_user(workspace.folder / "hub", owner))
    new = replace(workspace, namespace=owner, api=theirs).push(name, smollm2_folder())
    theirs.upload_file(repo_id=SMOLLM2, path_in_repo="README.md", path_or_fileobj=BASE_CARD.encode())
    return new


def _misfits(folder: Path) -> dict[str, Path]:
    """Two copies of adapters: one without its gates, one that says it is of another base."""
    from hf_fusion.hub.gates_file import GATES_FILE, GATES_TAG

    experts = demo_weights("smollm2_experts")
    made = {WITHOUT_GATES: folder / WITHOUT_GATES, ELSEWHERE: folder / ELSEWHERE}
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(experts / WITHOUT_GATES, made[WITHOUT_GATES], ignore=shutil.ignore_patterns(GATES_FILE))
    card = made[WITHOUT_GATES] / "README.md"
    kept = [line for line in card.read_text(encoding="utf-8").splitlines() if GATES_TAG not in line.replace("_", "-")]
    card.write_text("\n".join(kept) + "\n", encoding="utf-8")
    shutil.copytree(experts / WITH_GATES[0], made[ELSEWHERE])
    for file in ("README.md", "adapter_config.json"):
        text = (made[ELSEWHERE] / file).read_text(encoding="utf-8")
        (made[ELSEWHERE] / file).write_text(text.replace(SMOLLM2, OTHER_BASE), encoding="utf-8")
    return made


def _discover(workspace: Workspace, *tags: str) -> Compatibility:
    """Discovers repos by their tags and checks whether they can be routed among as adapters of SmolLM2."""
    from hf_fusion.hub.compat import check_compatibility
    from hf_fusion.hub.discover import EXPERT_TAG, discover

    found = discover(tags=(EXPERT_TAG, "lora", *tags), author=workspace.namespace, api=workspace.anyone)
    judged = sorted(found, key=lambda info: info.id)
    return check_compatibility(judged, base_model=SMOLLM2, need_gates=True, api=workspace.anyone)


def _show_verdict(verdict: Compatibility, out: Out) -> None:
    """Print two tables: accepted experts, and rejected ones with reasons."""
    accepted = [
        {"adapter": info.id, "commit": info.sha[:7], "license": info.license, "MB": round(info.size / 1e6, 2)}
        for info in verdict.accepted
    ]
    rejected = [{"rejected": entry.info.id, "reason": "; ".join(map(str, entry.reasons))} for entry in verdict.rejected]
    out.table(
        accepted, title=f"{len(accepted)} are compatible and have gates, by their configs and headers", human_only=True
    )
    out.table(rejected, title=f"{len(rejected)} are not, or have none", human_only=True)


def _add_gates(workspace: Workspace, verdict: Compatibility, out: Out, seed: int) -> None:
    """Trains and pushes the gates that are missing, unless an earlier run has done so."""
    from hf_fusion.hub.load import load_experts
    from hf_fusion.publishing.push_gates import push_gates
    from hf_fusion.training.gates import train_gates

    lacking = next((entry.info for entry in verdict.rejected if entry.info.id == workspace.repo(WITHOUT_GATES)), None)
    if lacking is None:
        out.log("      already there")
        return
    (expert,) = load_experts([lacking], api=workspace.api)
    gates = train_gates(expert, rows(WITHOUT_GATES, "train", GATE_ROWS), seed=seed)
    pushed = push_gates(gates, lacking.id, api=workspace.api)
    out.log(f"      {len(gates.gaussians)} gates from {gates.facts['examples']:.0f} rows of {WITHOUT_GATES}")
    out.log(f"      {pushed.repo_id} at {pushed.sha[:12]}")


def _fuse_and_measure(workspace: Workspace, out: Out) -> tuple[Any, Results, RoutingMap, Path]:
    """Returns the router, its results, and the folder with both."""
    from datasets import concatenate_datasets

    from hf_fusion.evaluation.evaluate import evaluate
    from hf_fusion.evaluation.plots import plot_routing
    from hf_fusion.evaluation.results import RESULTS_FILE
    from hf_fusion.evaluation.routing_map import ROUTING_FILE, ROUTING_PICTURE, map_routing
    from hf_fusion.fusion import fuse, save_fused
    from hf_fusion.hub.gates_file import GATES_TAG
    from hf_fusion.hub.load import load_experts

    experts = load_experts(_discover(workspace, GATES_TAG).accepted, api=workspace.api)
    model = fuse("phatgoose", experts, base_by_reference=True)
    cost = model.summary()["relative_cost"]
    out.log(
        f"      {len(experts)} experts; in the layers with experts, a token costs {cost:.2f} × the base's arithmetic"
    )
    tasks = (*WITH_GATES, WITHOUT_GATES)
    suite = {task: rows(task, "test", TESTED) for task in tasks}
    owners = {task: workspace.repo(task) for task in tasks}
    results = evaluate(
        experts,
        suite,
        owners=owners,
        predictors=PREDICTORS,
        metrics={task: TASKS[task].metric for task in tasks},
        command="hf-fusion demo phatgoose",
    )
    routing = map_routing(model, suite, owners=owners)
    fused = save_fused(model, workspace.folder / FOLDER, overwrite=True)
    results.save(fused / RESULTS_FILE)
    routing.save(fused / ROUTING_FILE)
    plot_routing(routing, fused / ROUTING_PICTURE)
    questions = workspace.folder / "questions"
    questions.mkdir(exist_ok=True)
    owned = [own.add_column("expert", [owners[task]] * len(own)) for task, own in suite.items()]
    concatenate_datasets(owned).to_parquet(questions / "test.parquet")
    return model, results, routing, fused


def _scores(results: Results) -> list[dict[str, str]]:
    """One line per predictor: its mean over the tasks, and each task."""
    return [
        {"predictor": predictor.name.rpartition("/")[2], "mean (95 %)": str(predictor.means["held-in"])}
        | {task: f"{100 * score.score:.0f}" for task, score in predictor.scores.items()}
        for predictor in results.predictors
    ]


def _comparison(results: Results, routing: RoutingMap) -> list[str]:
    """The comparison in words."""
    leads = [f"{results[name].lead['held-in']} points over {name}" for name in ("base", "merged")]
    lines = [f"PHATGOOSE's lead with its 95 % interval: {', '.join(leads)}"]
    if (own := routing.owner_weight()) is not None:
        lines.append(
            f"{own:.0%} of the routing weight goes to the task's expert; at random it would be "
            f"{1 / len(routing.experts):.0%}"
        )
    return lines


def _prompt(model: PhatgooseForGeneration, question: str) -> Any:
    return model.processor(CHAT.format(question), return_tensors="pt").to(model.device)


def _compare_with_fresh_process(
    workspace: Workspace, model: PhatgooseForGeneration, repo: str, revision: str, out: Out
) -> bool:
    """Whether a fresh process gets bit for bit the logits of the model in memory, and the same answers."""
    import torch
    from safetensors.torch import load_file

    folder = workspace.folder / "asked"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    prompts = [CHAT.format(question) for question in QUESTIONS]
    (folder / "prompts.json").write_text(json.dumps({"prompts": prompts, "max_new_tokens": ANSWER_TOKENS}))
    answers = run_in_fresh_process(workspace, repo, revision, folder)["answers"]
    logits = load_file(folder / "logits.safetensors")
    same = {"logits": True, "answers": True}
    for number, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True)):
        inputs = _prompt(model, question)
        with torch.no_grad():
            here = model(**inputs).logits
        written = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)[0, here.shape[1] :]
        same["logits"] &= torch.equal(here, logits[str(number)])
        same["answers"] &= model.processor.decode(written, skip_special_tokens=True) == answer
        out.log(f"      {question}  →  {answer}")
    for what, identical in same.items():
        out.log(
            f"      {f'AutoModelForCausalLM.from_pretrained: {what}':56} {'identical' if identical else 'DIFFERENT'}"
        )
    return all(same.values())


def _answer_table(model: PhatgooseForGeneration) -> list[dict[str, Any]]:
    """For each token of the first question's answer: the weights at the token before it, where it was made."""
    inputs = _prompt(model, QUESTIONS[0])
    length = inputs["input_ids"].shape[1]
    model.record_routing = 4096
    written = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)[0, length:]
    weights = model.routing_trace().mean_weights()[0, length - 1 :]  # (T, E)
    model.record_routing = 0
    names = [name.rpartition("/")[2] for name in model.experts]
    return [
        {"token": model.processor.decode(token)} | {n: round(100 * w) for n, w in zip(names, row.tolist(), strict=True)}
        for token, row in zip(written, weights, strict=False)
    ]


def _show_next(workspace: Workspace, fused: Path, out: Out) -> None:
    """Prints the folders, and commands to try."""
    repo, questions = workspace.repo(NAME), relative_path(workspace.folder / "questions")
    files = {
        relative_path(fused): "the experts with their gates, the recipe, results.json and routing.png",
        questions: "the questions that it was evaluated on (test)",
    }
    owner = workspace.namespace
    commands = [
        *hub_commands(workspace),
        f"hf-fusion discover --author {owner} --tag phatgoose-gates --base-model {SMOLLM2} --check --gates",
        f"hf-fusion eval {relative_path(fused)} --data {questions}",
        f'python -c \'from transformers import pipeline; ask = pipeline("text-generation", model="{repo}", '
        f'trust_remote_code=True); print(ask([{{"role": "user", "content": "{QUESTIONS[0]}"}}], max_new_tokens=16))\'',
    ]
    show_next(workspace, out, files, commands)
