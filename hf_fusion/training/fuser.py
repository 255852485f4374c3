"""Fits a FoE's fuser on labelled examples, and the frugal variant beside it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_fusion.errors import FusionError
from hf_fusion.models.frugal_foe import FrugalPolicy, candidate_subsets
from hf_fusion.progress import phase
from hf_fusion.training.callbacks import set_progress
from hf_fusion.training.costs import measure_latency, set_costs
from hf_fusion.training.outputs import ExpertOutputs, collect_outputs

logger = logging.getLogger(__name__)

FULL_SHARE = 0.5  # share of training rows that show the fuser all experts when it also learns to do with fewer
COST_WEIGHTS = (0.0, *(2.0 ** (power / 2) for power in range(-16, 11)))  # lambdas among which the default is chosen
MOST_NEIGHBORS_FROM = 1500  # validation points kept in a frugal model


@dataclass
class Fit:
    """What a fit came to.

    Attributes:
        train_rows, held_out_rows: examples the fuser learned from, and those that stopped it.
        loss: held-out loss of the fuser that was kept.
        accuracy: its held-out accuracy (of the choice of expert, in selection); None for regression.
        cost_weight: lambda of the frugal variant, None without one.
        missing_labels: fused labels that no training row had; the fuser cannot have learned them.
    """

    train_rows: int
    held_out_rows: int
    loss: float
    accuracy: float | None
    cost_weight: float | None
    missing_labels: list[str]


def fit_fuser(
    model: Any,
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
    """Fits `model`'s fuser in place; the experts stay as they are, and run once (their outputs are cached).

    AdamW with a cosine schedule, as in the paper (arXiv 2310.01542), stopped early on the held-out loss. Runs on
    transformers' Trainer, so `accelerate launch` spreads it over processes. The same seed gives the same weights.

    Args:
        model: a FoE from `FoEModel.from_experts`.
        dataset: labelled examples, see `collect_outputs`.
        by: in selection, which expert an example should choose: "domain" (column `expert_column`) or "loss" (the one
            with the least loss on it).
        frugal: also learn to answer from the outputs of few experts, and keep the validation points by which the
            published model decides whom to ask.
        neighbors: kappa of the frugal variant.
        cost_weight: lambda of the frugal variant; by default the largest at which the mean probability of the true
            label, on the held-out rows, stays within `tolerance` of asking everyone.
        costs: what asking each expert costs, if not what the model says already (its parameters): one number each,
            or "latency" for the seconds measured here.
        tolerance: see `cost_weight`.
        holdout: share of the rows that are held out.
        epochs, patience: at most so many epochs; stop after so many without a better held-out loss.
        learning_rate: 1e-3 by default, the paper's; 3e-4 in selection, where inputs are wide and rows few.
        weight_decay, batch_size, seed: of the fuser's training.
        label_column, expert_column: columns of `dataset`.
        inference_batch_size: examples per step while the experts run.

    Returns:
        What was fitted on how many rows, and how well it does on those that were held out.

    Raises:
        FusionError: for data that is empty, unlabelled or too small to hold rows out of, or a model without a fuser.
    """
    if not list(getattr(model, "fuser", nn.Module()).parameters()):
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
    assert targets is not None  # the column is there
    regression = model.config.problem_type == "regression" and not selection
    set_seed(seed)
    fuser = type(model.fuser)(
        model.fuser.hidden[0].in_features,
        model.config.fuser_hidden,
        model.fuser.output.out_features,
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
        right = fuser(collected.features[held_rows]).argmax(1) == targets[held_rows]
    model.fuser.load_state_dict(fuser.state_dict())
    model.config.fitted = True
    model.eval()
    seen = set(targets[train_rows].tolist()) if not regression else set()
    names = [e["name"] for e in model.config.experts] if selection else list((model.config.id2label or {}).values())
    missing = [] if regression else [name for index, name in enumerate(names) if index not in seen]
    if missing:
        logger.warning("no training row is labelled %s: the fuser cannot learn to answer it", ", ".join(missing))
    if frugal:
        with phase("Fitting the frugal variant"):
            cost_weight = _fit_frugal(model, fuser, collected, held_rows, neighbors, cost_weight, tolerance)
    return Fit(
        train_rows=len(train_rows),
        held_out_rows=len(held_rows),
        loss=loss,
        accuracy=None if regression else float(right.float().mean()),
        cost_weight=cost_weight if frugal else None,
        missing_labels=missing,
    )


def train_fuser(
    fuser: Any,
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
    """Trains a fuser in place on what experts said, see `fit_fuser`.

    Args:
        fuser: features → logits (N, C), or values (N, 1).
        features: (N, d), what it reads.
        targets: (N,): classes, or values where they are floats.
        use_cpu: not a GPU that is there. As the models of this process: it holds for all of accelerate.
        experts: of the frugal variant, how many share the features; else 0.
        holdout, epochs, patience, learning_rate, weight_decay, batch_size, seed: see `fit_fuser`.

    Returns:
        The held-out loss, and the numbers of the rows it learned from and of those held out.

    Raises:
        FusionError: for too few rows, or a loss that is not finite.
    """
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    held = max(1, round(holdout * len(features)))
    if len(features) - held < 1:
        raise FusionError(f"{len(features)} examples are too few to fit a fuser on and hold some out; give it more")
    held_rows, train_rows = order[:held], order[held:]
    task = _FuserTask(fuser, experts, targets.is_floating_point())
    if task.regression:  # its values begin in the middle of what is wanted, wherever that lies
        nn.init.constant_(fuser.output.bias, float(targets[train_rows].mean()))
    train, test = (_Rows(features[rows], targets[rows]) for rows in (train_rows, held_rows))
    best = _KeepBest(patience)
    with tempfile.TemporaryDirectory(prefix="hf_fusion_fit_") as folder:  # the Trainer insists on one; nothing is saved
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
            "the fuser's held-out loss is not finite", "look for NaN or Inf in the labels and lower the rate"
        )
    task.load_state_dict(best.weights)
    fuser.to("cpu").eval()
    return best.loss, train_rows, held_rows


def _selection_targets(collected: ExpertOutputs, by: str) -> torch.Tensor | None:
    """The expert each example should choose."""
    if by == "domain":
        return collected.experts
    if collected.losses is not None:
        return collected.losses.argmin(1)
    if collected.outputs is None or collected.labels is None:
        return None
    rows = torch.arange(len(collected))
    return collected.outputs[rows, :, collected.labels].argmax(1)  # least loss = most probability on the true label


class _FuserTask(nn.Module):
    """The fuser with its loss, as the Trainer wants it.

    With `experts` the fuser also sees random subsets of them, the others' outputs zeroed as if not queried, and so
    becomes the f_S of every subset S at once.
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
        """(rows, K) of 0 and 1: all experts in half of the rows, else a random subset of random size."""
        size = torch.randint(1, self.experts + 1, (rows, 1), device=like.device)
        rank = torch.rand(rows, self.experts, device=like.device).argsort(1).argsort(1)
        full = torch.rand(rows, 1, device=like.device) < FULL_SHARE
        return ((rank < size) | full).to(like.dtype)


class _Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Features and targets, row by row."""

    def __init__(self, features: torch.Tensor, targets: torch.Tensor) -> None:
        self.features, self.targets = features, targets

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"features": self.features[index], "labels": self.targets[index]}


class _KeepBest(TrainerCallback):
    """Keeps the weights of the epoch with the least held-out loss, in memory, and stops when none comes for long."""

    def __init__(self, patience: int) -> None:
        self.patience, self.waited = patience, 0
        self.loss = float("inf")
        self.weights: dict[str, torch.Tensor] = {}

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, model: Any = None, **_: object
    ) -> None:
        """After every epoch."""
        self.waited += 1
        if metrics["eval_loss"] < self.loss:
            self.loss, self.waited = metrics["eval_loss"], 0
            self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        control.should_training_stop = self.waited >= self.patience


@torch.no_grad()
def _fit_frugal(
    model: Any,
    fuser: nn.Module,
    collected: ExpertOutputs,
    held_rows: torch.Tensor,
    neighbors: int,
    cost_weight: float | None,
    tolerance: float,
) -> float:
    """Gives the model its validation points and the losses of every subset on them; returns lambda."""
    rows = held_rows[:MOST_NEIGHBORS_FROM]
    assert collected.outputs is not None and collected.labels is not None  # fit_fuser has seen to it
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
    """The lambda that saves most and costs the true label at most `tolerance` of its mean held-out probability.

    Probability, not accuracy: on a few hundred rows accuracy moves in steps as large as the tolerance.
    """

    def probability(outputs: torch.Tensor) -> float:
        answers = fuser(outputs.flatten(1)).softmax(1)
        return float(answers[torch.arange(len(labels)), labels].mean())

    enough = probability(policy.outputs) - tolerance
    best = 0.0
    for weight in COST_WEIGHTS:
        outputs, _ = replay(policy, policy.outputs, costs, weight, own_points=True)
        if probability(outputs) >= enough:
            best = weight
    return best


def replay(
    policy: FrugalPolicy,
    outputs: torch.Tensor,
    costs: torch.Tensor,
    cost_weight: float,
    budget: float = 1.0,
    own_points: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Frugal querying where every expert's output is known already, to measure it without running a model.

    Args:
        outputs: (N, K, C) of all experts.
        costs: (K,) shares.
        own_points: the examples are the policy's validation points; each is then left out of its own neighbours.

    Returns:
        As `FrugalPolicy.run`: the outputs that were queried (N, K, C), and the order of the queries (N, K).
    """
    return policy.run(
        lambda rows, experts: outputs[rows, experts],
        len(outputs),
        costs,
        cost_weight,
        budget,
        torch.arange(len(outputs)) if own_points else None,
    )
