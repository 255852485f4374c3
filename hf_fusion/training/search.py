"""Weights and choices of a merge that are found by trying: LoraHub's search over adapters, and greedy soups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_fusion.errors import FusionError
from hf_fusion.extras import refuse_missing
from hf_fusion.hub.load import load_experts
from hf_fusion.merging.methods.lora import lora
from hf_fusion.recipe import Recipe, RecipeExpert
from hf_fusion.training.batches import Examples, like_lengths, read_examples, score_rows, to_model
from hf_fusion.training.measure import evaluating, parameters_of, run_with
from hf_fusion.types import Adapter, Expert

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from hf_fusion.hub.load import ExpertLike

FIRST_STEP = 0.5  # a sixth of LoraHub's range: how far COBYLA's first points lie from the start


@dataclass(frozen=True)
class Search:
    """What a search over weights found.

    Attributes:
        names: of what is weighed, as recipes call it.
        weights: the best that were tried.
        loss: with them, the penalty left out.
        start: the loss where all weights are 0.
        tried: how many weights were tried.
    """

    names: list[str]
    weights: list[float]
    loss: float
    start: float
    tried: int

    @property
    def recipe(self) -> Recipe:
        """The adapters as one, with these weights."""
        pairs = zip(self.names, self.weights, strict=True)
        return Recipe("lora", tuple(RecipeExpert(name, weight) for name, weight in pairs))


def search_weights(
    loss: Callable[[list[float]], float],
    names: Sequence[str],
    *,
    steps: int = 40,
    limit: float = 1.5,
    l1: float = 0.05,
) -> Search:
    """Weights in [-limit, limit] with a small loss, without gradients: min_w loss(w) + l1 · mean |w_i|, from w = 0.

    By COBYLA (Powell, 1994), which is what nevergrad's NGOpt, the optimizer of LoraHub, chooses for so few steps.

    Args:
        loss: of the weights.
        names: what is weighed.
        steps: how many weights are tried at most; fewer than about 2 + their number only look around.
        limit: of a weight's magnitude.
        l1: how much large weights cost.

    Raises:
        FusionError: scipy is not installed, or the loss is not finite where all weights are 0.
    """
    try:
        from scipy.optimize import minimize
    except ImportError as error:
        refuse_missing(error, "the search over weights", extra="bench")
        raise
    found: list[tuple[float, float, list[float]]] = []

    def tried(point: Any) -> float:
        weights = [min(limit, max(-limit, float(w))) for w in point]
        value = loss(weights)
        total = value + l1 * sum(map(abs, weights)) / len(weights)
        total = total if total == total else float("inf")
        found.append((total, value, weights))
        return min(total, 1e30)

    zeros = [0.0] * len(names)
    first = tried(zeros)
    if first >= 1e30:
        raise FusionError(f"the loss is {found[0][1]} where all weights are 0: nothing can be compared with it")
    if steps > 1:
        known = {tuple(zeros): first}  # the start was tried already
        bounds = [(-limit, limit)] * len(names)
        options = {"maxiter": steps, "rhobeg": min(FIRST_STEP, limit)}
        minimize(lambda w: known.get(tuple(w)) or tried(w), zeros, method="COBYLA", bounds=bounds, options=options)
    _, value, weights = min(found, key=lambda one: one[0])
    return Search(list(names), weights, value, found[0][1], len(found))


@torch.no_grad()
def lorahub(
    adapters: Sequence[ExpertLike],
    rows: Dataset | Examples,
    *,
    base: str | Path | PreTrainedModel | None = None,
    steps: int = 40,
    limit: float = 1.5,
    l1: float = 0.05,
    batch_size: int = 16,
    max_length: int = 512,
) -> Search:
    """How much of every adapter a new task needs, from a few of its rows (LoraHub, arXiv 2307.13269).

    The loss of the rows is minimised over the weights of Σ w_i ΔW_i, without gradients. LoraHub sums the factors,
    (Σ w_i B_i)(Σ w_i A_i), for which all must have one rank, and which has products of every two adapters besides; here
    the updates are summed, as everywhere. Nothing larger than the base with its adapters is held.

    Args:
        adapters: of one base, as `load_experts` takes them.
        rows: of the new task, a few are enough; columns as `read_examples` says.
        base: the adapters' base, where it is not the one they record.
        steps, limit, l1: see `search_weights`; by default as in LoraHub.
        batch_size: rows at once.
        max_length: the longest sequence, in tokens.

    Returns:
        Weights; ``recipe`` makes one adapter of them: ``merge(lorahub(…).recipe, folder)``.

    Raises:
        FusionError: experts that are no adapters of one base, or that saved modules of their own; and rows that the
            base cannot read.
    """
    loaded = load_experts(list(adapters), base=base, gates=False)
    found: list[Adapter] = []
    for expert in loaded:
        if expert.adapter is None or expert.model is not loaded[0].model:
            what = "is no adapter" if expert.adapter is None else "is an adapter of another base"
            raise FusionError(f"{expert.name} {what}", "lorahub weighs LoRA adapters of one base")
        found.append(expert.adapter)
    saved = found[0].saved
    for expert, own in zip(loaded, found, strict=True):
        if own.saved.keys() != saved.keys() or not all(own.saved[name].equal(saved[name]) for name in saved):
            name = next(iter(own.saved | saved))
            raise FusionError(f"{expert.name} saves {name} whole, of its own: such modules have no weighted sum")
    first = loaded[0]
    read = rows if isinstance(rows, Examples) else read_examples(first, rows, max_length)
    batches = list(_batches(read, batch_size))
    paths = list(dict.fromkeys(path for own in found for path in own.lora))

    def loss(weights: list[float]) -> float:
        merged = {path: lora([own.lora.get(path) for own in found], weight=weights) for path in paths}
        adapter = Adapter({path: (own.a, own.b) for path, own in merged.items()}, saved)
        tensors = parameters_of(Expert(first.name, first.model, adapter))
        total = 0.0
        for inputs, count in batches:
            total += count * float(read.loss(partial(run_with, first.model, tensors), to_model(inputs, first.model)))
        return total / len(read.rows)

    with evaluating(first.model):
        return search_weights(loss, _names(adapters, loaded), steps=steps, limit=limit, l1=l1)


@dataclass(frozen=True)
class Soup:
    """What a greedy soup is made of.

    Attributes:
        names: of all models, best first, as recipes call them.
        scores: of each alone.
        chosen: the models in the soup, in the order in which they came in.
        score: of the soup.
    """

    names: list[str]
    scores: list[float]
    chosen: list[str]
    score: float

    @property
    def recipe(self) -> Recipe:
        """The average of what was chosen."""
        return Recipe("linear", tuple(map(RecipeExpert, self.chosen)))


@torch.no_grad()
def greedy_soup(
    experts: Sequence[ExpertLike],
    rows: Dataset | Examples,
    *,
    base: str | Path | PreTrainedModel | None = None,
    metric: str | None = None,
    batch_size: int = 64,
    max_length: int = 512,
) -> Soup:
    """Which of several fine-tunes for one task make the best average (model soups, arXiv 2203.05482, recipe 1).

    Models come in from the best to the worst, by their scores on rows kept apart; each stays if the average with it is
    no worse than the one without. Two models are held at a time.

    Args:
        experts: of one architecture and one label space, as `load_experts` takes them.
        rows: that nothing was trained on; columns as `read_examples` says.
        base: the adapters' base, where it is not the one they record.
        metric: "accuracy" of classes (default), or of a language model's answers "exact" or the share of right
            "tokens" (default).
        batch_size: rows at once.
        max_length: the longest sequence, in tokens.

    Returns:
        The choice; ``recipe`` makes the soup: ``merge(greedy_soup(…).recipe, folder)``.

    Raises:
        FusionError: experts of unlike tensors or labels, and rows that they cannot read.
    """
    if not experts:
        raise FusionError("a soup needs at least one model; the list is empty")
    labels: list[str] | None = None
    scores: list[tuple[float, str, ExpertLike]] = []

    def opened(given: ExpertLike) -> tuple[Expert, dict[str, torch.Tensor]]:
        [expert] = load_experts([given], base=base, gates=False)
        found, known = parameters_of(expert), dict(expert.model.named_parameters(remove_duplicate=False))
        for name, own in expert.model.state_dict().items():  # buffers that are saved are averaged as well
            if name not in known and own.is_floating_point():
                found[name] = own.float()
        return expert, found

    def score(expert: Expert, tensors: Mapping[str, torch.Tensor]) -> float:
        read = rows if isinstance(rows, Examples) else read_examples(expert, rows, max_length)
        kind = metric or ("accuracy" if expert.labels or isinstance(rows, Examples) else "tokens")
        model, total = _With(expert.model, tensors), 0.0
        with evaluating(expert.model):
            for inputs, _ in _batches(read, batch_size):
                total += float(score_rows(model, to_model(inputs, expert.model), kind).float().sum())
        return total / len(read.rows)

    for given in experts:
        expert, tensors = opened(given)
        if labels is not None and list(expert.labels) != labels:
            raise FusionError(f"{expert.name} has the labels {expert.labels}, the first has {labels}")
        labels = list(expert.labels)
        scores.append((score(expert, tensors), _names([given], [expert])[0], given))
    scores.sort(key=lambda one: -one[0])  # equally good ones stay in order
    chosen, best = [scores[0][1]], scores[0][0]
    expert, soup = opened(scores[0][2])
    for _, name, given in scores[1:]:
        other, tensors = opened(given)
        if wrong := [n for n in soup if n not in tensors or tensors[n].shape != soup[n].shape]:
            raise FusionError(f"{other.name} has no {wrong[0]} of {list(soup[wrong[0]].shape)}, as {expert.name} has")
        mixed = {n: own.lerp(tensors[n].to(own.device), 1 / (len(chosen) + 1)) for n, own in soup.items()}
        if (now := score(expert, mixed)) >= best:
            chosen, best, soup = [*chosen, name], now, mixed
    return Soup([name for _, name, _ in scores], [alone for alone, _, _ in scores], chosen, best)


class _With:
    """A model with other tensors in the place of its own."""

    def __init__(self, model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
        self.model, self.tensors, self.config, self.forward = model, tensors, model.config, model.forward

    def __call__(self, **inputs: Any) -> Any:
        return run_with(self.model, self.tensors, **inputs)


def _batches(read: Examples, batch_size: int) -> Iterator[tuple[Any, int]]:
    """Inputs, and of how many rows."""
    for places in like_lengths(read.rows, batch_size):
        yield read.collate([read.rows[place] for place in places]), len(places)


def _names(given: Sequence[ExpertLike], loaded: Sequence[Expert]) -> list[str]:
    """What finds experts again: ids at the commit that was loaded, or folders."""
    return [
        str(expert.ref)
        if expert.revision
        else str(Path(one).resolve())
        if isinstance(one, (str, Path))
        else expert.name
        for one, expert in zip(given, loaded, strict=True)
    ]


__all__ = ["Search", "Soup", "greedy_soup", "lorahub", "search_weights"]
