"""Train the experts of the suite resnet50-nyuv2: for each task of NYUv2 a ResNet-50 under a decoder of its own.

    python examples/train_dense_experts.py
    python examples/train_dense_experts.py --expert depth                                     # only one of them
    python examples/train_dense_experts.py --epochs 1 --rows 64 --output tried                # a try

Reads the data set tanganke/nyuv2 and the base from the Hub. A GPU is used where there is one; on one core of a CPU each
epoch of an expert takes half an hour. What is there already is left alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

from train_experts import save
from transformers import (
    AutoImageProcessor,
    ResNetConfig,
    ResNetModel,
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    set_seed,
)

from hf_fusion.bench.rows import task_rows
from hf_fusion.bench.suite import load_suite
from hf_fusion.evaluation.loop import TaskRows, predict_task
from hf_fusion.evaluation.predictors import ModelPredictor
from hf_fusion.evaluation.results import MeasuredTask
from hf_fusion.evaluation.task_metrics import score
from hf_fusion.io.cache import cache_folder
from hf_fusion.training.batches import read_examples
from hf_fusion.training.dense import dense_loss
from hf_fusion.types import Expert

SEED = 0
SUITE = load_suite("resnet50-nyuv2")
SOURCE = "microsoft/resnet-50"
OUTPUTS = {"segmentation": 13, "depth": 1, "normal": 3}  # numbers for each pixel
LOSSES = {
    "segmentation": "cross entropy",
    "depth": "the absolute error of measured pixels",
    "normal": "1 - cosine of measured pixels",
}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
DECODER_WIDTH = 256
BATCH_SIZE = 8  # more than one: the decoder normalises over a batch what it pools to a single pixel
LEARNING_RATE = 1e-4

BASE_CARD = """---
base_model: {base}
library_name: transformers
---
# NYUv2, base

The weights of [{base}](https://huggingface.co/{base}) in the `backbone` of an UperNet whose decoder is chance: what the
experts of NYUv2 beside it start from. Made by hf_fusion's `examples/train_dense_experts.py`.
"""

CARD = """---
base_model: {base}
base_model_relation: finetune
library_name: transformers
license: other
datasets:
- tanganke/nyuv2
tags:
- hf-fusion-expert
---
# NYUv2, {task}

An UperNet with [{base}](https://huggingface.co/{base}) as its backbone, all of it trained for {epochs} epochs over
{rows} rows of NYUv2 on {loss} (AdamW, learning rate {learning_rate:g}, batches of {batch_size}). On the {tested} rows
of the validation split: {metric} {score:.4g}. Trained by hf_fusion's `examples/train_dense_experts.py`.
"""


def make_base(folder: Path) -> str:
    """Puts the encoder of an image classifier under a decoder of chance into `folder`, and returns a line about it."""
    set_seed(SEED)
    backbone = ResNetConfig.from_pretrained(SOURCE, out_features=STAGES, out_indices=None)
    config = UperNetConfig(backbone_config=backbone, hidden_size=DECODER_WIDTH, use_auxiliary_head=False)
    model = UperNetForSemanticSegmentation(config)
    model.backbone.load_state_dict(ResNetModel.from_pretrained(SOURCE).state_dict())
    processor = AutoImageProcessor.from_pretrained(SOURCE, do_resize=False)  # maps are as large as their pictures
    save(model, processor, BASE_CARD.format(base=SOURCE), folder)
    return f"base: {SOURCE}, {model.backbone.num_parameters():,} parameters"


def train(task: str, epochs: int, limit: int | None, folder: Path) -> str:
    """Trains one expert into `folder`, and returns a line about it."""
    set_seed(SEED)
    base, metric, rows = folder.with_name("base"), SUITE.tasks[task].metric, task_rows(SUITE, task)
    train_rows = rows.train.select(range(min(limit or len(rows.train), len(rows.train))))
    processor = AutoImageProcessor.from_pretrained(base)
    model = UperNetForSemanticSegmentation.from_pretrained(base, num_labels=OUTPUTS[task], ignore_mismatched_sizes=True)
    expert = Expert(task, model, processor=processor)
    read = partial(read_examples, expert, max_length=0)
    learned = read(train_rows)
    with tempfile.TemporaryDirectory() as scratch:
        Trainer(
            model,
            TrainingArguments(
                scratch,
                num_train_epochs=epochs,
                per_device_train_batch_size=BATCH_SIZE,
                learning_rate=LEARNING_RATE,
                warmup_steps=0.06,
                save_strategy="no",
                report_to=[],
                remove_unused_columns=False,
                dataloader_drop_last=True,
                disable_tqdm=not sys.stderr.isatty(),
                seed=SEED,
            ),
            train_dataset=learned.rows,
            data_collator=learned.collate,
            compute_loss_func=lambda outputs, labels, **_: dense_loss(outputs.logits, labels),
        ).train()
    data = TaskRows.of(MeasuredTask(task, metric, len(rows.test), task), rows.test, read, model)
    measured = score(predict_task([ModelPredictor(task, "expert", model.eval())], data, BATCH_SIZE)[task], metric)
    card = CARD.format(
        base=SOURCE, task=task, epochs=epochs, rows=len(train_rows), loss=LOSSES[task], learning_rate=LEARNING_RATE,
        batch_size=BATCH_SIZE, tested=measured.n, metric=metric.replace("_", " "), score=measured.score,
    )  # fmt: skip
    save(model, processor, card, folder)
    return f"{task}: {metric} {measured.score:.4g} on {measured.n} rows"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expert", choices=OUTPUTS, help="train only the expert of this task")
    parser.add_argument("--epochs", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--rows", type=int, help="train on so many rows; default: all")
    cache = cache_folder() / "nyuv2"
    parser.add_argument("--output", type=Path, default=cache, help=f"default, where the suite looks: {cache}")
    args = parser.parse_args()
    output: Path = args.output
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "base").exists():
        print(make_base(output / "base"), flush=True)
    for task in OUTPUTS:
        if args.expert in (None, task) and not (output / task).exists():
            print(train(task, args.epochs, args.rows, output / task), flush=True)
    print(f"Experts: {output}")


if __name__ == "__main__":
    main()
