"""Converts pictures to the form of MNIST, and a model's trace to plain data: pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from shared.errors import InputError
from shared.uploads import read_picture as read_upload

NUMERALS = dict(
    zip(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"), map(str, range(10)))
)
SIDE, GLYPH = 28, 20  # MNIST: a glyph of at most 20 x 20, its centre of mass in the middle of 28 x 28
INK = 0.25  # pixels above this share of the strongest one are ink
FAINT = 16  # grey levels; a picture with less contrast than this is blank

Routing = dict[str, Any]


# ---------------------------------------------------------------- pictures


def are_digits(labels: Sequence[str]) -> bool:
    """Whether every label is a digit, as a word or a numeral, so that inputs are drawings in the form of MNIST."""
    known = {*NUMERALS, *NUMERALS.values()}
    return bool(labels) and all(label.strip().lower() in known for label in labels)


def read_picture(source: str | Path) -> Image.Image:
    """Opens a visitor's picture: an uploaded file, or a data URL.

    Raises:
        InputError: it is not a picture, see `pictures.open_picture`.
    """
    if isinstance(source, str) and not source.startswith("data:"):  # a visitor must not name files of this machine
        raise InputError("That is not a picture.")
    return read_upload(source)


def to_mnist(picture: Image.Image) -> Image.Image:
    """Converts a drawing or photo of a digit to the form of MNIST: 28 x 28, light on black, the glyph 20 high, centred.

    A picture of 28 x 28 with a dark background is taken to be in this form already.

    Raises:
        InputError: the picture is blank.
    """
    grey = _grey(picture)
    frame = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    ground = float(np.median(frame))
    if grey.shape == (SIDE, SIDE) and ground < 128:
        return Image.fromarray(grey.round().astype(np.uint8))
    ink = (ground - grey if ground >= 128 else grey - ground).clip(min=0)  # dark on light is inverted
    if ink.max() < FAINT:
        raise InputError("The picture is blank: draw a digit, or pick an example.")
    rows, columns = np.nonzero(ink > INK * ink.max())
    glyph = Image.fromarray(
        (ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] / ink.max() * 255).astype(np.uint8)
    )
    scale = GLYPH / max(glyph.size)
    small = glyph.resize([max(1, round(side * scale)) for side in glyph.size], Image.Resampling.LANCZOS)
    weight = np.asarray(small, dtype=float)
    # where the glyph's corner goes, so that its centre of mass lies in the middle; kept inside the frame
    left, top = (
        int(np.clip(round(SIDE / 2 - float((np.arange(length) + 0.5) @ mass / mass.sum())), 0, SIDE - length))
        for length, mass in ((small.width, weight.sum(0)), (small.height, weight.sum(1)))
    )
    canvas = Image.new("L", (SIDE, SIDE))
    canvas.paste(small, (left, top))
    return canvas


def _grey(picture: Image.Image) -> np.ndarray:
    """Grey levels (H, W) as floats; transparent pixels become a background that contrasts with the others."""
    picture = ImageOps.exif_transpose(picture)
    picture.thumbnail((512, 512))
    pixels = np.asarray(picture.convert("RGBA"), dtype=float)
    grey, alpha = pixels[..., :3] @ (0.299, 0.587, 0.114), pixels[..., 3] / 255
    if alpha.min() < 1:
        light = alpha.sum() > 0 and float((grey * alpha).sum() / alpha.sum()) >= 128
        grey = grey * alpha + (0 if light else 255) * (1 - alpha)
    return grey


# ---------------------------------------------------------------- routing


def read_routing(config: Any, trace: Mapping[str, Any], logits: Any, budget: float | None) -> Routing:
    """The routing of one example as plain data, which is also the response of the API.

    Args:
        config: the model's: experts, id2label, mode, problem_type, features_from.
        trace: ``model.routing_trace()`` after a forward of one example.
        logits: (C,) fused logits; None for a language model.
        budget: of the forward; None if every expert was queried.

    Returns:
        answer, confidence, labels, probabilities (one per label), cost (share of querying every expert), budget, mode,
        axis (ends of the axis of bars), and experts: name, cost_share, order (1 for the first queried, 0 for one not
        queried), score (the fuser's probability of it, in selection), labels (those it knows), probabilities (one per
        label, None for a label it does not know; None altogether if it was not queried or its output is not finite).
    """
    regression, selection = config.problem_type == "regression", config.mode == "selection"
    labels = [] if logits is None else [str(config.id2label[index]) for index in range(len(logits))]
    order = [int(step) for step in trace["order"][0]]
    scores = _softmax(trace["scores"][0].tolist()) if selection else [None] * len(order)
    fused = [] if logits is None else logits.tolist() if regression else _softmax(logits.tolist())
    experts = []
    for index, (row, share) in enumerate(zip(config.experts, trace["cost_shares"], strict=True)):
        known = sorted({fused for fused in row.get("label_map") or [] if fused >= 0})
        outputs = None
        if order[index] and labels:
            outputs = fused if selection else trace["outputs"][0, index].tolist()
            if not selection and not regression and not any(outputs):
                outputs = None  # an expert with non-finite logits counts as not queried
        experts.append(
            {
                "name": str(row["name"]),
                "revision": row.get("revision"),
                "cost_share": float(share),
                "order": order[index],
                "score": scores[index],
                "labels": [labels[label] for label in known] if labels else [],
                "probabilities": outputs and [value if label in known else None for label, value in enumerate(outputs)],
            }
        )
    best = max(range(len(fused)), key=fused.__getitem__) if fused else None
    all_values = [*fused, *(v for e in experts for v in e["probabilities"] or [] if v is not None)]
    return {
        "answer": None if best is None else f"{fused[0]:.2f}" if regression else labels[best],
        "confidence": None if best is None or regression else fused[best],
        "labels": labels,
        "probabilities": fused,
        "cost": _cost(experts, config) if selection else sum(e["cost_share"] for e in experts if e["order"]),
        "budget": budget,
        "mode": config.mode,
        "axis": [math.floor(min(0.0, *all_values)), math.ceil(max(1.0, *all_values))] if regression else [0.0, 1.0],
        "experts": experts,
    }


def _cost(experts: Sequence[Mapping[str, Any]], config: Any) -> float:
    """The cost in selection: all experts, or the one that embeds the input and the chosen one."""
    if config.features_from is None:
        return 1.0
    return sum(e["cost_share"] for i, e in enumerate(experts) if e["order"] or i == config.features_from)


def _softmax(values: Sequence[float]) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def shown_labels(routing: Routing, most: int = 10) -> tuple[list[int], int]:
    """The labels that have a bar, the same in every chart, and the number of other labels, which share one bar.

    At most `most` + 1 labels are all shown; otherwise the `most` with the highest probability in any chart. In
    selection only the chosen expert's labels count.
    """
    labels = list(range(len(routing["labels"])))
    if routing["mode"] == "selection":
        known = {label for expert in routing["experts"] if expert["order"] for label in expert["labels"]}
        labels = [index for index in labels if routing["labels"][index] in known]
    if len(labels) <= most + 1:
        return labels, 0
    rows = [routing["probabilities"], *(e["probabilities"] for e in routing["experts"] if e["probabilities"])]
    height = {label: max(row[label] or 0.0 for row in rows) for label in labels}
    kept = sorted(sorted(labels, key=height.__getitem__, reverse=True)[:most])
    return kept, len(labels) - most


# ---------------------------------------------------------------- results


def read_results(values: Any) -> dict[str, Any] | None:
    """The valid part of `results.json`: predictors and curve with finite scores and costs; None if there is none.

    Files of an earlier format are read as well: they have `systems` with a score each and a `dataset`.
    """
    if not isinstance(values, dict):
        return None
    values = {**values, **_pooled(values)}
    systems = [
        {"name": str(row.get("name")), "kind": str(row.get("kind")), **numbers}
        for row in _rows(values.get("systems"))
        if (numbers := _numbers(row))
    ]
    curve = sorted((numbers for row in _rows(values.get("curve")) if (numbers := _numbers(row))), key=_by_cost)
    if not systems:
        return None
    dataset = values.get("dataset")
    return {
        "metric": str(values.get("metric", "accuracy")),
        "n": values.get("n") if isinstance(values.get("n"), int) else 0,
        "dataset": str(dataset.get("name") or "") if isinstance(dataset, dict) else "",
        "systems": systems,
        "curve": curve,
    }


def _pooled(values: Mapping[str, Any]) -> dict[str, Any]:
    """Results on a single task, converted to the earlier format: scores of predictors, metric, n and data set."""
    tasks = _rows(values.get("tasks"))
    if len(tasks) != 1:
        return {}
    systems = []
    for row in _rows(values.get("predictors")):
        scores, kind = row.get("scores"), row.get("kind")
        score = scores.get(tasks[0].get("name")) if isinstance(scores, dict) else None
        score = score if isinstance(score, dict) else {}
        systems.append({**row, **score, "kind": "foe" if kind == "fused" else kind})
    known = {key: tasks[0][key] for key in ("metric", "n") if key in tasks[0]}
    return {**known, "dataset": {"name": tasks[0].get("name")}, "systems": systems}


def _rows(values: Any) -> list[dict[str, Any]]:
    return [row for row in values if isinstance(row, dict)] if isinstance(values, list) else []


def _numbers(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Score, cost and ci95 of a row, or None if they are not finite numbers."""
    try:
        score, cost = float(row["score"]), float(row["cost"])
        low, high = (float(bound) for bound in row.get("ci95") or (score, score))
    except (KeyError, TypeError, ValueError):
        return None
    return {"score": score, "cost": cost, "ci95": (low, high)} if np.isfinite([score, cost, low, high]).all() else None


def _by_cost(point: Mapping[str, float]) -> tuple[float, float]:
    return point["cost"], point["score"]
