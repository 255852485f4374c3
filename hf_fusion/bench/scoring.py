"""From what a model answered to a cell's score: metrics through `evaluate`, each with an interval over the rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch

from hf_fusion.bench.suite import LOWER
from hf_fusion.errors import FusionError
from hf_fusion.evaluation.intervals import Z95, wilson
from hf_fusion.evaluation.metrics import METRIC_SPECS, load_metric
from hf_fusion.training.batches import class_logits
from hf_fusion.training.dense import dense_statistics, map_outputs
from hf_fusion.training.prompts import IGNORED, score_targets

RESAMPLES = 500  # of the bootstrap, for metrics that are no means


@dataclass(frozen=True)
class BenchMetric:
    """How a task is scored.

    Attributes:
        metric: a key of `hf_fusion.evaluation.metrics.METRIC_SPECS`.
        reads: what of the model's output it needs: "classes", their "numbers" (a regressor's), whether all of the
            target's tokens are the likeliest ("targets"), the share of them that are ("tokens"), their loss
            ("losses"), that of every choice ("ranks"), written "texts", what it makes of the whole row
            ("embeddings") or of each pixel ("maps").
    """

    metric: str
    reads: Literal["classes", "numbers", "targets", "tokens", "losses", "ranks", "texts", "embeddings", "maps"]


WRITTEN_TOKENS = 128  # of an answer that does not end before

# What a suite's tasks may ask for. "exact" and "tokens" need no text to be written: greedy decoding gives exactly the
# target if and only if each of its tokens is the likeliest after those before it.
METRICS = {
    "accuracy": BenchMetric("accuracy", "classes"),
    "f1": BenchMetric("f1", "classes"),
    "matthews": BenchMetric("matthews_correlation", "classes"),
    "spearman": BenchMetric("spearmanr", "numbers"),
    "exact": BenchMetric("accuracy", "targets"),
    "ranked": BenchMetric("accuracy", "ranks"),
    "tokens": BenchMetric("mean", "tokens"),
    "perplexity": BenchMetric("perplexity", "losses"),
    "rouge1": BenchMetric("rouge1", "texts"),
    "rouge2": BenchMetric("rouge2", "texts"),
    "rougeL": BenchMetric("rougeL", "texts"),
    "exact_match": BenchMetric("exact_match", "texts"),
    "spearman_text": BenchMetric("spearmanr", "texts"),
    "agreement": BenchMetric("mean", "embeddings"),  # cosine with the task's own expert's
    "mean_iou": BenchMetric("mean_iou", "maps"),
    "absolute_error": BenchMetric("mean", "maps"),
    "angle": BenchMetric("mean", "maps"),
}


def same_scale(metrics: Iterable[str]) -> bool:
    """Whether scores can be averaged: they are of one metric, or all of them shares, of which more is better."""
    names = set(metrics)
    return len(names) == 1 or not names & LOWER


@dataclass(frozen=True)
class Predictions:
    """A model's predictions for the rows of a task, and the references: values as the metric takes them, (N,) each."""

    predictions: list[Any]
    references: list[Any]


@dataclass(frozen=True)
class Scored:
    """A score, the interval that holds it with 95 %, and the number of rows."""

    score: float
    ci95: tuple[float, float]
    n: int


def score(found: Predictions, name: str) -> Scored:
    """The score of predictions.

    Shares have Wilson's interval, means over rows the normal one; of other metrics it is the percentile bootstrap's
    (`RESAMPLES` draws, seed 0).

    Args:
        found: predictions and references.
        name: a key of `METRICS`.
    """
    metric, (given, right) = METRICS[name], (found.predictions, found.references)
    if name == "spearman_text":
        given, right = _numbers(given), _numbers(right)
    n = len(given)
    if metric.metric == "mean":
        values = np.asarray(given, dtype=float)[np.asarray(right) > 0]  # 0: a row without anything to compare with
        if not (n := len(values)):
            raise FusionError("no row has anything to compare with")
        mean, half = float(values.mean()), Z95 * float(values.std()) / math.sqrt(n)
        most = math.inf if name in LOWER else 1.0  # of an error, and of a share
        return Scored(mean, (max(0.0, mean - half), min(most, mean + half)), n)
    computed = float(_metric(metric.metric).compute(predictions=given, references=right)[metric.metric])
    if METRIC_SPECS[metric.metric].is_mean:
        return Scored(computed, wilson(computed, n), n)
    return Scored(computed, _bootstrap(METRIC_SPECS[metric.metric].of, given, right), n)


def _bootstrap(
    of: Callable[[Sequence[Any], Sequence[Any]], float], given: Sequence[Any], right: Sequence[Any]
) -> tuple[float, float]:
    rng, found = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        rows = rng.integers(0, len(given), len(given))
        found.append(of([given[row] for row in rows], [right[row] for row in rows]))
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


@cache
def _metric(name: str) -> Any:
    return load_metric(name)


def _numbers(texts: Sequence[str]) -> list[float]:
    """Written numbers; what is no number counts as 0."""
    found = []
    for text in texts:
        try:
            number = float(text.strip())
        except ValueError:
            number = 0.0
        found.append(number if math.isfinite(number) else 0.0)
    return found


@torch.no_grad()
def predict_batch(
    model: Any, inputs: Mapping[str, Any], reads: str, tokenizer: Any = None
) -> tuple[list[Any], list[Any]]:
    """Predictions and references of a batch, as a metric takes them.

    Args:
        model: called with the inputs.
        inputs: a batch with ``labels``.
        reads: see `BenchMetric`.
        tokenizer: of "texts".
    """
    if reads in ("targets", "tokens"):
        exact, share = score_targets(model, inputs)
        values = exact.long() if reads == "targets" else share
        return values.tolist(), [1] * len(values)
    if reads in ("losses", "ranks"):  # rows whose answers are ranked come once for each choice
        return _losses(model, inputs)
    if reads == "texts":
        return _texts(model, inputs, tokenizer)
    if reads == "embeddings":
        first = model(**{name: own for name, own in inputs.items() if name != "labels"}).last_hidden_state[:, 0]
        return first.tolist(), [0] * len(first)
    if reads == "maps":
        return dense_statistics(map_outputs(model, inputs), inputs["labels"])
    return from_logits(class_logits(model, inputs), inputs["labels"], reads)


def from_logits(logits: torch.Tensor, labels: torch.Tensor, reads: str) -> tuple[list[Any], list[Any]]:
    """A classifier's predictions from its logits (N, C): the likeliest class, or its first output."""
    values = logits.argmax(-1) if reads == "classes" else logits[:, 0]
    return values.tolist(), labels.tolist()


def _losses(model: Any, inputs: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Mean loss of each row's target in nats a token, and how many tokens it has."""
    given = {name: value for name, value in inputs.items() if name != "labels"}
    labels, decodes = inputs["labels"], not model.config.is_encoder_decoder
    if not decodes:
        given["labels"] = labels
    logits = model(**given, use_cache=False).logits.float()
    if decodes:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    counts = (labels != IGNORED).sum(1)
    return (losses.sum(1) / counts).tolist(), counts.double().tolist()


def _texts(model: Any, inputs: Mapping[str, Any], tokenizer: Any) -> tuple[list[str], list[str]]:
    """Greedy answers to prompts of `WRITTEN_TOKENS` at most, row by row so that none is padded, and the targets."""
    written, right = [], []
    for row in range(len(inputs["labels"])):
        target = inputs["labels"][row] != IGNORED
        prompt = inputs["attention_mask"][row].bool()
        if not model.config.is_encoder_decoder:
            prompt &= ~target
        given = {name: inputs[name][row][prompt][None] for name in ("input_ids", "attention_mask")}
        sequence = model.generate(**given, max_new_tokens=WRITTEN_TOKENS, do_sample=False, num_beams=1)[0]
        answer = sequence if model.config.is_encoder_decoder else sequence[given["input_ids"].shape[1] :]
        written.append(tokenizer.decode(answer, skip_special_tokens=True))
        right.append(tokenizer.decode(inputs["labels"][row][target], skip_special_tokens=True))
    return written, right
