"""Encodes data sets as training examples for one expert: model inputs with labels, and the loss of its head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_fusion.errors import FusionError
from hf_fusion.hub.task_heads import head_of_architecture, normalise_label
from hf_fusion.progress import phase
from hf_fusion.training.dense import dense_loss, map_outputs
from hf_fusion.training.prompts import encode_prompts, score_targets

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, ProcessorMixin

    from hf_fusion.types import Expert, ForwardModel


@dataclass
class Examples:
    """A data set, encoded for an expert.

    Attributes:
        rows: one encoded example each; a list or a `datasets.Dataset`.
        collate: rows → a batch of model inputs, with ``labels``.
        loss: (model, inputs) → mean loss of the batch, a scalar.
    """

    rows: Sequence[Any]
    collate: Callable[[list[Any]], Any]
    loss: Callable[[Any, Any], torch.Tensor]


def read_examples(expert: Expert, dataset: Dataset, max_length: int) -> Examples:
    """Encodes a data set for an expert.

    Args:
        expert: must have a processor.
        dataset: columns ``prompt`` and ``target`` for a language model, ``text`` (and ``text_pair``) or ``image`` with
            ``label`` for a classifier, ``image`` with a label map for dense prediction (see `training.dense`).
        max_length: longest sequence, in tokens.

    Raises:
        FusionError: for empty data, missing columns, labels that the expert does not have, or an expert without a
            processor or with an unsupported head.
    """
    if not len(dataset):
        raise FusionError(f"the data set for {expert.name} is empty")
    if expert.processor is None:
        raise FusionError(
            f"{expert.name} has no tokenizer or image processor, and neither has its base",
            hint="save one in its folder: AutoTokenizer.from_pretrained(base).save_pretrained(folder)",
        )
    head = head_of_architecture(type(expert.model).__name__)
    read = _READERS.get(head.auto if head else "")
    if read is None:
        raise FusionError(
            f"{expert.name} is a {type(expert.model).__name__}: only language models, classifiers of texts and "
            "images and dense predictors are supported here"
        )
    with phase(f"Encoding {len(dataset):,} rows"):
        return read(expert, _decode_images(dataset), max_length)


def zero_shot_examples(processor: ProcessorMixin, dataset: Dataset, prompts: Sequence[str]) -> Examples:
    """Images for zero-shot classification by CLIP: each class is a text, and the logits are ``logits_per_image``.

    Args:
        processor: the model's `CLIPProcessor`.
        dataset: column ``image``; with labels also ``label``, an index into `prompts`.
        prompts: one text per class, such as "a photo of a cat".
    """
    return image_text_examples(processor, dataset, processor(text=list(prompts), padding=True, return_tensors="pt"))


def image_text_examples(processor: ProcessorMixin, dataset: Dataset, texts: Mapping[str, torch.Tensor]) -> Examples:
    """As `zero_shot_examples`, with the texts of the C classes already encoded as model inputs."""
    columns = [name for name in ("image", "label") if name in dataset.column_names]

    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        pixels = processor(images=[row["image"].convert("RGB") for row in rows], return_tensors="pt")["pixel_values"]
        labels = {"labels": torch.tensor([row["label"] for row in rows])} if "label" in columns else {}
        return {**texts, "pixel_values": pixels, **labels}

    return Examples(_decode_images(dataset.select_columns(columns)), collate, _class_loss)


def _decode_images(dataset: Dataset) -> Dataset:
    from hf_fusion.io.picture_rows import with_pictures

    return with_pictures(dataset)


def _read_generation(expert: Expert, dataset: Dataset, max_length: int) -> Examples:
    """Language models: the loss is the cross entropy of the target tokens."""
    from transformers import DataCollatorForSeq2Seq

    seq2seq = expert.model.config.is_encoder_decoder
    rows = encode_prompts(dataset, expert.processor, is_encoder_decoder=seq2seq, max_length=max_length)
    tokenizer = expert.processor
    if tokenizer.pad_token_id is None:
        raise FusionError(f"the tokenizer of {expert.name} has no padding token", hint="tokenizer.pad_token = …")
    collate = DataCollatorForSeq2Seq(tokenizer, model=expert.model if seq2seq else None)
    return Examples(rows, collate, lambda model, inputs: model(**inputs, use_cache=False).loss)


def _read_texts(expert: Expert, dataset: Dataset, max_length: int) -> Examples:
    """Text classifiers and regressors, on single texts or pairs."""
    from transformers import DataCollatorWithPadding

    _require(dataset, "text", "label")
    columns = [name for name in ("text", "text_pair") if name in dataset.column_names]
    texts = expert.processor(*(list(dataset[name]) for name in columns), truncation=True, max_length=max_length)
    labels = _class_indices(expert, dataset)
    rows = [{**{key: texts[key][i] for key in texts}, "labels": labels[i]} for i in range(len(labels))]
    return Examples(rows, DataCollatorWithPadding(expert.processor), _class_loss)


def _read_images(expert: Expert, dataset: Dataset, max_length: int) -> Examples:
    """Image classifiers; images are preprocessed per batch."""
    _require(dataset, "image", "label")
    labels = _class_indices(expert, dataset)
    kept = dataset.select_columns("image").add_column("labels", labels)

    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        pixels = expert.processor(images=[row["image"] for row in rows], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}

    return Examples(kept, collate, _class_loss)


def _read_maps(expert: Expert, dataset: Dataset, max_length: int) -> Examples:
    """Dense predictors: a label is an array with one value, or vector, per pixel."""
    _require(dataset, "image", "label")

    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        pixels = expert.processor(images=[row["image"] for row in rows], return_tensors="pt")["pixel_values"]
        labels = torch.stack([torch.tensor(row["label"]) for row in rows])
        return {"pixel_values": pixels, "labels": labels.float() if labels.is_floating_point() else labels.long()}

    kept = dataset.select_columns(["image", "label"]).with_format("numpy")
    return Examples(kept, collate, lambda model, inputs: dense_loss(map_outputs(model, inputs), inputs["labels"]))


_READERS: dict[str, Callable[[Expert, Dataset, int], Examples]] = {
    "AutoModelForCausalLM": _read_generation,
    "AutoModelForSeq2SeqLM": _read_generation,
    "AutoModelForSequenceClassification": _read_texts,
    "AutoModelForImageClassification": _read_images,
    "AutoModelForSemanticSegmentation": _read_maps,
}


def _class_loss(model: Callable[..., Any], inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy, or a regressor's mean squared error; the model's loss would rely on the base's class count."""
    labels = inputs["labels"]
    logits = class_logits(model, inputs)
    if labels.is_floating_point():
        return nn.functional.mse_loss(logits.squeeze(-1), labels.float())
    return nn.functional.cross_entropy(logits, labels)


def class_logits(model: Callable[..., Any], inputs: Mapping[str, Any]) -> torch.Tensor:
    """Class logits, fp32, (B, C); ``labels`` are not passed to the model.

    Raises:
        FusionError: the output has no class logits.
    """
    output = model(**{name: value for name, value in inputs.items() if name != "labels"})
    for name in ("logits", "logits_per_image"):
        logits: torch.Tensor | None = getattr(output, name, None)
        if logits is not None and logits.dim() < 4:  # 4 dimensions: logits per pixel
            return logits.float()
    raise FusionError(f"{type(output).__name__} has no class logits: only classifiers have them")


def score_rows(model: ForwardModel, batch: Mapping[str, Any], metric: str) -> torch.Tensor:
    """The score of each row of a batch, (B,): "accuracy" for classes; "exact" match or share of "tokens" for text."""
    if metric != "accuracy":
        exact, share = score_targets(model, batch)
        return exact if metric == "exact" else share
    labels: torch.Tensor = batch["labels"]
    return class_logits(model, batch).argmax(-1) == labels


def _require(dataset: Dataset, *columns: str) -> None:
    if missing := [name for name in columns if name not in dataset.column_names]:
        raise FusionError(
            f"the data set has columns {dataset.column_names}, but no {' and no '.join(missing)}",
            hint=f"dataset.rename_column('sentence', {missing[0]!r})",
        )


def _class_indices(expert: Expert, dataset: Dataset) -> list[Any]:
    """Column ``label`` as indices of the expert's classes, matched by name, also for ClassLabel columns."""
    values = list(dataset["label"])
    names = getattr(dataset.features["label"], "names", None)
    if names and expert.labels:
        values = [names[value] if value >= 0 else str(value) for value in values]
    if isinstance(values[0], float):
        return values
    known: dict[Any, int] = {normalise_label(name): index for index, name in enumerate(expert.labels)}
    if not isinstance(values[0], str):
        known = {index: index for index in range(len(expert.labels) or (expert.model.config.num_labels or 0))}
    indices = [known.get(normalise_label(value) if isinstance(value, str) else value, -1) for value in values]
    if -1 in indices:
        unknown = sorted({value for value, index in zip(values, indices, strict=True) if index < 0})
        raise FusionError(
            f"column 'label' holds {unknown[:5]}, but the labels of {expert.name} are {list(known)[:20]}",
            hint="drop those rows, or rename the labels",
        )
    return indices


def unlabelled(rows: Dataset) -> Dataset:
    """Rows with placeholder labels and targets, for passes that ignore them."""
    if "label" in rows.column_names:
        rows = rows.remove_columns("label")
    rows = rows.add_column("label", [0] * len(rows))
    return rows if "target" in rows.column_names else rows.add_column("target", [""] * len(rows))


def equal_length_batches(rows: Sequence[Any], batch_size: int, count: int | None = None) -> Iterator[list[Any]]:
    """Batches of the first `count` rows (default: all); rows of a batch have equal lengths, so nothing is padded."""
    groups: dict[tuple[int, ...], list[Any]] = {}
    for index in range(len(rows) if count is None else min(count, len(rows))):
        row = rows[index]
        lengths = tuple(len(value) for value in row.values() if isinstance(value, list))
        group = groups.setdefault(lengths, [])
        group.append(row)
        if len(group) == batch_size:
            yield groups.pop(lengths)
    yield from groups.values()


def to_model(inputs: Mapping[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Inputs on the model's device; floating-point inputs and labels in its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def batch_indices_by_length(rows: Sequence[Any], size: int) -> Iterator[list[int]]:
    """Batches of row indices; sequences are sorted by length, to pad little."""
    order = list(range(len(rows)))
    if "input_ids" in rows[0]:
        order.sort(key=lambda row: len(rows[row]["input_ids"]))
    yield from (order[start : start + size] for start in range(0, len(order), size))
