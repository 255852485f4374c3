"""Fits the fuser of a Fusion of Experts on labelled examples, optionally with the frugal variant."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard, cast

import datasets
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_fusion.errors import FusionError
from hf_fusion.models.frugal_foe import FrugalPolicy, candidate_subsets
from hf_fusion.models.fused_html import facts_table
from hf_fusion.progress import phase
from hf_fusion.training.callbacks import set_progress
from hf_fusion.training.costs import measure_latency, set_costs
from hf_fusion.training.outputs import ExpertOutputs, collect_outputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerControl, TrainerState

    from hf_fusion.models.fuser_foe import Fuser
    from hf_fusion.models.modeling_foe import FoEModel

logger = logging.getLogger(__name__)

FULL_SHARE = 0.5  # share of training rows without expert dropout, in training for the frugal variant
COST_WEIGHTS = (0.0, *(2.0 ** (power / 2) for power in range(-16, 11)))  # candidate lambdas for the default
MAX_VALIDATION_POINTS = 1500  # stored in a frugal model, for its nearest-neighbour search


@dataclass
class Fit:
    """The report of `fit_fuser`.

    Attributes:
        train_rows: size of the training split.
        held_out_rows: size of the validation split.
        loss: validation loss of the fuser that was kept.
        accuracy: its validation accuracy (in selection mode, of choosing the expert); None for regression.
        cost_weight: lambda of the frugal variant, or None.
        missing_labels: fused labels without a training row, which the fuser cannot have learned.
    """

    train_rows: int
    held_out_rows: int
    loss: float
    accuracy: float | None
    cost_weight: float | None
    missing_labels: list[str]

    def _repr_html_(self) -> str:
        return facts_table(vars(self))


def fit_fuser(
    model: PreTrainedModel,
    dataset: datasets.Dataset,
    *,
    by: str = "domain",
    frugal: bool = False,
    neighbors: int = 10,
    cost_weight: float | None = None,
    costs: Sequence[float] | str | None = None,
    tolerance: float = 0.02,
    holdout: float = 0.25,
    epochs: int = 60,
    patience: int = 6,
    learning_rate: float | None = None,
    weight_decay: float = 1e-4,
    batch_size: int = 64,
    seed: int = 0,
    label_column: str = "label",
    expert_column: str = "expert",
    inference_batch_size: int = 32,
) -> Fit:
    """Fits the fuser of `model` in place; the experts are frozen and run once (their outputs are cached).

    AdamW with a cosine schedule, as in the paper (arXiv 2310.01542), with early stopping on the validation loss. Runs
    on transformers' Trainer, so `accelerate launch` distributes it. The same seed gives the same weights.

    Args:
        model: a FoE from `FoEModel.from_experts`.
        dataset: labelled examples, see `collect_outputs`.
        by: in selection mode, the target expert of an example: "domain" (column `expert_column`) or "loss" (the
            expert with the lowest loss on it).
        frugal: also train the fuser on subsets of the experts, and store validation points in the model, from which
            it decides at inference which experts to query.
        neighbors: kappa of the frugal variant, the number of nearest neighbours.
        cost_weight: lambda of the frugal variant; default: the largest for which the mean probability of the true
            label on the validation split is at most `tolerance` below that of querying every expert.
        costs: query costs, one per expert in any unit, or "latency" to measure seconds; default: those in the
            model's config (parameter counts).
        tolerance: see `cost_weight`.
        holdout: share of the rows in the validation split.
        epochs: maximum number of epochs.
        patience: epochs without a lower validation loss after which training stops.
        learning_rate: default 1e-3, as in the paper; 3e-4 in selection mode, where features are many and rows few.
        weight_decay: of AdamW.
        batch_size: training examples per step and process.
        seed: for the split, the initial weights and the order of the examples.
        label_column: column with the labels.
        expert_column: column with the expert of each example's domain.
        inference_batch_size: examples per forward pass of the experts.

    Returns:
        Sizes of the splits and validation metrics.

    Raises:
        FusionError: for data that is empty, unlabelled or too small to split, or a model without a fuser.
    """
    if not has_fuser(model):
        raise FusionError(f"{type(model).__name__} has no fuser to fit", hint="it is ready as it is: hf-fusion eval")
    selection = model.config.mode == "selection"
    if frugal and selection:
        raise FusionError("frugal=True belongs to output fusion; in selection only the chosen expert answers")
    if by not in ("domain", "loss"):
        raise FusionError(f"by={by!r} must be 'domain' or 'loss'")
    if costs is not None:
        seconds = measure_latency(model, dataset) if costs == "latency" else costs
        set_costs(model, seconds)
    needs_losses = selection and by == "loss" and bool(model.config.vocabularies)
    column = "target" if needs_losses else expert_column if selection and by == "domain" else label_column
    if column not in dataset.column_names:
        raise FusionError(
            f"the data set has columns {dataset.column_names}, but no {column!r} to learn from",
            "name it: fit_fuser(..., label_column=...), or expert_column= in selection",
        )
    collected = collect_outputs(
        model,
        dataset,
        label_column=label_column,
        expert_column=expert_column,
        losses=needs_losses,
        batch_size=inference_batch_size,
    )
    targets = _selection_targets(collected, by) if selection else collected.labels
    assert targets is not None  # the column was checked above
    regression = model.config.problem_type == "regression" and not selection
    set_seed(seed)
    current = cast("Fuser", model.fuser)  # not a `FixedFuser`, which has no parameters
    fuser = type(current)(
        collected.features.shape[1],
        model.config.fuser_hidden,
        current.output.out_features,
        model.config.fuser_dropout,
    )
    loss, train_rows, held_rows = train_fuser(
        fuser,
        collected.features,
        targets,
        experts=model.config.num_experts if frugal else 0,
        holdout=holdout,
        epochs=epochs,
        patience=patience,
        learning_rate=learning_rate or (3e-4 if selection else 1e-3),
        weight_decay=weight_decay,
        batch_size=batch_size,
        seed=seed,
        use_cpu=model.device.type == "cpu",
    )
    with torch.no_grad():
        correct = fuser(collected.features[held_rows]).argmax(1) == targets[held_rows]
    model.fuser.load_state_dict(fuser.state_dict())
    model.config.fitted = True
    model.eval()
    seen = set(targets[train_rows].tolist()) if not regression else set()
    names = [e["name"] for e in model.config.experts] if selection else list((model.config.id2label or {}).values())
    missing = [] if regression else [name for index, name in enumerate(names) if index not in seen]
    if missing:
        logger.warning("no training row is labelled %s: the fuser cannot learn to predict it", ", ".join(missing))
    if frugal:
        with phase("Fitting the frugal variant"):
            cost_weight = _fit_frugal(model, fuser, collected, held_rows, neighbors, cost_weight, tolerance)
    return Fit(
        train_rows=len(train_rows),
        held_out_rows=len(held_rows),
        loss=loss,
        accuracy=None if regression else float(correct.float().mean()),
        cost_weight=cost_weight if frugal else None,
        missing_labels=missing,
    )


def has_fuser(model: PreTrainedModel) -> TypeGuard[FoEModel]:
    """Whether a model is a Fusion of Experts with a fuser that learns: an ensemble has none."""
    return bool(list(getattr(model, "fuser", nn.Module()).parameters()))


def train_fuser(
    fuser: Fuser,
    features: torch.Tensor,
    targets: torch.Tensor,
    *,
    use_cpu: bool,
    experts: int = 0,
    holdout: float = 0.25,
    epochs: int = 60,
    patience: int = 6,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-4,
    batch_size: int = 64,
    seed: int = 0,
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Trains a fuser in place on precomputed expert outputs, see `fit_fuser`.

    Args:
        fuser: features → logits (N, C), or values (N, 1).
        features: (N, d).
        targets: (N,), class indices, or float targets for regression.
        use_cpu: run on the CPU even if there is a GPU. Must match the process's models: accelerate keeps one device.
        experts: for the frugal variant, the number of experts whose outputs make up the features; otherwise 0.
        holdout: see `fit_fuser`.
        epochs: see `fit_fuser`.
        patience: see `fit_fuser`.
        learning_rate: see `fit_fuser`.
        weight_decay: see `fit_fuser`.
        batch_size: see `fit_fuser`.
        seed: see `fit_fuser`.

    Returns:
        The validation loss, the row indices of the training split, and those of the validation split.

    Raises:
        FusionError: for too few rows, or a loss that is not finite.
    """
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    held = max(1, round(holdout * len(features)))
    if len(features) - held < 1:
        raise FusionError(f"{len(features)} examples are too few to fit a fuser on and hold some out; give it more")
    held_rows, train_rows = order[:held], order[held:]
    task = _FuserTask(fuser, experts, targets.is_floating_point())
    if task.regression:  # initial predictions are the mean target, whatever its scale
        nn.init.constant_(fuser.output.bias, float(targets[train_rows].mean()))
    train, test = (_Rows(features[rows], targets[rows]) for rows in (train_rows, held_rows))
    best = _EarlyStopping(patience)
    with tempfile.TemporaryDirectory(prefix="hf_fusion_fit_") as folder:  # required by the Trainer; nothing is saved
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            lr_scheduler_type="cosine",
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=4096,
            eval_strategy="epoch",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=use_cpu,
            seed=seed,
            data_seed=seed,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        trainer = Trainer(model=task, args=arguments, train_dataset=train, eval_dataset=test, callbacks=[best])
        set_progress(trainer, "Training the fuser")
        trainer.train()
    if not best.weights:
        raise FusionError(
            "the fuser's validation loss is not finite", "look for NaN or Inf in the labels, and lower learning_rate"
        )
    task.load_state_dict(best.weights)
    fuser.to("cpu").eval()
    return best.loss, train_rows, held_rows


def _selection_targets(collected: ExpertOutputs, by: str) -> torch.Tensor | None:
    """Index of the target expert of each example, (N,)."""
    if by == "domain":
        return collected.experts
    if collected.losses is not None:
        return collected.losses.argmin(1)
    if collected.outputs is None or collected.labels is None:
        return None
    rows = torch.arange(len(collected))
    return collected.outputs[rows, :, collected.labels].argmax(1)  # lowest loss = highest probability of the true label


class _FuserTask(nn.Module):
    """The fuser and its loss, with the interface of the Trainer.

    With `experts`, training zeroes the outputs of random subsets of the experts, as if they were not queried, so that
    one fuser stands for the f_S of every subset S.
    """

    def __init__(self, fuser: nn.Module, experts: int, regression: bool) -> None:
        super().__init__()
        self.fuser, self.experts, self.regression = fuser, experts, regression

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.training and self.experts:
            features = features * self._random_subsets(len(features), features).repeat_interleave(
                features.shape[1] // self.experts, 1
            )
        logits = self.fuser(features)
        if self.regression:
            loss = nn.functional.mse_loss(logits.squeeze(-1), labels)
        else:
            loss = nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}

    def _random_subsets(self, rows: int, like: torch.Tensor) -> torch.Tensor:
        """Masks (rows, K) of 0 and 1: all experts for `FULL_SHARE` of the rows, else a subset of random size."""
        size = torch.randint(1, self.experts + 1, (rows, 1), device=like.device)
        rank = torch.rand(rows, self.experts, device=like.device).argsort(1).argsort(1)
        full = torch.rand(rows, 1, device=like.device) < FULL_SHARE
        return ((rank < size) | full).to(like.dtype)


class _Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Features and targets by row."""

    def __init__(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        self.features, self.targets = features, targets

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"features": self.features[index], "labels": self.targets[index]}


class _EarlyStopping(TrainerCallback):
    """Keeps the weights of the epoch with the lowest validation loss in memory, and stops after `patience` epochs."""

    def __init__(self, patience: int) -> None:
        self.patience, self.epochs_since_best = patience, 0
        self.loss = float("inf")
        self.weights: dict[str, torch.Tensor] = {}

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        metrics: Mapping[str, float],
        model: nn.Module,
        **_: object,
    ) -> None:
        """After every epoch."""
        self.epochs_since_best += 1
        if metrics["eval_loss"] < self.loss:
            self.loss, self.epochs_since_best = metrics["eval_loss"], 0
            self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        control.should_training_stop = self.epochs_since_best >= self.patience


@torch.no_grad()
def _fit_frugal(
    model: FoEModel,
    fuser: nn.Module,
    collected: ExpertOutputs,
    held_rows: torch.Tensor,
    neighbors: int,
    cost_weight: float | None,
    tolerance: float,
) -> float:
    """Stores validation points in the model, with the loss of every subset of experts on them; returns lambda."""
    rows = held_rows[:MAX_VALIDATION_POINTS]
    assert collected.outputs is not None and collected.labels is not None  # checked by fit_fuser
    outputs, labels = collected.outputs[rows], collected.labels[rows]
    subsets = candidate_subsets(model.config.num_experts)
    policy = FrugalPolicy(len(rows), outputs.shape[1], outputs.shape[2], len(subsets), neighbors)
    policy.outputs.copy_(outputs)
    policy.subsets.copy_(subsets)
    regression = model.config.problem_type == "regression"
    for index, subset in enumerate(subsets):
        logits = fuser((outputs * subset[:, None]).flatten(1))
        policy.losses[index] = (
            (logits.squeeze(-1) - labels).square()
            if regression
            else nn.functional.cross_entropy(logits, labels, reduction="none")
        )
    costs = torch.tensor(model.config.cost_shares)
    if cost_weight is None:
        cost_weight = 0.0 if regression else _largest_cost_weight(policy, fuser, costs, labels, tolerance)
    model.config.frugal = {
        "neighbors": policy.neighbors,
        "cost_weight": cost_weight,
        "rows": len(rows),
        "subsets": len(subsets),
    }
    model.policy = policy.to(model.device)
    return cost_weight


def _largest_cost_weight(
    policy: FrugalPolicy, fuser: nn.Module, costs: torch.Tensor, labels: torch.Tensor, tolerance: float
) -> float:
    """The largest candidate lambda that lowers the mean probability of the true label by at most `tolerance`.

    Probability, not accuracy: with a few hundred rows, accuracy changes in steps as large as the tolerance.
    """

    def mean_probability(outputs: torch.Tensor) -> float:
        probabilities = fuser(outputs.flatten(1)).softmax(1)
        return float(probabilities[torch.arange(len(labels)), labels].mean())

    least = mean_probability(policy.outputs) - tolerance
    best = 0.0
    for weight in COST_WEIGHTS:
        outputs, _ = replay(policy, policy.outputs, costs, weight, leave_one_out=True)
        if mean_probability(outputs) >= least:
            best = weight
    return best


def replay(
    policy: FrugalPolicy,
    outputs: torch.Tensor,
    costs: torch.Tensor,
    cost_weight: float,
    budget: float = 1.0,
    leave_one_out: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Simulates frugal querying on precomputed expert outputs, without running a model.

    Args:
        policy: of the frugal variant.
        outputs: (N, K, C) of all experts.
        costs: (K,), shares of the total cost.
        cost_weight: lambda.
        budget: maximum share of the total cost per example.
        leave_one_out: whether the examples are the policy's validation points: each is then excluded from its own
            neighbours.

    Returns:
        See `FrugalPolicy.run`: the queried outputs (N, K, C), and the order of the queries (N, K).
    """
    return policy.run(
        lambda rows, experts: outputs[rows, experts],
        len(outputs),
        costs,
        cost_weight,
        budget,
        torch.arange(len(outputs)) if leave_one_out else None,
    )
