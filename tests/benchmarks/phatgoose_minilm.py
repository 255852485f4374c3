"""PHATGOOSE on MiniLM classifiers beside every baseline: the quick suite, from training to table in minutes.

    python tests/benchmarks/phatgoose_minilm.py --data DIR
    python tests/benchmarks/phatgoose_minilm.py --data DIR --gates paper      # the paper's gates
    python tests/benchmarks/phatgoose_minilm.py --data DIR --gates whitened   # the paper's on whitened inputs

DIR holds one folder per data set with train.parquet and test.parquet. Trains a LoRA adapter with a head and gates for
each data set, then asks each test text without telling its task; an answer is right if it is the right label among
those of all tasks. Writes results/phatgoose_minilm.json, for the other kinds with their name behind.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_fusion import evaluate, load_experts, train_gates
from hf_fusion.assets.minilm import minilm_folder
from hf_fusion.demo.text_suites import splits
from hf_fusion.evaluation.results import Results
from hf_fusion.evaluation.retrieval import TextEmbedder
from hf_fusion.hub.gates_file import save_gates
from hf_fusion.training.whitening import fit_whitening

RESULTS = Path(__file__).parent / "results"
TASKS = ("snips", "trec", "sst2", "ag_news")
OTHERS = ("subj", "tweet_emotion", "cola")  # whose texts stand for all that may be asked, where gates are whitened
STEPS, BATCH, MAX_LENGTH, LEARNING_RATE = 100, 16, 32, 2e-3
GATE_STEPS, REFERENCE_ROWS = 50, 200
KINDS = ("gaussian", "paper", "whitened")
SEED = 0


def train(data: Dataset, folder: Path) -> None:
    """Trains a classifier's LoRA adapter with its head, and writes it with its label names."""
    torch.manual_seed(SEED)
    names = data.features["label"].names
    labels: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    base = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), **labels)
    model = get_peft_model(
        base, LoraConfig("SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "key", "value", "dense"])
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=0.1)
    model.train()
    for step in range(STEPS):
        rows = data[step * BATCH : (step + 1) * BATCH]
        inputs = tokenizer(rows["text"], padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):  # twice as fast on a CPU that has it
            loss = model(**inputs, labels=torch.tensor(rows["label"])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    model.config.architectures = [type(base).__name__]
    model.config.save_pretrained(folder)


def suite_rows(data_dir: Path, n: int) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """The rows that train each task's expert, and the first n test rows of each."""
    train_rows, test_rows = {}, {}
    for task in TASKS:
        own, _, test = splits(data_dir, task, fit_share=0.15)
        train_rows[task] = own.select(range(STEPS * BATCH))
        test_rows[task] = test.shuffle(seed=SEED).select(range(n))
    return train_rows, test_rows


def reference_rows(data_dir: Path) -> Dataset:
    """Texts of data sets that no expert has seen."""
    texts = [text for name in OTHERS for text in splits(data_dir, name, fit_share=0.15)[2]["text"][:REFERENCE_ROWS]]
    return Dataset.from_dict({"text": texts})


def make_experts(
    train_rows: Mapping[str, Dataset], folder: Path, kind: str = "gaussian", reference: Dataset | None = None
) -> None:
    """Trains an expert and its gates, of one of `KINDS`, for each task, into a folder each."""
    for task, rows in train_rows.items():
        train(rows, folder / task)
        options: dict[str, Any] = {"base": minilm_folder(), "max_length": MAX_LENGTH}
        if kind == "whitened":
            assert reference is not None, "rows to whiten by"
            options["whitening"] = fit_whitening(folder / task, reference, **options)
        if kind != "gaussian":
            options |= {"gates": "paper", "steps": GATE_STEPS}
        save_gates(train_gates(folder / task, rows, batch_size=BATCH, use_cpu=True, **options), folder / task)


def measure(
    folder: Path, train_rows: Mapping[str, Dataset], test_rows: Mapping[str, Dataset], **options: Any
) -> Results:
    """Measures the router of the experts in a folder; options are `evaluate`'s."""
    return evaluate(
        load_experts([folder / task for task in TASKS], base=minilm_folder()),
        test_rows,
        train_rows=train_rows,
        owners={task: task for task in TASKS},
        embedder=TextEmbedder(minilm_folder()),
        max_length=MAX_LENGTH,
        **options,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per data set")
    parser.add_argument("--n", type=int, default=200, help="test rows of each task")
    parser.add_argument("--examples", type=int, default=1000, help="train rows of each expert for the baselines")
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--gates", choices=KINDS, default="gaussian", help="kind of the gates")
    args = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train_rows, test_rows = suite_rows(args.data, args.n)
        reference = reference_rows(args.data) if args.gates == "whitened" else None
        make_experts(train_rows, Path(folder), args.gates, reference)
        command = f"python tests/benchmarks/phatgoose_minilm.py --data DIR --n {args.n} --examples {args.examples}"
        command += f" --top-k {args.top_k}" + f" --gates {args.gates}"
        options = {"examples": args.examples, "top_k": args.top_k, "command": command}
        results = measure(Path(folder), train_rows, test_rows, **options)
    results.save(RESULTS / f"phatgoose_minilm{'' if args.gates == 'gaussian' else f'_{args.gates}'}.json")
    print(f"{results.text()}\n\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
