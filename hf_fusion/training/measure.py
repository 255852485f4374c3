"""What experts are like on their own data: Fisher information, and the Gram matrices of linear layers' inputs.

measure_fisher("me/bert-irony", rows).save("statistics/irony")
merge(Recipe("fisher", [RecipeExpert("me/bert-irony", parameters={"statistics": "statistics/irony"}), …]), "merged")
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_fusion.errors import FusionError
from hf_fusion.hub.heads import head_of_architecture
from hf_fusion.hub.load import load_experts
from hf_fusion.hub.lora import linear_sizes
from hf_fusion.io.saving import in_folder, replacing
from hf_fusion.merging.engine.sources import LAYER
from hf_fusion.merging.engine.tensors import InMemory, Statistic, Tensors, merge_tensors
from hf_fusion.merging.methods.measured import regmean
from hf_fusion.training.batches import Examples, class_logits, equal_lengths, read_examples, to_model, unlabelled
from hf_fusion.training.prompts import IGNORED
from hf_fusion.training.squares import TOGETHER, run_with, squared_gradients
from hf_fusion.types import Expert

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from hf_fusion.hub.load import ExpertLike

Labels = Literal["expected", "sampled", "true"]
FEW = 10  # classes up to which all of them are counted: each takes a backward pass
GENERATES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")


@dataclass
class Statistics:
    """What was measured of one expert.

    Attributes:
        kind: "fisher" or "gram".
        expert: its name.
        examples: how many rows were looked at.
        tensors: what was measured, fp32.
        places: parameter of the model -> the key in `tensors`, and the parameter's dimension that it belongs to.
        facts: what else is worth knowing: "labels" of Fisher information.
    """

    kind: Literal["fisher", "gram"]
    expert: str
    examples: int
    tensors: dict[str, torch.Tensor]
    places: dict[str, tuple[str, int]]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def norm(self) -> float:
        """Euclidean norm of all of it."""
        return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in self.tensors.values()))

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Writes ``KIND.safetensors`` and ``KIND.json``: what a recipe's ``statistics: FOLDER`` names.

        Args:
            folder: created if missing.
            overwrite: whether statistics of this kind that the folder holds may be replaced.

        Raises:
            FusionError: the folder holds some.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        if not overwrite and (folder / f"{self.kind}.json").exists():
            raise FusionError(f"{folder} holds {self.kind}.json already", "another folder, or overwrite=True")
        content = {
            "expert": self.expert,
            "examples": self.examples,
            "norm": self.norm,
            **self.facts,
            "tensors": {name: list(place) for name, place in self.places.items()},
        }
        facts, weights = folder / f"{self.kind}.json", folder / f"{self.kind}.safetensors"
        with in_folder(folder), replacing(facts) as text, replacing(weights) as tensors:
            save_file(self.tensors, tensors, metadata={"format": "pt"})
            text.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            facts.unlink(missing_ok=True)  # no moment shows the tensors of one measurement with the facts of another
        return folder


def measure_fisher(
    expert: ExpertLike,
    rows: Dataset | Examples,
    *,
    base: str | Path | PreTrainedModel | None = None,
    examples: int = 256,
    labels: Labels | None = None,
    max_length: int = 512,
    seed: int = 0,
) -> Statistics:
    """The diagonal of an expert's Fisher information, F = E_x E_y (∇ log p(y|x))² (Matena, Raffel, arXiv 2111.09832).

    Squares are taken example by example (and class by class), not of a batch's sum. fusion_bench squares the gradient
    of Σ √p log p, summed over a batch and its classes: another quantity, which shrinks where examples disagree.

    Memory is taken for the squares, as many as the model's parameters and summed in float64, and for one example's
    gradient where a model has to be asked one by one (see `squares`), whatever the number of examples. A regressor's
    y has the variance 1.

    Args:
        expert: as `load_experts` takes it; of an adapter, its base with it.
        rows: its data, columns as `read_examples` says; or `Examples`.
        base: an adapter's base, where it is not the one it records.
        examples: so many rows are taken, at random.
        labels: how y is drawn. "expected": all classes by their probabilities, exactly; a backward pass each.
            "sampled": one from the model's distribution; of text, each token after those of the target. "true": the
            rows' own, which makes it the empirical Fisher. Default: "expected" for regressors and up to 10 classes,
            "sampled" for more, "true" for language models, whose answers cannot be enumerated.
        max_length: the longest sequence, in tokens.
        seed: of the choice of rows, and of sampled labels.

    Returns:
        F of every parameter, by its name in the model and in its shape.

    Raises:
        FusionError: rows that the expert cannot read, an unknown way to draw labels, gradients that are not finite.
    """
    (loaded,) = load_experts([expert], base=base, gates=False)
    head = head_of_architecture(type(loaded.model).__name__)
    generates = head is not None and head.auto in GENERATES
    if labels not in (None, "sampled", "true", *(() if generates else ("expected",))):
        raise FusionError(f"labels={labels!r} of {loaded.name}", "use sampled or true" if generates else "use expected")
    read = _read(loaded, rows, max_length, labelled=generates or labels == "true")
    chosen, inputs = _chosen(read, examples, seed), partial(_inputs, read, model=loaded.model)
    tensors = parameters_of(loaded)
    log = partial(_log_probabilities, is_encoder_decoder=loaded.model.config.is_encoder_decoder if generates else None)
    with evaluating(loaded.model):
        if labels is None:
            with torch.no_grad():
                classes = log(partial(run_with, loaded.model, tensors), inputs(chosen[:1])).shape[1]
            labels = "true" if generates else "expected" if classes <= FEW else "sampled"
        drawn = partial(_drawn, labels=labels, generator=torch.Generator().manual_seed(seed))
        together = 1 if generates else TOGETHER  # logits of every token are large
        squares = squared_gradients(loaded.model, tensors, chosen, inputs, log, drawn, together)
    if broken := next((name for name, total in squares.items() if not bool(total.isfinite().all())), None):
        raise FusionError(f"{loaded.name}: the gradients of {broken} are not finite")
    found = {name: (total / len(chosen)).float().cpu() for name, total in squares.items()}
    places = {name: (name, 1) for name in found}
    return Statistics("fisher", loaded.name, len(chosen), found, places, {"labels": labels, "seed": seed})


def _log_probabilities(
    model: Callable[..., Any], inputs: Mapping[str, torch.Tensor], is_encoder_decoder: bool | None
) -> torch.Tensor:
    """Of examples: log p of each class (B, C), of each token where an answer's stand (B, T, V), or a score (B, 1).

    Args:
        model: with all that it takes but the inputs.
        inputs: of the examples, with ``labels``.
        is_encoder_decoder: of a language model; None for classifiers and regressors.
    """
    if is_encoder_decoder is None:
        scores = class_logits(model, inputs)
        return scores if scores.shape[1] == 1 else scores.log_softmax(-1)
    given = {name: value for name, value in inputs.items() if name != "labels"}
    logits: torch.Tensor = model(**given, use_cache=False).logits.float()
    return (logits if is_encoder_decoder else logits[:, :-1]).log_softmax(-1)  # a causal model speaks of the next token


def _drawn(
    log: torch.Tensor, inputs: Mapping[str, torch.Tensor], labels: Labels, generator: torch.Generator
) -> torch.Tensor:
    """Terms (M, B) whose squared gradients have the wanted sum: of each example log p of a label, up to a constant.

    Args:
        log: as `_log_probabilities` says.
        inputs: with the examples' own ``labels`` (B,); of text (B, T), the tokens.
        labels: see `measure_fisher`.
        generator: of samples.
    """
    truth = inputs["labels"]
    if log.dim() == 3:
        truth = truth[:, -log.shape[1] :]
        counted = truth != IGNORED  # (B, T)
        if labels == "sampled":
            drawn = torch.multinomial(log.detach()[counted].exp().cpu(), 1, generator=generator)[:, 0].to(log.device)
            truth = truth.masked_scatter(counted, drawn)
        return (log.gather(-1, truth.clamp(min=0)[..., None])[..., 0] * counted).sum(1)[None]
    if log.shape[1] == 1:  # y of variance 1: ∇ log p(y|x) = (y - f) ∇f, whose square is (∇f)² on average
        score = log[:, 0]
        if labels == "true":
            return -(truth.float() - score).square()[None] / 2
        return (score if labels == "expected" else score * torch.randn(len(score), generator=generator).to(score))[None]
    probabilities = log.detach().exp()
    if labels == "expected":
        return _decorrelated(log, probabilities)
    if labels == "sampled":
        truth = torch.multinomial(probabilities.cpu(), 1, generator=generator)[:, 0].to(log.device)
    return log.gather(1, truth[:, None])[None, :, 0]


def _decorrelated(log: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """C - 1 terms whose squared gradients have the sum Σ_y p(y) (∇ log p(y))²: one backward pass less than classes.

    With J that of the logits, ∇ log p(y) = Jᵀ(e_y - p), so that the sum is the diagonal of Jᵀ(diag(p) - ppᵀ)J. The
    matrix in the middle is U diag(σ) Uᵀ; one σ is 0, its u constant; the others have Jᵀu = ∇ Σ_y u_y log p(y).
    """
    p = probabilities.double()  # (B, C)
    values, vectors = torch.linalg.eigh(torch.diag_embed(p) - p[:, :, None] * p[:, None])
    factors = vectors * values.clamp(min=0).sqrt()[:, None]  # (B, C, C), the last of them the terms
    return torch.einsum("bc,bcm->mb", log, factors[..., 1:].to(log))


@torch.no_grad()
def measure_gram(
    expert: ExpertLike,
    rows: Dataset | Examples,
    *,
    base: str | Path | PreTrainedModel | None = None,
    examples: int = 256,
    batch_size: int = 16,
    max_length: int = 512,
    seed: int = 0,
) -> Statistics:
    """XᵀX / N of the inputs X (N, d_in) of every linear layer of an expert on its data, for RegMean (arXiv 2212.09849).

    Linears that read the same input share a matrix. It is summed in float64, and stored in fp32.

    Args:
        expert: as `load_experts` takes it; of an adapter, its base with it.
        rows: its data, columns as `read_examples` says, labels are not looked at; or `Examples`.
        base: an adapter's base, where it is not the one it records.
        examples: so many rows are taken, at random.
        batch_size: at most so many at once; only rows of equal lengths share a batch, so nothing is padded.
        max_length: the longest sequence, in tokens.
        seed: of the choice of rows.

    Returns:
        A matrix (d_in, d_in) for the weight of every linear that ran; ``facts["tokens"]`` has the N of each.

    Raises:
        FusionError: rows that the expert cannot read.
    """
    (loaded,) = load_experts([expert], base=base, gates=False)
    batches = _batches(loaded, rows, examples, batch_size, max_length, seed)
    found = _gram(loaded, parameters_of(loaded), batches, lambda path: True)
    found.facts["seed"] = seed
    return found


@torch.no_grad()
def measure_gram_merged(
    experts: Sequence[ExpertLike],
    rows: Sequence[Dataset | Examples],
    *,
    base: str | Path | PreTrainedModel | None = None,
    weight: Sequence[float] | None = None,
    off_diagonal: float = 0.95,
    examples: int = 256,
    batch_size: int = 16,
    max_length: int = 512,
    seed: int = 0,
) -> list[Statistics]:
    """Gram matrices for RegMean++ (arXiv 2508.03121): layer by layer, of what the merged layers before hand on.

    A layer of an expert reads its own data as the merged model's earlier layers have made it, not its own. So layers
    are merged one after the other: ``regmean`` with these matrices, and with the same `weight` and `off_diagonal`, is
    the model that was merged on the way. What is before the first layer (embeddings) is averaged.

    Args:
        experts: of one architecture, as `load_experts` takes them.
        rows: of each expert, its data.
        base: the adapters' base, where it is not the one they record.
        weight: of each expert; default: alike.
        off_diagonal: as for ``regmean``.
        examples, batch_size, max_length, seed: as for `measure_gram`, of each expert.

    Returns:
        One for each expert, in order.

    Raises:
        FusionError: experts of unlike layers, and rows that an expert cannot read.
    """
    if len(rows) != len(experts):
        raise FusionError(f"{len(experts)} experts, and rows for {len(rows)}", "one data set for each, in order")
    loaded = load_experts(list(experts), base=base, gates=False)
    read = [_batches(e, own, examples, batch_size, max_length, seed) for e, own in zip(loaded, rows, strict=True)]
    parameters = [parameters_of(expert) for expert in loaded]
    found = [Statistics("gram", expert.name, 0, {}, {}, {"tokens": {}, "seed": seed}) for expert in loaded]
    merged: dict[str, torch.Tensor] = {}
    for layer, names in _layers(parameters[0]).items():
        for index, expert in enumerate(loaded if layer else []):
            tensors = parameters[index] | merged  # of the layers that are not merged yet only this one will run
            own = _gram(expert, tensors, read[index], lambda path, names=names: f"{path}.weight" in names, layer)
            found[index].tensors |= own.tensors
            found[index].places |= own.places
            found[index].facts["tokens"] |= own.facts["tokens"]
            found[index].examples = own.examples
        for name in names:
            if all(name in own and own[name].shape == parameters[0][name].shape for own in parameters):
                values = [own[name] for own in parameters]
                merged[name] = _merged(name, values, found, list(weight or [1.0] * len(loaded)), off_diagonal)
    return found


def _merged(
    name: str, values: Sequence[torch.Tensor], found: Sequence[Statistics], weight: list[float], off_diagonal: float
) -> torch.Tensor:
    """One tensor by ``regmean``, with what was measured so far."""
    places = [own.places.get(name) for own in found]
    statistics = [
        Statistic(InMemory(own.tensors[place[0]]), place[1]) if place else None
        for own, place in zip(found, places, strict=True)
    ]
    tensors = Tensors(name, None, [InMemory(value) for value in values], statistics=statistics)
    with torch.inference_mode():  # as the engine does
        merged = regmean(tensors, weight=weight, off_diagonal=off_diagonal)
        flat = torch.cat([own.clone() for _, own in merge_tensors(tensors, merged)])
    return flat.view(values[0].shape).to(values[0].device)


def _layers(names: Iterable[str]) -> dict[str, list[str]]:
    """Parameters by layer, in the order in which a model defines them: path of the layer -> names.

    What is before all layers is at "", what is behind a stack of them at a key of its own.
    """
    found: dict[str, list[str]] = {"": []}
    last = ""
    for name in names:
        match = LAYER.match(name)
        last = f"{match['stack']}.{match['number']}" if match else last
        found.setdefault(last if match or not last else f"behind {last}", []).append(name)
    return found


class _Ran(Exception):
    """The layer that was looked at has run: the rest need not."""


def _gram(
    expert: Expert,
    tensors: Mapping[str, torch.Tensor],
    batches: Iterable[Mapping[str, torch.Tensor]],
    is_wanted: Callable[[str], bool],
    last: str = "",
) -> Statistics:
    """XᵀX / N of the inputs of the linears that are wanted, by their paths.

    Args:
        expert: whose model runs.
        tensors: its parameters, or others in their place.
        batches: its inputs.
        is_wanted: of the path of a linear.
        last: path of a module after which the rest need not run.
    """
    model = expert.model
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    places: dict[str, tuple[str, int]] = {}
    before: list[Any] = [None, ""]  # the last input, and who read it first

    def read(name: str, axis: int, module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        if inputs[0] is before[0]:
            places[name] = (before[1], axis)
            return
        key = places.setdefault(name, (name, axis))[0]
        before[:] = inputs[0], key
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()  # (N, d_in)
        product = (x.T @ x).cpu()
        sums[key] = sums[key].add_(product) if key in sums else product
        counts[key] = counts.get(key, 0) + len(x)

    def stop(*_: object) -> None:
        raise _Ran

    handles = [
        module.register_forward_pre_hook(partial(read, f"{path}.weight", 0 if isinstance(module, Conv1D) else 1))
        for path, module in model.named_modules()
        if linear_sizes(module) is not None and is_wanted(path)
    ]
    if last in dict(model.named_modules()):
        handles.append(model.get_submodule(last).register_forward_hook(stop))
    examples = 0
    try:
        with evaluating(model):
            for inputs in batches:
                examples += len(next(iter(inputs.values())))  # embeddings have no labels
                with suppress(_Ran):
                    run_with(model, tensors, **{k: v for k, v in inputs.items() if k != "labels"})
                before[:] = None, ""
    finally:
        for handle in handles:
            handle.remove()
    means = {key: (total / counts[key]).float() for key, total in sums.items()}
    return Statistics("gram", expert.name, examples, means, places, {"tokens": counts})


# ---------------------------------------------------------------- reading


def _read(expert: Expert, rows: Dataset | Examples, max_length: int, labelled: bool = False) -> Examples:
    if isinstance(rows, Examples):
        return rows
    return read_examples(expert, rows if labelled else unlabelled(rows), max_length)


def _chosen(read: Examples, examples: int, seed: int) -> list[Any]:
    """So many rows, at random."""
    if examples < 1:
        raise FusionError(f"examples={examples} measures nothing", "examples=256")
    order = torch.randperm(len(read.rows), generator=torch.Generator().manual_seed(seed))
    return [read.rows[place] for place in order[:examples].tolist()]


def _batches(
    expert: Expert, rows: Dataset | Examples, examples: int, batch_size: int, max_length: int, seed: int
) -> list[dict[str, torch.Tensor]]:
    """Rows as inputs, without padding."""
    read = _read(expert, rows, max_length)
    return [_inputs(read, own, expert.model) for own in equal_lengths(_chosen(read, examples, seed), batch_size)]


def _inputs(read: Examples, rows: list[Any], model: Any) -> dict[str, torch.Tensor]:
    """Rows as a model's inputs, in single precision."""
    inputs = to_model(read.collate(rows), model)
    return {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}


def parameters_of(expert: Expert) -> dict[str, torch.Tensor]:
    """An expert's parameters in single precision, those of an adapter in place of its base's.

    Raises:
        FusionError: the adapter changes what the base does not have.
    """
    model, adapter = expert.model, expert.adapter
    found = {name: parameter.detach().float() for name, parameter in model.named_parameters()}
    if adapter is None:
        return found
    changed = [*adapter.saved, *(f"{path}.weight" for path in adapter.lora)]
    if missing := [name for name in changed if name not in found]:
        raise FusionError(f"{expert.name} changes {missing[0]}, which is no parameter of its base, or one that is tied")
    for path, (a, b) in adapter.lora.items():
        weight = found[f"{path}.weight"]
        update = b.to(weight) @ a.to(weight)  # (d_out, d_in)
        found[f"{path}.weight"] = weight + (update.T if isinstance(model.get_submodule(path), Conv1D) else update)
    return found | {name: tensor.to(model.device, torch.float32) for name, tensor in adapter.saved.items()}


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without dropout, and with gradients of embeddings that hold no rows of zeros, for a while."""
    was_training, dense = model.training, [m for m in model.modules() if isinstance(m, nn.Embedding) and not m.sparse]
    model.eval()
    for module in dense:
        module.sparse = True
    try:
        yield
    finally:
        model.train(was_training)
        for module in dense:
            module.sparse = False


__all__ = [
    "Statistics",
    "evaluating",
    "measure_fisher",
    "measure_gram",
    "measure_gram_merged",
    "parameters_of",
    "run_with",
]
