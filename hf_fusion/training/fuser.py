"""Fits the fuser of a Fusion of Experts on labelled examples, optionally with the frugal variant."""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard

import datasets
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_fusion.errors import FusionError
from hf_fusion.models.fused_html import facts_table
from hf_fusion.models.fuser_foe import FUSERS, build_fuser
from hf_fusion.progress import phase
from hf_fusion.training.callbacks import set_progress
from hf_fusion.training.costs import measure_latency, set_costs
from hf_fusion.training.frugal import Points, fit_frugal, out_of_fold, points_of
from hf_fusion.training.fuser_choice import Candidate, GatedFit, Scored, candidates, configure, cross_validate, folds
from hf_fusion.training.gated_fit import Design
from hf_fusion.training.outputs import ExpertOutputs, collect_outputs, features_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerControl, TrainerState

    from hf_fusion.models.modeling_foe import FoEModel

logger = logging.getLogger(__name__)

FULL_SHARE = 0.5  # share of training rows without expert dropout, in training for the frugal variant
# what "auto" chooses among, the simplest first
AUTO = {"output": ("stacking", "gating", "gated-stacking", "mlp"), "selection": ("gating", "mlp")}
SUBSETS = 2  # for the frugal variant: how often a gated fuser sees each row once more, with experts left out at random


@dataclass
class Fit:
    """The report of `fit_fuser`.

    Attributes:
        fuser: kind of the fuser that was kept.
        train_rows: rows that it was fitted on.
        held_out_rows: size of the validation split; 0 where cross-validation stands for it.
        loss: validation loss of the fuser that was kept.
        accuracy: its validation accuracy (in selection mode, of choosing the expert); None for regression.
        cost_weight: lambda of the frugal variant, or None.
        missing_labels: fused labels without a training row, which the fuser cannot have learned.
        compared: what each fuser scored in cross-validation; empty if there was nothing to choose.
    """

    fuser: str
    train_rows: int
    held_out_rows: int
    loss: float
    accuracy: float | None
    cost_weight: float | None
    missing_labels: list[str]
    compared: list[Scored] = field(default_factory=list)

    def _repr_html_(self) -> str:
        scores = {f"{each.name}": f"loss {each.loss:.3f}, accuracy {each.accuracy:.1%}" for each in self.compared}
        return facts_table({**{name: value for name, value in vars(self).items() if name != "compared"}, **scores})


def fit_fuser(
    model: PreTrainedModel,
    dataset: datasets.Dataset,
    *,
    fuser: str = "auto",
    by: str = "domain",
    frugal: bool = False,
    neighbors: int = 10,
    cost_weight: float | None = None,
    costs: Sequence[float] | str | None = None,
    tolerance: float = 0.005,
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

    The kind of fuser is chosen by 3-fold cross-validation on the rows: the simplest whose loss is within one standard
    error of the lowest. The kinds, the simplest first:

    ================  ==================================================================================================
    "stacking"        logistic regression on the experts' log-probabilities (Wolpert 1992)
    "gating"          the mixture of the experts' calibrated probabilities, with weights that read their middle layers;
                      in selection, the weights alone
    "gated-stacking"  the same, and evidence for each label from the same layers and log-probabilities
    "mlp"             the paper's (arXiv 2310.01542): probabilities, in selection embeddings, through an MLP
    "attention"       the mixture, with weights by attention between the experts; is not tried unless named
    ================  ==================================================================================================

    The first three are fitted by L-BFGS, the last two by AdamW with a cosine schedule and early stopping on the
    validation loss, on transformers' Trainer, so `accelerate launch` distributes it. The same seed gives the same
    weights.

    Args:
        model: a FoE from `FoEModel.from_experts`.
        dataset: labelled examples, see `collect_outputs`.
        fuser: one of these kinds, or "auto". Regressors have "mlp" alone.
        by: in selection mode, the target expert of an example: "domain" (column `expert_column`) or "loss" (the
            expert with the lowest loss on it).
        frugal: also train the fuser on subsets of the experts, and store validation points in the model, from which
            it decides at inference which experts to query; in selection, by whose embeddings it chooses.
        neighbors: kappa of the frugal variant, the number of nearest neighbours.
        cost_weight: lambda of the frugal variant; default: the largest for which accuracy and mean probability of
            the true label on validation points are at most `tolerance` below those of querying every expert.
        costs: query costs, one per expert in any unit, or "latency" to measure seconds; default: those in the
            model's config (parameter counts).
        tolerance: see `cost_weight`.
        holdout: share of the rows in the validation split, for early stopping and the frugal variant.
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
        FusionError: for data that is empty, unlabelled or too small to split, an unknown fuser, or a model without one.
    """
    if not has_fuser(model):
        raise FusionError(f"{type(model).__name__} has no fuser to fit", hint="it is ready as it is: hf-fusion eval")
    selection = model.config.mode == "selection"
    kinds = _kinds(model, fuser, frugal)
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
    options = {
        "holdout": holdout,
        "epochs": epochs,
        "patience": patience,
        "learning_rate": learning_rate or (3e-4 if selection else 1e-3),
        "weight_decay": weight_decay,
        "batch_size": batch_size,
        "seed": seed,
        "use_cpu": model.device.type == "cpu",
    }
    fits = _Fits(model, collected, targets, frugal, options)
    tried, compared = candidates(kinds), list[Scored]()
    chosen = tried[0]
    if len(tried) > 1:
        chosen, compared = cross_validate(tried, len(targets), targets, fits.scores, seed)
    fitted, loss, train_rows, held_rows, points = fits.fit(chosen)
    configure(model.config, chosen.kind, collected)
    if points is None:  # only its loss and accuracy are reported
        loss, accuracy = next((each.loss, each.accuracy) for each in compared if each.name == str(chosen))
    else:
        accuracy = float((points.scores.argmax(1) == points.targets).float().mean())
    model.fuser = fitted.to(model.device, model.dtype)
    model.config.fitted = True
    model.config.frugal = None
    model.eval()
    regression = targets.is_floating_point()
    seen = set(targets[train_rows].tolist()) if not regression else set()
    names = [e["name"] for e in model.config.experts] if selection else list((model.config.id2label or {}).values())
    missing = [] if regression else [name for index, name in enumerate(names) if index not in seen]
    if missing:
        logger.warning("no training row is labelled %s: the fuser cannot learn to predict it", ", ".join(missing))
    if frugal:
        with phase("Fitting the frugal variant"):
            assert points is not None  # of a frugal fit
            cost_weight = fit_frugal(model, copy.deepcopy(fitted).cpu(), points, neighbors, cost_weight, tolerance)
    return Fit(
        fuser=chosen.kind,
        train_rows=len(train_rows),
        held_out_rows=len(held_rows),
        loss=loss,
        accuracy=None if regression else accuracy,
        cost_weight=cost_weight if frugal else None,
        missing_labels=missing,
        compared=compared,
    )


def _kinds(model: FoEModel, fuser: str, frugal: bool) -> Sequence[str]:
    """The kinds of fuser that are tried.

    Raises:
        FusionError: the fuser is unknown, or does not go with the model.
    """
    config = model.config
    if fuser not in ("auto", *FUSERS):
        raise FusionError(f"fuser={fuser!r} must be 'auto' or one of {', '.join(FUSERS)}")
    if config.mode == "selection" and frugal:
        if fuser == "mlp":
            raise FusionError("in selection, the fuser 'mlp' needs the embeddings of all experts", "fuser='gating'")
        if config.features_from is not None:
            raise FusionError("with features_from one expert is read, so frugal=True has nothing to leave out")
    if config.problem_type == "regression" and config.mode == "output":
        if fuser not in ("auto", "mlp"):
            raise FusionError(f"the fuser {fuser!r} fuses classifiers; regressors are fused by 'mlp'")
        return ["mlp"]
    if config.mode == "selection" and fuser in ("stacking", "gated-stacking"):
        raise FusionError(f"the fuser {fuser!r} predicts labels; in selection, choose 'gating'")
    if fuser != "auto":
        return [fuser]
    return [kind for kind in AUTO[config.mode] if kind != "mlp" or not (frugal and config.mode == "selection")]


class _Fits:
    """Fits fusers on rows of one data set."""

    def __init__(
        self, model: FoEModel, collected: ExpertOutputs, targets: torch.Tensor, frugal: bool, options: Mapping[str, Any]
    ) -> None:
        self.model, self.collected, self.targets, self.frugal, self.options = model, collected, targets, frugal, options
        self._gated: dict[str, GatedFit] = {}
        self._features: dict[str, torch.Tensor] = {}
        self._designs: dict[Any, Design] = {}

    def _prepared(self, kind: str) -> tuple[Any, torch.Tensor]:
        """A config for a kind of fuser, and the fuser's inputs."""
        config = copy.deepcopy(self.model.config)
        configure(config, kind, self.collected)
        if kind not in self._features:
            self._features[kind] = features_of(self.model, self.collected, config)
        return config, self._features[kind]

    def _gated_fit(self, kind: str) -> GatedFit:
        if kind not in self._gated:
            self._gated[kind] = GatedFit(self._prepared(kind)[0], self.collected, self.targets, self.options["seed"])
        return self._gated[kind]

    def _design(self, kind: str, rows: torch.Tensor) -> Design:
        """Features of some rows, which several kinds of fuser read."""
        gated = self._gated_fit(kind)
        key = (tuple(part.shape[1] for part in gated.parts), *rows.tolist())
        if key not in self._designs:
            self._designs[key] = gated.design(rows)
        return self._designs[key]

    def _trained(self, kind: str, rows: torch.Tensor) -> tuple[Any, float, torch.Tensor, torch.Tensor]:
        """A fuser that is trained by AdamW on some rows, its validation loss, and the rows of both splits."""
        config, features = self._prepared(kind)
        set_seed(self.options["seed"])
        fuser = build_fuser(config)
        experts = config.num_experts if self.frugal else 0
        loss, train, held = train_fuser(fuser, features[rows], self.targets[rows], experts=experts, **self.options)
        return fuser, loss, rows[train], rows[held]

    @torch.no_grad()
    def scores(self, candidate: Candidate, rows: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        """Scores of some rows, by a fuser that was fitted on others."""
        with torch.enable_grad():
            if candidate.penalty is None:
                fuser = self._trained(candidate.kind, rows)[0]
            else:
                gated = self._gated_fit(candidate.kind)
                fuser = gated.fit(candidate.penalty, self._design(candidate.kind, rows), rows)
        found: torch.Tensor = fuser(self._prepared(candidate.kind)[1][held])
        return found

    def fit(self, candidate: Candidate) -> tuple[Any, float, torch.Tensor, torch.Tensor, Points | None]:
        """The fuser that is kept, its validation loss (NaN: unknown), rows of both splits, and validation points."""
        every, experts = torch.arange(len(self.targets)), self.model.config.num_experts
        features = self._prepared(candidate.kind)[1]
        if candidate.penalty is None:
            fuser, loss, train, held = self._trained(candidate.kind, every)
            return fuser, loss, train, held, points_of(fuser, features[held], self.targets[held], experts, self.frugal)
        gated, points = self._gated_fit(candidate.kind), None
        subsets = SUBSETS if self.frugal else 0
        final = gated.fit(candidate.penalty, gated.design(every, subsets), every)
        if self.frugal:
            parts = []
            for held in folds(len(every), self.options["seed"]):
                rows = every[~torch.isin(every, held)]
                fuser = gated.fit(candidate.penalty, gated.design(rows, subsets), rows)
                parts.append((fuser, points_of(fuser, features[held], self.targets[held], experts)))
            points = out_of_fold(final, parts, self.options["seed"])
        return final, float("nan"), every, every[:0], points


def split(count: int, holdout: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row indices of the validation split and of the training split.

    Args:
        count: N.
        holdout: see `fit_fuser`.
        seed: see `fit_fuser`.

    Raises:
        FusionError: there are too few rows.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = max(1, round(holdout * count))
    if count - held < 1:
        raise FusionError(f"{count} examples are too few to fit a fuser on and hold some out; give it more")
    return order[:held], order[held:]


def has_fuser(model: PreTrainedModel) -> TypeGuard[FoEModel]:
    """Whether a model is a Fusion of Experts with a fuser that learns: an ensemble has none."""
    return bool(list(getattr(model, "fuser", nn.Module()).parameters()))


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
    held_rows, train_rows = split(len(features), holdout, seed)
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

    def __init__(self, fuser: Any, experts: int, regression: bool) -> None:
        super().__init__()
        self.fuser, self.experts, self.regression = fuser, experts, regression

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.training and self.experts:
            queried = self._random_subsets(len(features), features.device)
            logits = self.fuser.combine(self.fuser.read(features), queried)
        else:
            logits = self.fuser(features)
        if self.regression:
            loss = nn.functional.mse_loss(logits.squeeze(-1), labels)
        else:
            loss = nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}

    def _random_subsets(self, rows: int, device: torch.device) -> torch.Tensor:
        """Masks (rows, K): all experts for `FULL_SHARE` of the rows, else a subset of random size."""
        size = torch.randint(1, self.experts + 1, (rows, 1), device=device)
        rank = torch.rand(rows, self.experts, device=device).argsort(1).argsort(1)
        full = torch.rand(rows, 1, device=device) < FULL_SHARE
        return (rank < size) | full


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
