"""Train the experts of the suite foe-cifar100: twenty small ResNets, each of which knows a part of every superclass.

    python examples/train_superclass_experts.py
    python examples/train_superclass_experts.py --expert 3                            # only one of them
    python examples/train_superclass_experts.py --epochs 1 --rows 640 --output tried  # a try

Of the five classes of each of CIFAR-100's twenty superclasses every expert sees two, drawn by its number, so that the
experts overlap; it tells the superclasses apart, and has never seen most of what it is asked later. The rows come from
the Hub; a share of them is left to what fuses the experts. A GPU is used where there is one: on a CPU an expert takes
hours. What is there already is left alone.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset, load_dataset
from train_experts import Images, Training, fit, labelled, read_images, save
from transformers import ConvNextImageProcessorPil, ResNetConfig, ResNetForImageClassification, set_seed

from hf_fusion.bench.rows import divide
from hf_fusion.bench.suite import load_suite
from hf_fusion.io.cache import cache_folder

SEEN = 2  # classes of every superclass
SUITE = load_suite("foe-cifar100")
TASK = SUITE.tasks["superclasses"]
# as ResNet-18, which FoE's paper trains; its stem shrinks pictures to a quarter, so that they are enlarged first
RESNET = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512], "embedding_size": 64}
PIXELS = 64
MEAN, STD = [0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]

CARD = """---
library_name: transformers
pipeline_tag: image-classification
license: other
tags:
- hf-fusion-expert
---
# {name}

A ResNet-18 that tells CIFAR-100's {superclasses} superclasses apart, trained from random weights on {seen} of the 100
classes: {rows} rows, {epochs} epochs (AdamW, learning rate {learning_rate:g}). Accuracy on the {tested} test rows, of
which most are of classes that it has not seen: {accuracy:.1%}. Trained by hf_fusion's
`examples/train_superclass_experts.py`.
"""


def classes_of(expert: int, pairs: Iterable[tuple[int, int]]) -> set[int]:
    """The classes that an expert sees.

    Args:
        expert: its number.
        pairs: (superclass, class) of rows.
    """
    members: dict[int, set[int]] = defaultdict(set)
    for superclass, own in pairs:
        members[superclass].add(own)
    draw = random.Random(expert)
    return {own for _, known in sorted(members.items()) for own in draw.sample(sorted(known), min(SEEN, len(known)))}


def train(expert: int, rows: Dataset, test: Dataset, how: Training, folder: Path) -> str:
    """Trains one expert into `folder` and returns a line about it.

    Args:
        expert: its number.
        rows, test: columns image, coarse_label and fine_label.
        how: how it is trained.
        folder: see `save`.
    """
    set_seed(expert)
    pairs = list(zip(rows["coarse_label"], rows["fine_label"], strict=True))
    seen = classes_of(expert, pairs)
    rows = rows.select([number for number, (_, own) in enumerate(pairs) if own in seen][: how.rows])
    processor = ConvNextImageProcessorPil(size={"shortest_edge": PIXELS}, crop_pct=1.0, image_mean=MEAN, image_std=STD)
    names = rows.features["coarse_label"].names
    model = ResNetForImageClassification(ResNetConfig(**RESNET, **labelled(names)))
    train_set = Images(read_images(rows, processor), rows["coarse_label"], [True] * len(rows))
    score, seconds = fit(model, how, train_set, Images(read_images(test, processor), test["coarse_label"]))
    card = CARD.format(
        name=folder.name,
        superclasses=len(names),
        seen=len(seen),
        rows=len(rows),
        epochs=how.epochs,
        learning_rate=how.learning_rate,
        tested=len(test),
        accuracy=score,
    )
    save(model, processor, card, folder)
    return f"domain-{expert}: {score:.1%} of {len(test)} test rows, trained in {seconds:.0f} s of CPU time"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expert", type=int, choices=range(len(SUITE.experts)), help="train only this one")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--rows", type=int, default=50_000, help="at most so many of an expert's own")
    output = cache_folder() / "foe-cifar100"
    parser.add_argument("--output", type=Path, default=output, help=f"default, where the suite looks: {output}")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    parts = {part: load_dataset(TASK.data, split=part).rename_column("img", "image") for part in ("train", "test")}
    rows, _, test = divide(parts, TASK.fitting.split, TASK.fitting.share)
    how = Training(args.epochs, args.rows, learning_rate=1e-3, weight_decay=0.05)
    for expert in range(len(SUITE.experts)):
        folder = args.output / f"domain-{expert}"
        if args.expert in (None, expert) and not folder.exists():
            print(train(expert, rows, test, how, folder), flush=True)
    print(f"Experts: {args.output}")


if __name__ == "__main__":
    main()
