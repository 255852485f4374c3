"""The whole way once with PHATGOOSE: adapters of SmolLM2 that each learned one small task, and every token routed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.assets.language_tasks import CHAT, TASKS, rows
from hf_fusion.assets.smollm2 import SMOLLM2, reference_rows, smollm2_folder
from hf_fusion.assets.weights import demo_weights
from hf_fusion.demo.place import Place, ask_a_stranger, hub_lines, near, publish_to, report_push, show_hub, show_next

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
GATE_STEPS, GATE_BATCH = 50, 8  # as those of the other experts
PREDICTORS = ("base", "PHATGOOSE", "merged", "experts", "oracle")
TESTED = 40  # rows of each task
QUESTIONS = (
    "Write from last to first: red, green, blue",
    "Which numbers are the extremes? 88, 14, 52, 61",
    "What is 27 + 15?",
)
ANSWER_TOKENS = 16


def run(place: Place, out: Out, seed: int = 0) -> dict[str, Any]:
    """Seeds a Hub, discovers, adds gates, fuses, measures, publishes, and asks the result in a fresh process.

    Args:
        place: where it happens.
        out: what is said goes there.
        seed: of the order in which gates see rows.

    Returns:
        Where everything lies and what was measured.
    """
    with out.step(1, STEPS, f"A Hub at {place.endpoint}"):
        show_hub(place, out)

    with out.step(2, STEPS, "Push SmolLM2, and adapters that each learned one task"):
        _push_all(place, out)

    with out.step(3, STEPS, "Discover them by their tags, and see who can be routed to"):
        verdict = _discover(place)
        _show_verdict(verdict, out)

    with out.step(4, STEPS, f"Train gates for {WITHOUT_GATES}, and push them into its repo"):
        _add_gates(place, verdict, out, seed)

    with out.step(5, STEPS, "Fuse and measure"):
        model, results, routing, fused = _fuse_and_measure(place, out)
        count = len(results.tasks)
        out.table(_scores(results), title=f"Right answers on {count} tasks of {TESTED} questions each", human_only=True)
        for line in _said(results, routing):
            out.log(f"      {line}")

    with out.step(6, STEPS, f"Publish as {place.repo(NAME)}"):
        published = publish_to(place, fused, NAME, out)

    with out.step(7, STEPS, "Ask it in a fresh process without hf_fusion and peft"):
        identical = _compare_with_stranger(place, model, published.repo_id, published.sha, out)
        out.table(_answer_table(model), title="Whom each token of the first answer met, in %", human_only=True)

    summary = {
        "model": published.repo_id,
        "revision": published.sha,
        "folder": str(fused),
        "picture": str(fused / "routing.png"),
        "identical": identical,
    }
    with out.step(8, STEPS, "What you have now, and what to type next"):
        _show_next(place, fused, out)
    return summary | {
        "rejected": {entry.info.id: "; ".join(map(str, entry.reasons)) for entry in verdict.rejected},
        "measured": {predictor.name: predictor.means["held-in"].score for predictor in results.predictors},
        "routed_to_owner": routing.owner_weight(),
    }


def _push_all(place: Place, out: Out) -> None:
    """The base under its own id, adapters with gates, one without, and one that says it is of another base."""
    if place.embedded:  # the real Hub has it
        report_push(push_base(place), SMOLLM2, out)
    for name in WITH_GATES:
        report_push(place.push(name, demo_weights(f"smollm2_experts/{name}")), place.repo(name), out)
    for name, folder in _misfits(place.folder / "misfits").items():
        # What an earlier run pushed has gates by now: it stays.
        known = place.api.repo_exists(place.repo(name))
        report_push(not known and place.push(name, folder), place.repo(name), out)


def push_base(place: Place) -> bool:
    """SmolLM2 as its owner would push it."""
    from huggingface_hub import HfApi

    from hf_fusion.server import add_user

    owner, _, name = SMOLLM2.partition("/")
    theirs = HfApi(endpoint=place.endpoint, token=add_user(place.folder / "hub", owner))
    new = replace(place, namespace=owner, api=theirs).push(name, smollm2_folder())
    theirs.upload_file(repo_id=SMOLLM2, path_in_repo="README.md", path_or_fileobj=BASE_CARD.encode())
    return new


def _misfits(folder: Path) -> dict[str, Path]:
    """Two copies of adapters: one without its gates, one that says it is of another base."""
    from hf_fusion.hub.gates import GATES_FILE, GATES_TAG

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


def _discover(place: Place, *tags: str) -> Compatibility:
    """What anybody finds by tags, judged for routing among adapters of SmolLM2."""
    from hf_fusion.hub.compat import check_compatibility
    from hf_fusion.hub.discover import EXPERT_TAG, discover

    found = discover(tags=(EXPERT_TAG, "lora", *tags), author=place.namespace, api=place.anyone)
    judged = sorted(found, key=lambda info: info.id)
    return check_compatibility(judged, base_model=SMOLLM2, need_gates=True, api=place.anyone)


def _show_verdict(verdict: Compatibility, out: Out) -> None:
    """Two tables: who fits, and who does not and why."""
    accepted = [
        {"adapter": info.id, "commit": info.sha[:7], "license": info.license, "MB": round(info.size / 1e6, 2)}
        for info in verdict.accepted
    ]
    rejected = [{"rejected": entry.info.id, "reason": "; ".join(map(str, entry.reasons))} for entry in verdict.rejected]
    out.table(accepted, title=f"{len(accepted)} have gates and fit, by their configs and headers", human_only=True)
    out.table(rejected, title=f"{len(rejected)} do not", human_only=True)


def _add_gates(place: Place, verdict: Compatibility, out: Out, seed: int) -> None:
    """Trains and pushes the gates that are missing, unless an earlier run has done so."""
    from hf_fusion.hub.load import load_experts
    from hf_fusion.publishing.push_gates import push_gates
    from hf_fusion.training.gates import train_gates
    from hf_fusion.training.whitening import fit_whitening

    lacking = next((entry.info for entry in verdict.rejected if entry.info.id == place.repo(WITHOUT_GATES)), None)
    if lacking is None:
        out.log("      there already")
        return
    (expert,) = load_experts([lacking], api=place.api)
    # The other experts' gates read whitened inputs too: only scores of one measure can be compared.
    whitening = fit_whitening(expert, reference_rows())
    examples = rows(WITHOUT_GATES, "train", GATE_STEPS * GATE_BATCH)
    gates = train_gates(expert, examples, steps=GATE_STEPS, batch_size=GATE_BATCH, whitening=whitening, seed=seed)
    pushed = push_gates(gates, lacking.id, api=place.api)
    before, after = gates.facts["loss_before"], gates.facts["loss_after"]
    out.log(f"      {len(gates.vectors)} gates in {GATE_STEPS} steps, loss {before:.3f} → {after:.3f}")
    out.log(f"      {pushed.repo_id} at {pushed.sha[:12]}")


def _fuse_and_measure(place: Place, out: Out) -> tuple[Any, Results, RoutingMap, Path]:
    """The router, what was measured, and the folder that holds all of it."""
    from datasets import concatenate_datasets

    from hf_fusion.evaluation.evaluate import evaluate
    from hf_fusion.evaluation.plots import plot_routing
    from hf_fusion.evaluation.results import RESULTS_FILE
    from hf_fusion.evaluation.routing_map import ROUTING_FILE, ROUTING_PICTURE, map_routing
    from hf_fusion.fusion import fuse, save_fused
    from hf_fusion.hub.gates import GATES_TAG
    from hf_fusion.hub.load import load_experts

    experts = load_experts(_discover(place, GATES_TAG).accepted, api=place.api)
    model = fuse("phatgoose", experts, base_by_reference=True)
    cost = model.summary()["relative_cost"]
    out.log(f"      {len(experts)} experts; a token costs {cost:.2f} × the base's arithmetic where experts are")
    tasks = (*WITH_GATES, WITHOUT_GATES)
    suite = {task: rows(task, "test", TESTED) for task in tasks}
    owners = {task: place.repo(task) for task in tasks}
    results = evaluate(
        experts,
        suite,
        owners=owners,
        predictors=PREDICTORS,
        metrics={task: TASKS[task].metric for task in tasks},
        command="hf-fusion demo phatgoose",
    )
    routing = map_routing(model, suite, owners=owners)
    fused = save_fused(model, place.folder / FOLDER, overwrite=True)
    results.save(fused / RESULTS_FILE)
    routing.save(fused / ROUTING_FILE)
    plot_routing(routing, fused / ROUTING_PICTURE)
    questions = place.folder / "questions"
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


def _said(results: Results, routing: RoutingMap) -> list[str]:
    """The comparison in words."""
    leads = [f"{results[name].lead['held-in']} points on {name}" for name in ("base", "merged")]
    lines = [f"PHATGOOSE's lead with its 95 % interval: {', '.join(leads)}"]
    if (own := routing.owner_weight()) is not None:
        lines.append(
            f"{own:.0%} of the routing goes to the task's own expert, {1 / len(routing.experts):.0%} by chance"
        )
    return lines


def _prompt(model: PhatgooseForGeneration, question: str) -> Any:
    return model.processor(CHAT.format(question), return_tensors="pt").to(model.device)


def _compare_with_stranger(place: Place, model: PhatgooseForGeneration, repo: str, revision: str, out: Out) -> bool:
    """Whether a fresh process gets bit for bit the logits of the model in memory, and the same answers."""
    import torch
    from safetensors.torch import load_file

    folder = place.folder / "asked"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    prompts = [CHAT.format(question) for question in QUESTIONS]
    (folder / "prompts.json").write_text(json.dumps({"prompts": prompts, "max_new_tokens": ANSWER_TOKENS}))
    answers = ask_a_stranger(place, repo, revision, folder)["answers"]
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


def _show_next(place: Place, fused: Path, out: Out) -> None:
    """Where things lie, and commands that work as they stand."""
    repo, questions = place.repo(NAME), near(place.folder / "questions")
    files = {
        near(fused): "the experts with their gates, the recipe, results.json and routing.png",
        questions: "what it was asked (test)",
    }
    commands = [
        *hub_lines(place),
        f"hf-fusion discover --author {place.namespace} --tag phatgoose-gates --base-model {SMOLLM2} --check --gates",
        f"hf-fusion eval {near(fused)} --data {questions}",
        f'python -c \'from transformers import pipeline; ask = pipeline("text-generation", model="{repo}", '
        f'trust_remote_code=True); print(ask([{{"role": "user", "content": "{QUESTIONS[0]}"}}], max_new_tokens=16))\'',
    ]
    show_next(place, out, files, commands)
