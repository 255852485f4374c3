"""PHATGOOSE on SmolLM2's experts beside every baseline, on held-in tasks (which one is not told) and held-out ones.

Every held-in task is asked twice: alone, and as the second question of a chat whose first was of another task.

    python tests/benchmarks/phatgoose_text.py --data DIR                      # everything; hours on two cores, or:
    python tests/benchmarks/phatgoose_text.py --data DIR --device cuda        # minutes
    python tests/benchmarks/phatgoose_text.py --data DIR --n 40 --examples 100 --systems base PHATGOOSE retrieval oracle
    python tests/benchmarks/phatgoose_text.py --data DIR --n 40 --diagnose    # where tokens go, instead of scores

DIR holds one folder per data set, see `hf_fusion.assets.language_tasks`. Writes results/phatgoose_text.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars

from hf_fusion import Expert, PhatgooseRouter, evaluate, load_experts
from hf_fusion.assets.language_tasks import CHAT, END_OF_TURN, HELD_IN, HELD_OUT, TASKS, conversations, rows
from hf_fusion.assets.minilm import minilm_folder
from hf_fusion.assets.smollm2 import smollm2_folder
from hf_fusion.assets.weights import demo_weights
from hf_fusion.evaluation.intervals import mean_of
from hf_fusion.evaluation.results import Results, aligned
from hf_fusion.evaluation.retrieval import TextEmbedder
from hf_fusion.evaluation.routing import PREDICTORS
from hf_fusion.hub.gates_file import GATES_FILE
from hf_fusion.training.batches import read_examples
from hf_fusion.training.gates import average_activation

RESULTS = Path(__file__).parent / "results"
SECOND = ", asked second"


def questions(embed: TextEmbedder):
    """An embedder of what was said, without the chat's markup, which is the same around every question."""
    marks = [*CHAT.split("{}"), END_OF_TURN]

    def plain(text: str) -> str:
        for mark in marks:
            text = text.replace(mark, " ")
        return text.strip()

    return lambda texts: embed([plain(text) for text in texts])


# ---------------------------------------------------------------- diagnosis

PARTS = ("prompt", "answer")


@torch.no_grad()
def shares(router: PhatgooseRouter, expert: Expert, task_rows: Dataset, batch_size: int) -> dict[str, Any]:
    """Where the tokens of a task go, means over tokens and linears, apart for prompt and answer.

    A token belongs to the answer if the next one is the target's: it is there that the answer is made.

    Returns:
        part → "weight" and "first": expert → share of the routing weight, of first choices; "sharpness": the weight of
        the first choice.
    """
    read = read_examples(replace(expert, model=router.backbone), task_rows, 512)
    count = len(router.experts)
    weight, first = ({part: torch.zeros(count) for part in PARTS} for _ in range(2))
    sharp, tokens = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0)
    router.record_routing = sys.maxsize
    order = sorted(range(len(task_rows)), key=lambda row: len(read.rows[row]["input_ids"]))
    for start in range(0, len(order), batch_size):
        batch = read.collate([read.rows[row] for row in order[start : start + batch_size]])
        labels = batch.pop("labels")
        router.backbone(**batch.to(router.device), use_cache=False, logits_to_keep=1)
        trace = router.routing_trace()
        answer = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
        masks = {"answer": answer, "prompt": batch["attention_mask"].bool().cpu() & ~answer}
        for module in trace.modules:
            dense, (choice, weights) = trace.expert_weights(module), trace.choices(module)
            for part, mask in masks.items():
                weight[part] += dense[mask].sum(0)
                first[part] += choice[mask][:, 0].long().bincount(minlength=count)
                sharp[part] += float(weights[mask][:, 0].sum())
                tokens[part] += int(mask.sum())
    router.record_routing = 0
    return {
        part: {
            "weight": dict(zip(router.experts, (weight[part] / tokens[part]).tolist(), strict=True)),
            "first": dict(zip(router.experts, (first[part] / tokens[part]).tolist(), strict=True)),
            "sharpness": sharp[part] / tokens[part],
        }
        for part in PARTS
    }


def diagnose(
    experts: Sequence[Expert], suite: Mapping[str, Dataset], train: Mapping[str, Dataset], args: argparse.Namespace
) -> dict[str, Any]:
    """`shares` of every task by gates, printed for tasks with an owner: what the owner gets."""
    options: dict[str, Any] = {"top_k": args.top_k, "temperature": args.temperature}
    found: dict[str, Any] = {}
    for gates in args.gates:
        used, rule = list(experts), "arrow" if gates == "arrow" else "phatgoose"
        if gates == "average":
            used = [replace(e, gates=average_activation(e, train[e.name], examples=args.examples)) for e in experts]
        router = PhatgooseRouter.from_experts(used, routing=rule, **options)
        found[gates] = {task: shares(router, experts[0], own, args.batch_size) for task, own in suite.items()}
    table = []
    for task in suite:
        line = {"weight (first choice) of the owner": task}
        for gates in args.gates:
            for part in PARTS:
                values = found[gates][task][part]
                most = max(values["weight"], key=values["weight"].get)
                if task in values["weight"]:
                    line[f"{gates}, {part}"] = f"{values['weight'][task]:.0%} ({values['first'][task]:.0%})"
                line[f"most, {gates}, {part}"] = f"{most} {values['weight'][most]:.0%}"
        table.append({key: cell for key, cell in line.items() if not key.startswith("most")})
        print(
            f"{task}: most weight goes to",
            "; ".join(f"{cell} ({key[6:]})" for key, cell in line.items() if key.startswith("most")),
        )
    chance = f"{1 / len(experts):.0%}"
    table.append({"weight (first choice) of the owner": "by chance"} | dict.fromkeys(list(table[0])[1:], chance))
    print(f"\n{aligned(table)}\n")
    sharp = [
        {"weight of the first choice": gates}
        | {part: f"{sum(t[part]['sharpness'] for t in found[gates].values()) / len(suite):.0%}" for part in PARTS}
        for gates in args.gates
    ]
    print(aligned(sharp))
    return found


# ---------------------------------------------------------------- the script


def halves(results: Results) -> list[dict[str, str]]:
    """Every system's mean over the held-in tasks, asked alone and asked second."""
    table = []
    for predictor in results.predictors:
        line = {"mean over held-in tasks": predictor.name}
        for half in ("asked alone", "asked second"):
            tasks = [t.name for t in results.tasks if t.owner and t.name.endswith(SECOND) == (half == "asked second")]
            if tasks and set(tasks) <= predictor.scores.keys():
                line[half] = str(mean_of([predictor.scores[task] for task in tasks]))
        table.append(line)
    return table


def command(args: argparse.Namespace) -> str:
    """What to type to get these numbers again, without this machine's paths."""
    shown = {"n": args.n, "examples": args.examples, "top-k": args.top_k, "temperature": args.temperature}
    chosen = [f"--{name} {value}" for name, value in shown.items()]
    for name in ("systems", "tasks"):
        if values := getattr(args, name):
            chosen.append(f"--{name} " + " ".join(f"'{value}'" if " " in value else value for value in values))
    return " ".join(["python tests/benchmarks/phatgoose_text.py --data DIR", *chosen, f"--device {args.device}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per data set")
    parser.add_argument(
        "--experts", type=Path, default=demo_weights("smollm2_experts"), help="folder with one folder per expert"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="only these tasks")
    parser.add_argument("--n", type=int, default=200, help="test rows of each task")
    parser.add_argument("--systems", nargs="+", choices=PREDICTORS, help="only these systems")
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--examples", type=int, default=1000, help="train rows of each expert for the baselines")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", help="of the base; its own is bfloat16")
    parser.add_argument("--diagnose", action="store_true", help="print where tokens go instead of scores")
    parser.add_argument("--gates", nargs="+", choices=("trained", "average", "arrow"), default=["trained"])
    parser.add_argument("--output", type=Path, default=RESULTS / "phatgoose_text.json")
    args = parser.parse_args()
    disable_progress_bars()
    folders = [args.experts / task for task in HELD_IN if (args.experts / task / GATES_FILE).is_file()]
    experts = load_experts(folders, base=smollm2_folder(), dtype=args.dtype)
    experts[0].model.to(args.device)  # one object for all
    names = [expert.name for expert in experts]
    tasks = [task for task in (*names, *HELD_OUT) if not args.tasks or task in args.tasks]
    start = time.perf_counter()
    suite = {task: rows(task, "test", args.n, args.data) for task in tasks}
    owned = [task for task in tasks if task in names]
    seconds = {task + SECOND: task for task in owned if len(owned) > 1}
    chats = conversations({task: suite[task] for task in seconds.values()})
    suite |= {second: chats[task] for second, task in seconds.items()}
    train = {name: rows(name, "train", args.examples, args.data) for name in names}
    print(f"{len(experts)} experts, {len(tasks)} tasks; rows made in {time.perf_counter() - start:.0f} s", flush=True)
    if args.diagnose:
        found = diagnose(experts, suite, train, args)
        path = args.output.with_stem(args.output.stem + "_shares")
        path.write_text(json.dumps({"command": command(args) + " --diagnose", "shares": found}, indent=1) + "\n")
    else:
        embedder = TextEmbedder(minilm_folder())
        embedder.model.to(args.device)
        results = evaluate(
            experts,
            suite,
            train_rows=train,
            owners={name: name for name in owned} | seconds,
            predictors=args.systems,
            metrics={task: TASKS[seconds.get(task, task)].metric for task in suite},
            top_k=args.top_k,
            temperature=args.temperature,
            embedder=questions(embedder),
            examples=args.examples,
            batch_size=args.batch_size,
            command=command(args),
        )
        path = args.output
        results.save(path)
        print(results.text())
        print(f"\n{aligned(halves(results))}")
    print(f"\n{time.perf_counter() - start:.0f} s; written to {path}")


if __name__ == "__main__":
    main()
