"""Which held-out tasks of smollm-general its experts help on: each expert alone on each candidate.

    python tests/benchmarks/general_transfer.py --data DIR                    # all experts in the cache
    python tests/benchmarks/general_transfer.py --data DIR --tasks tweet-mood --n 40 --experts FOLDER --output FILE

A candidate is accepted if its best expert is at least 10 points above the base, with an interval above 0. Rows are
those of the candidates' train splits, which neither an expert nor a test has. Writes results/general_transfer.json, and
takes what it already holds as measured; an expert takes about two minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_fusion.assets.general_tasks import TASKS, rows
from hf_fusion.assets.smollm2 import smollm2_folder
from hf_fusion.evaluation.intervals import Z95
from hf_fusion.evaluation.machine import machine
from hf_fusion.io.cache import cache_folder

RESULTS = Path(__file__).parent / "results"
LEAST = 0.10  # how far the best expert must be above the base
BASE = "base"


@contextmanager
def same_start(blocks: Sequence[Any]) -> Iterator[dict[int, Any]]:
    """Blocks that no expert adapts run once for all of them; what they gave is to be cleared before the next batch."""
    remembered: dict[int, Any] = {}

    def run(index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if index not in remembered:
            remembered[index] = forward(*args, **kwargs)
        return remembered[index]

    for index, block in enumerate(blocks):
        block.forward = partial(run, index, block.forward)
    try:
        yield remembered
    finally:
        for block in blocks:
            del block.forward


@dataclass(frozen=True)
class Packed:
    """A batch of rows, each one sequence: its prompt, and after it all its answers, which do not see each other.

    Attributes:
        inputs: ids, positions and mask, as the model takes them.
        read: for each row and answer the positions that predict its tokens, and the tokens.
    """

    inputs: dict[str, torch.Tensor]
    read: list[list[tuple[list[int], list[int]]]]

    @classmethod
    def of(cls, batch: Sequence[dict[str, Any]], tokenizer: Any) -> Packed:
        """Rows with a prompt, and choices or a target; the end of the sequence is part of an answer."""
        rows = []
        for row in batch:
            prompt = tokenizer(row["prompt"])["input_ids"]
            answers = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in answers_of(row)]
            rows.append((prompt, answers))
        length = max(len(prompt) + sum(map(len, answers)) for prompt, answers in rows)
        ids, places = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(2))
        seen = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)
        read = []
        for row, (prompt, answers) in enumerate(rows):
            end = start = len(prompt)
            ids[row, :end], places[row, :end] = torch.tensor(prompt), torch.arange(end)
            seen[row, :end, :end] = torch.ones(end, end).tril().bool()
            spans = []
            for answer in answers:
                stop = start + len(answer)
                ids[row, start:stop], places[row, start:stop] = torch.tensor(answer), torch.arange(len(answer)) + end
                seen[row, start:stop, :end] = True
                seen[row, start:stop, start:stop] = torch.ones(len(answer), len(answer)).tril().bool()
                spans.append(([end - 1, *range(start, stop - 1)], answer))
                start = stop
            read.append(spans)
        mask = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, torch.finfo(torch.bfloat16).min)
        return cls({"input_ids": ids, "position_ids": places, "attention_mask": mask[:, None]}, read)


def answers_of(row: dict[str, Any]) -> list[str]:
    """The answers whose tokens are scored."""
    return row["choices"] or [row["target"]]


@torch.no_grad()
def score(causal: Any, packed: Packed, batch: Sequence[dict[str, Any]], metric: str) -> list[float]:
    """The scores of a batch of rows."""
    hidden = causal.model(**packed.inputs, use_cache=False).last_hidden_state
    scores = []
    for row, spans in enumerate(packed.read):
        losses, hits = [], []
        for places, tokens in spans:
            logits = causal.lm_head(hidden[row, places]).float()
            losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(tokens))))
            hits.append((logits.argmax(-1) == torch.tensor(tokens)).float())
        if metric == "ranked":
            scores.append(float(losses.index(min(losses)) in batch[row]["right"]))
        else:
            scores.append(float(hits[0].all() if metric == "exact" else hits[0].mean()))
    return scores


def measure(
    model: PeftModel, names: Sequence[str], metric: str, task_rows: Dataset, tokenizer: Any, batch_size: int
) -> dict[str, list[float]]:
    """The scores of a task's rows by each expert alone, and by the base."""
    found: dict[str, list[float]] = {name: [] for name in names}
    adapted = min(min(config.layers_to_transform) for config in model.peft_config.values())
    causal = model.get_base_model()
    with same_start(causal.model.layers[:adapted]) as remembered:
        for start in range(0, len(task_rows), batch_size):
            batch = [dict(row) for row in task_rows.select(range(start, min(start + batch_size, len(task_rows))))]
            packed = Packed.of(batch, tokenizer)
            remembered.clear()
            for name in names:
                with model.disable_adapter() if name == BASE else nullcontext():
                    if name != BASE:
                        model.set_adapter(name)
                    found[name] += score(causal, packed, batch, metric)
    digits = 4 if metric == "tokens" else None  # other scores are 0 or 1
    return {name: [round(value, digits) for value in values] for name, values in found.items()}


def verdict(scores: dict[str, list[float]]) -> dict[str, Any]:
    """The best expert of a task in hindsight, and its lead over the base with a paired 95 % interval."""
    means = {name: sum(values) / len(values) for name, values in scores.items()}
    best = max((name for name in means if name != BASE), key=means.__getitem__)
    lead = torch.tensor(scores[best]).double() - torch.tensor(scores[BASE]).double()
    mean, half = float(lead.mean()), Z95 * float(lead.std()) / len(lead) ** 0.5
    return {
        "n": len(lead),
        "base": means[BASE],
        "best": best,
        "score": means[best],
        "lead": mean,
        "ci95": [mean - half, mean + half],
        "accepted": mean >= LEAST and mean - half > 0,
        "experts": {name: means[name] for name in means if name != BASE},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per data set")
    parser.add_argument("--experts", type=Path, default=cache_folder() / "smollm_general", help="one folder per expert")
    parser.add_argument("--tasks", nargs="+", help="only these candidates")
    parser.add_argument("--only", nargs="+", help="only these experts")
    parser.add_argument("--n", type=int, default=80, help="validation rows of each")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, default=RESULTS / "general_transfer.json")
    args = parser.parse_args()
    disable_progress_bars()
    start = time.process_time()
    known = json.loads(args.output.read_text()) if args.output.is_file() else {"rows": {}}
    if known.get("n", args.n) != args.n:
        parser.error(f"{args.output} was measured with --n {known['n']}")
    held_in = [name for name, task in TASKS.items() if task.held_in and (args.experts / name).is_dir()]
    held_in = [name for name in held_in if not args.only or name in args.only]
    wanted = args.tasks or [name for name, task in TASKS.items() if not task.held_in]
    base = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    model = PeftModel.from_pretrained(base, args.experts / held_in[0], held_in[0])
    for name in held_in[1:]:
        model.load_adapter(args.experts / name, name)
    model.eval()
    found = known["rows"]
    partly = " --only EXPERTS --tasks TASKS, the experts that the tasks list" if args.only else ""
    for task in wanted:
        missing = [name for name in (BASE, *held_in) if name not in found.get(task, {})]
        if missing:
            task_rows = rows(task, "train", args.n, args.data)
            metric = TASKS[task].metric
            measured = measure(model, missing, metric, task_rows, tokenizer, args.batch_size)
            found.setdefault(task, {}).update(measured)
        told = verdict(found[task])
        print(
            f"{task}: base {told['base']:.1%}, {told['best']} {told['score']:.1%}, lead {told['lead']:+.1%} "
            f"({told['ci95'][0]:+.1%} to {told['ci95'][1]:+.1%}), n={told['n']}"
            + ("" if told["accepted"] else " - not accepted"),
            flush=True,
        )
        verdicts = {name: verdict(scores) for name, scores in found.items()}
        content = {
            "command": f"python tests/benchmarks/general_transfer.py --data DIR --n {args.n}" + partly,
            "n": args.n,
            "machine": machine(),
            "cpu_seconds": round(known.get("cpu_seconds", 0) + time.process_time() - start),
            "accepted": [name for name, each in verdicts.items() if each["accepted"]],
            "failed": [name for name, each in verdicts.items() if not each["accepted"]],
            "tasks": verdicts,
            "rows": found,
        }
        args.output.write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
