"""Black-box search for merging weights: LoraHub's search over adapters, and greedy model soups."""

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
from hf_fusion.training.batches import Examples, batch_indices_by_length, read_examples, score_rows, to_model
from hf_fusion.training.expert_statistics import evaluating, read_parameters, run_with
from hf_fusion.types import Adapter, Expert

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from hf_fusion.hub.load import ExpertLike

FIRST_STEP = 0.5  # a sixth of LoraHub's range: COBYLA's initial trust-region radius


@dataclass(frozen=True)
class Search:
    """The result of `search_weights`.

    Attributes:
        names: of the experts, as in recipes.
        weights: the best evaluated weights, one per name.
        loss: at these weights, without the penalty.
        start: the loss with all weights 0.
        evaluations: how many weight vectors were evaluated.
    """

    names: list[str]
    weights: list[float]
    loss: float
    start: float
    evaluations: int

    @property
    def recipe(self) -> Recipe:
        """Merges the adapters to one, with these weights."""
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
    """Minimises loss(w) + l1 · mean |w_i| over weights in [-limit, limit], without gradients, from w = 0.

    Uses COBYLA (Powell, 1994), which nevergrad's NGOpt, LoraHub's optimizer, also selects for this few steps.

    Args:
        loss: of a weight vector.
        names: one per weight.
        steps: maximum number of evaluations; with fewer than about 2 + len(names), COBYLA only explores.
        limit: maximum magnitude of a weight.
        l1: weight of the L1 penalty.

    Raises:
        FusionError: scipy is not installed, or the loss with all weights 0 is not finite.
    """
    try:
        from scipy.optimize import minimize
    except ImportError as error:
        refuse_missing(error, "the search over weights", extra="bench")
        raise
    found: list[tuple[float, float, list[float]]] = []

    def evaluate(point: Sequence[float]) -> float:
        weights = [min(limit, max(-limit, float(w))) for w in point]
        value = loss(weights)
        total = value + l1 * sum(map(abs, weights)) / len(weights)
        total = total if total == total else float("inf")
        found.append((total, value, weights))
        return min(total, 1e30)

    zeros = [0.0] * len(names)
    first = evaluate(zeros)
    if first >= 1e30:
        raise FusionError(f"the loss with all weights 0 is {found[0][1]}, not a finite number to improve on")
    if steps > 1:
        known = {tuple(zeros): first}  # evaluated above
        bounds = [(-limit, limit)] * len(names)
        options = {"maxiter": steps, "rhobeg": min(FIRST_STEP, limit)}
        minimize(lambda w: known.get(tuple(w)) or evaluate(w), zeros, method="COBYLA", bounds=bounds, options=options)
    _, value, weights = min(found, key=lambda entry: entry[0])
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
    """Weights of adapters for a new task, from a few of its rows (LoraHub, arXiv 2307.13269).

    Minimises the loss on the rows over the weights of Σ w_i ΔW_i, without gradients. LoraHub sums the factors,
    (Σ w_i B_i)(Σ w_i A_i), which requires equal ranks and adds cross terms of every two adapters; here the updates are
    summed, as in every LoRA merge of this package. Needs the memory of the base, its adapters and an fp32 copy.

    Args:
        adapters: of one base, as `load_experts` takes them.
        rows: of the new task, a few are enough; with the columns of `read_examples`.
        base: the adapters' base, if not the one that they record.
        steps, limit, l1: see `search_weights`; the defaults are LoraHub's.
        batch_size: rows per batch.
        max_length: longest sequence, in tokens.

    Returns:
        The weights; ``recipe`` merges the adapters with them: ``merge(lorahub(…).recipe, folder)``.

    Raises:
        FusionError: an expert is not an adapter of the common base, adapters saved different modules in full, or the
            base cannot read the rows.
    """
    loaded = load_experts(list(adapters), base=base, gates=False)
    found: list[Adapter] = []
    for expert in loaded:
        if expert.adapter is None or expert.model is not loaded[0].model:
            what = "is not an adapter" if expert.adapter is None else "is an adapter of another base"
            raise FusionError(f"{expert.name} {what}", "lorahub combines LoRA adapters of one base")
        found.append(expert.adapter)
    saved = found[0].saved
    for expert, adapter in zip(loaded, found, strict=True):
        others = adapter.saved
        if others.keys() != saved.keys() or not all(others[name].equal(saved[name]) for name in saved):
            name = next(iter(others | saved))
            raise FusionError(f"{expert.name} saves {name} in full, unlike {loaded[0].name}: it cannot be weighted")
    first = loaded[0]
    read = rows if isinstance(rows, Examples) else read_examples(first, rows, max_length)
    batches = list(_batches(read, batch_size))
    paths = list(dict.fromkeys(path for adapter in found for path in adapter.lora))

    def loss(weights: list[float]) -> float:
        merged = {path: lora([adapter.lora.get(path) for adapter in found], weight=weights) for path in paths}
        adapter = Adapter({path: (update.a, update.b) for path, update in merged.items()}, saved)
        tensors = read_parameters(Expert(first.name, first.model, adapter))
        total = 0.0
        for inputs, count in batches:
            total += count * float(read.loss(partial(run_with, first.model, tensors), to_model(inputs, first.model)))
        return total / len(read.rows)

    with evaluating(first.model):
        return search_weights(loss, _names(adapters, loaded), steps=steps, limit=limit, l1=l1)


@dataclass(frozen=True)
class Soup:
    """The result of `greedy_soup`.

    Attributes:
        names: of all models, best first, as in recipes.
        scores: of each model alone, in the order of `names`.
        chosen: the models in the soup, in the order of their selection.
        score: of the soup.
    """

    names: list[str]
    scores: list[float]
    chosen: list[str]
    score: float

    @property
    def recipe(self) -> Recipe:
        """The average of the chosen models."""
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
    """Selects the fine-tunes of one task to average (greedy model soup, arXiv 2203.05482, recipe 1).

    Models are added in order of their scores on a validation split; each is kept if the average with it scores no
    worse than the average without it. Two models are in memory at a time.

    Args:
        experts: of one architecture and one label space, as `load_experts` takes them.
        rows: validation split, not used in training; with the columns of `read_examples`.
        base: the adapters' base, if not the one that they record.
        metric: "accuracy" for classes (default); for language models "exact" match, or the share of correct "tokens"
            (default).
        batch_size: rows per batch.
        max_length: longest sequence, in tokens.

    Returns:
        The selection; ``recipe`` averages it: ``merge(greedy_soup(…).recipe, folder)``.

    Raises:
        FusionError: the list is empty, tensors or labels of the experts differ, or an expert cannot read the rows.
    """
    if not experts:
        raise FusionError("a soup needs at least one model; the list is empty")
    labels: list[str] | None = None
    scores: list[tuple[float, str, ExpertLike]] = []

    def load(source: ExpertLike) -> tuple[Expert, dict[str, torch.Tensor]]:
        [expert] = load_experts([source], base=base, gates=False)
        found, known = read_parameters(expert), dict(expert.model.named_parameters(remove_duplicate=False))
        for name, tensor in expert.model.state_dict().items():  # persistent buffers are averaged too
            if name not in known and tensor.is_floating_point():
                found[name] = tensor.float()
        return expert, found

    def score(expert: Expert, tensors: Mapping[str, torch.Tensor]) -> float:
        read = rows if isinstance(rows, Examples) else read_examples(expert, rows, max_length)
        kind = metric or ("accuracy" if expert.labels or isinstance(rows, Examples) else "tokens")
        model, total = _ReplacedParameters(expert.model, tensors), 0.0
        with evaluating(expert.model):
            for inputs, _ in _batches(read, batch_size):
                total += float(score_rows(model, to_model(inputs, expert.model), kind).float().sum())
        return total / len(read.rows)

    for source in experts:
        expert, tensors = load(source)
        if labels is not None and list(expert.labels) != labels:
            raise FusionError(f"{expert.name} has the labels {expert.labels}, the first has {labels}")
        labels = list(expert.labels)
        scores.append((score(expert, tensors), _names([source], [expert])[0], source))
    scores.sort(key=lambda entry: -entry[0])  # stable: ties keep their order
    chosen, best = [scores[0][1]], scores[0][0]
    expert, soup = load(scores[0][2])
    for _, name, source in scores[1:]:
        other, tensors = load(source)
        if wrong := [n for n in soup if n not in tensors or tensors[n].shape != soup[n].shape]:
            raise FusionError(f"{other.name} has no {wrong[0]} of {list(soup[wrong[0]].shape)}, as {expert.name} has")
        mixed = {n: mean.lerp(tensors[n].to(mean.device), 1 / (len(chosen) + 1)) for n, mean in soup.items()}
        if (now := score(expert, mixed)) >= best:
            chosen, best, soup = [*chosen, name], now, mixed
    return Soup([name for _, name, _ in scores], [alone for alone, _, _ in scores], chosen, best)


class _ReplacedParameters:
    """A model that runs with replaced parameters."""

    def __init__(self, model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> None:
        self.model, self.tensors, self.config, self.forward = model, tensors, model.config, model.forward

    def __call__(self, **inputs: Any) -> Any:
        return run_with(self.model, self.tensors, **inputs)


def _batches(read: Examples, batch_size: int) -> Iterator[tuple[Any, int]]:
    """Model inputs, and the number of their rows."""
    for indices in batch_indices_by_length(read.rows, batch_size):
        yield read.collate([read.rows[index] for index in indices]), len(indices)


def _names(sources: Sequence[ExpertLike], loaded: Sequence[Expert]) -> list[str]:
    """Reproducible references: ids at the commit that was loaded, or absolute folders."""
    return [
        str(expert.ref)
        if expert.revision
        else str(Path(source).resolve())
        if isinstance(source, (str, Path))
        else expert.name
        for source, expert in zip(sources, loaded, strict=True)
    ]


__all__ = ["Search", "Soup", "greedy_soup", "lorahub", "search_weights"]
