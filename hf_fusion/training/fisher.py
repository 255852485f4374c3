"""Fisher information of an expert on its data, for Fisher-weighted merging.

measure_fisher("me/bert-irony", rows).save("statistics/irony")
merge(Recipe("fisher", [RecipeExpert("me/bert-irony", parameters={"statistics": "statistics/irony"}), …]), "merged")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from hf_fusion.errors import FusionError
from hf_fusion.hub.load import load_experts
from hf_fusion.hub.task_heads import head_of_architecture
from hf_fusion.training.batches import Examples, class_logits
from hf_fusion.training.expert_statistics import (
    Statistics,
    evaluating,
    make_inputs,
    read_parameters,
    read_rows,
    run_with,
    sample_rows,
)
from hf_fusion.training.per_example_gradients import BATCH_SIZE, squared_gradients
from hf_fusion.training.prompts import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from hf_fusion.hub.load import ExpertLike

Labels = Literal["expected", "sampled", "true"]
MAX_ENUMERATED = 10  # classes up to which the expectation over labels is exact: each takes a backward pass
GENERATIVE = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")


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

    Gradients are squared per example (and class), not after summation over a batch. fusion_bench squares the gradient
    of Σ √p log p, summed over a batch and its classes: a different quantity, which shrinks if examples disagree.

    Memory: one float64 value per parameter and, for models that need one backward pass per example (see
    `per_example_gradients`), one example's gradient; independent of the number of examples. A regressor's y is
    assumed to have unit variance.

    Args:
        expert: as `load_experts` takes it; an adapter is measured together with its base.
        rows: its data, with the columns of `read_examples`; or `Examples`.
        base: an adapter's base, if not the one that it records.
        examples: number of rows, sampled at random.
        labels: the distribution of y. "expected": the exact expectation over all classes, one backward pass each.
            "sampled": one sample from the model's distribution; for text, one per token, given the target's earlier
            tokens. "true": the labels of the rows, which gives the empirical Fisher. Default: "expected" for
            regressors and up to 10 classes, "sampled" for more, "true" for language models.
        max_length: longest sequence, in tokens.
        seed: for the choice of rows, and for sampled labels.

    Returns:
        F of every parameter, by its name and in its shape, fp32.

    Raises:
        FusionError: rows that the expert cannot read, an unknown `labels`, or gradients that are not finite.
    """
    (loaded,) = load_experts([expert], base=base, gates=False)
    head = head_of_architecture(type(loaded.model).__name__)
    generates = head is not None and head.auto in GENERATIVE
    if labels not in (None, "sampled", "true", *(() if generates else ("expected",))):
        raise FusionError(f"labels={labels!r} of {loaded.name}", "use sampled or true" if generates else "use expected")
    read = read_rows(loaded, rows, max_length, labelled=generates or labels == "true")
    chosen, inputs = sample_rows(read, examples, seed), partial(make_inputs, read, model=loaded.model)
    tensors = read_parameters(loaded)
    log = partial(_log_probabilities, is_encoder_decoder=loaded.model.config.is_encoder_decoder if generates else None)
    with evaluating(loaded.model):
        if labels is None:
            with torch.no_grad():
                classes = log(partial(run_with, loaded.model, tensors), inputs(chosen[:1])).shape[1]
            labels = "true" if generates else "expected" if classes <= MAX_ENUMERATED else "sampled"
        terms = partial(_select_terms, labels=labels, generator=torch.Generator().manual_seed(seed))
        batch_size = 1 if generates else BATCH_SIZE  # the logits of every token take much memory
        squares = squared_gradients(loaded.model, tensors, chosen, inputs, log, terms, batch_size)
    if broken := next((name for name, total in squares.items() if not bool(total.isfinite().all())), None):
        raise FusionError(f"{loaded.name}: the gradients of {broken} are not finite")
    found = {name: (total / len(chosen)).float().cpu() for name, total in squares.items()}
    lookup = {name: (name, 1) for name in found}
    return Statistics("fisher", loaded.name, len(chosen), found, lookup, {"labels": labels, "seed": seed})


def _log_probabilities(
    model: Callable[..., Any], inputs: Mapping[str, torch.Tensor], is_encoder_decoder: bool | None
) -> torch.Tensor:
    """Log-probabilities of classes (B, C) or of next tokens (B, T, V), or a regressor's outputs (B, 1).

    Args:
        model: called with the inputs alone.
        inputs: with ``labels``.
        is_encoder_decoder: of a language model; None for classifiers and regressors.
    """
    if is_encoder_decoder is None:
        scores = class_logits(model, inputs)
        return scores if scores.shape[1] == 1 else scores.log_softmax(-1)
    unlabelled_inputs = {name: value for name, value in inputs.items() if name != "labels"}
    logits: torch.Tensor = model(**unlabelled_inputs, use_cache=False).logits.float()
    return (logits if is_encoder_decoder else logits[:, :-1]).log_softmax(-1)  # a causal model predicts the next token


def _select_terms(
    log: torch.Tensor, inputs: Mapping[str, torch.Tensor], labels: Labels, generator: torch.Generator
) -> torch.Tensor:
    """M terms per example, (M, B), whose squared gradients sum to the Fisher information of the example.

    Args:
        log: from `_log_probabilities`.
        inputs: with ``labels`` (B,), or (B, T) tokens for text.
        labels: see `measure_fisher`.
        generator: for sampled labels.
    """
    truth = inputs["labels"]
    if log.dim() == 3:
        truth = truth[:, -log.shape[1] :]
        counted = truth != IGNORED  # (B, T)
        if labels == "sampled":
            sampled = torch.multinomial(log.detach()[counted].exp().cpu(), 1, generator=generator)[:, 0].to(log.device)
            truth = truth.masked_scatter(counted, sampled)
        return (log.gather(-1, truth.clamp(min=0)[..., None])[..., 0] * counted).sum(1)[None]
    if log.shape[1] == 1:  # unit variance: ∇ log p(y|x) = (y - f) ∇f, and E[(y - f)²] = 1
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
    """C - 1 terms whose squared gradients sum to Σ_y p(y) (∇ log p(y))²: one backward pass less than classes.

    With J the Jacobian of the logits, ∇ log p(y) = Jᵀ(e_y - p), so the sum is the diagonal of Jᵀ(diag(p) - ppᵀ)J. The
    matrix diag(p) - ppᵀ is U diag(σ) Uᵀ; one σ is 0, with a constant u; the others satisfy Jᵀu = ∇ Σ_y u_y log p(y).
    """
    p = probabilities.double()  # (B, C)
    values, vectors = torch.linalg.eigh(torch.diag_embed(p) - p[:, :, None] * p[:, None])
    factors = vectors * values.clamp(min=0).sqrt()[:, None]  # (B, C, C), terms in the last dimension
    return torch.einsum("bc,bcm->mb", log, factors[..., 1:].to(log))


__all__ = ["measure_fisher"]
