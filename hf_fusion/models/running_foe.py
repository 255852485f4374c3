"""Runs the experts of a Fusion of Experts, all of them on every row or each on some rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .ensemble_foe import fused_logits
from .experts_foe import ExpertRun, embedding_of, repeat_rows, take_rows


class RunningMixin:
    """What experts give, and what of it the fuser reads."""

    def _label_map(self: Any, backbone: int, device: torch.device) -> torch.Tensor:
        """One-hot maps from the experts' labels to the fused ones, (K_b, C_b, C); cached."""
        if (backbone, device) not in self._label_maps:
            maps = [self.config.experts[expert]["label_map"] for expert in self._members(backbone)]
            onehot = label_map_matrix(maps, self.config.num_outputs)
            self._label_maps[backbone, device] = onehot.to(device)
        return self._label_maps[backbone, device]

    def _run_experts(
        self: Any,
        backbone: int,
        inputs: dict[str, Any],
        local: list[int],
        embed: Sequence[float] | None = None,
        raw: bool = False,
    ) -> ExpertRun:
        """Runs experts of one backbone, each on one of `len(local)` groups of rows of equal size, N in all.

        Args:
            backbone: index of the backbone.
            inputs: of all groups, one after the other.
            local: the groups' experts, by their index among those of the backbone.
            embed: the depths of embeddings, see `FoEConfig.feature_depths`; None for no embeddings.
            raw: whether to return logits.
        """
        out = self.backbones[backbone](inputs, local, **({"output_hidden_states": True} if embed else {}))
        logits = out.logits.float().view(len(local), -1, out.logits.shape[-1])  # (G, n, C_b)
        onehot = self._label_map(backbone, logits.device)[local]  # (G, C_b, C)
        width = min(logits.shape[-1], onehot.shape[1])  # heads are as wide as the widest of these experts
        logits, onehot = logits[..., :width], onehot[:, :width]
        regression = self.config.problem_type == "regression"
        if not regression:
            widths = [len(self.config.experts[member]["label_map"]) for member in self._members(backbone)]
            if len(set(widths)) > 1:  # a padded head: its surplus columns stand for no label
                known = torch.tensor([widths[index] for index in local], device=logits.device)
                surplus = torch.arange(logits.shape[-1], device=logits.device) >= known[:, None]
                logits = logits.masked_fill(surplus[:, None], float("-inf"))
        outputs, fused = fuse_outputs(logits, onehot, regression, raw)
        return ExpertRun(
            outputs.flatten(0, 1),
            None if fused is None else fused.flatten(0, 1),
            embedding_of(out.hidden_states, inputs.get("attention_mask"), embed) if embed else None,
            head=logits.flatten(0, 1) if raw else None,
        )

    def run_experts(
        self: Any,
        inputs: Mapping[str, Any],
        experts: Sequence[int] | None = None,
        embed: Sequence[float] | None = None,
        raw: bool = False,
    ) -> list[ExpertRun]:
        """Runs all experts, or some of them, on every example.

        Args:
            inputs: what the processor returned.
            experts: indices of the experts to run; None for all.
            embed: the depths of embeddings, see `FoEConfig.feature_depths`; None for no embeddings.
            raw: whether to return logits as well.

        Returns:
            What each expert gives for the B examples.

        Raises:
            ValueError: the inputs of an expert are missing.
        """
        selected = range(self.config.num_experts) if experts is None else experts
        runs: dict[int, ExpertRun] = {}
        for backbone in range(len(self.backbones)):
            members = [index for index in self._members(backbone) if index in selected]
            if not members:
                continue
            batch = repeat_rows(self._inputs_of(backbone, inputs), len(members))
            local = [self._members(backbone).index(index) for index in members]
            run = self._run_experts(backbone, batch, local, embed, raw).to(self.device)
            runs.update(zip(members, run.chunk(len(members)), strict=True))
        return [runs[index] for index in selected]

    def expert_outputs(
        self: Any,
        inputs: Mapping[str, Any],
        embed: bool = False,
        experts: Sequence[int] | None = None,
        raw: bool = False,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Runs all experts, or some of them, on every example.

        Args:
            inputs: what the processor returned.
            embed: whether to return embeddings as well.
            experts: indices of the experts to run; None for all.
            raw: whether to return logits rather than probabilities.

        Returns:
            Outputs in the fused label space (B, K, C): probabilities, or scores for regression, and zeros for a row
            whose logits are not finite. With `raw`, logits: -inf for such a row, and for labels that the expert does
            not know. Then the embeddings, K of (B, d_k); an empty list without `embed`.

        Raises:
            ValueError: the inputs of an expert are missing.
        """
        runs = self.run_experts(inputs, experts, self._depths if embed else None, raw)
        outputs = [run.logits if run.logits is not None else run.outputs for run in runs]
        return torch.stack(outputs, 1), [run.embedding for run in runs if run.embedding is not None]

    def _query(
        self: Any, inputs: Mapping[str, Any], rows: torch.Tensor, experts: torch.Tensor, show: bool = False
    ) -> ExpertRun:
        """What expert `experts[i]` gives for example `rows[i]`, `show` as the fuser reads it; a pass per backbone."""
        embed = self._depths if show and self.reads_states else None
        outputs = torch.zeros(len(rows), self.config.num_outputs, device=self.device)
        shown: torch.Tensor | None = None
        for backbone in range(len(self.backbones)):
            members = self._members(backbone)
            indices = torch.isin(experts, torch.tensor(members, device=experts.device)).nonzero()[:, 0]
            if not len(indices):
                continue
            indices = indices[torch.argsort(experts[indices], stable=True)]
            chosen = [members.index(expert) for expert in experts[indices].tolist()]
            local = [chosen[0]] if len(set(chosen)) == 1 else chosen  # one group, or one per row
            batch = take_rows(self._inputs_of(backbone, inputs), rows[indices])
            run = self._run_experts(backbone, batch, local, embed, show and self.reads_logits).to(self.device)
            outputs[indices] = run.outputs
            for expert in experts[indices].unique().tolist() if show else ():
                of_expert = experts[indices] == expert
                read = self.fuser.read_expert(expert, self.part_of(run)[of_expert])
                if shown is None:
                    shown = torch.zeros(len(rows), read.shape[1], device=self.device)
                shown[indices[of_expert]] = read.to(shown.dtype)
        return ExpertRun(outputs, shown=shown)

    @property
    def reads_logits(self: Any) -> bool:
        """Whether the fuser takes the experts' logits rather than their probabilities."""
        if self.config.rule is not None:
            return self.config.over == "logits"
        return self.config.fuser != "mlp" and not self.config.vocabularies

    @property
    def _depths(self: Any) -> Sequence[float]:
        """Where embeddings are taken from."""
        return self.config.feature_depths or [1.0]

    @property
    def reads_states(self: Any) -> bool:
        """Whether the fuser takes embeddings, that is, hidden states of the experts."""
        return self.config.rule is None and (self.config.mode == "selection" or self.config.reads_embeddings)

    def part_of(self: Any, run: ExpertRun) -> torch.Tensor:
        """What the fuser takes of one expert, (B, C), (B, d_k) or (B, C + d_k).

        Args:
            run: what the expert gave.
        """
        outputs = run.logits if run.logits is not None else run.outputs
        if run.embedding is None:
            return outputs
        return torch.cat([outputs, run.embedding], 1) if self.reads_logits else run.embedding


def fuse_outputs(
    logits: torch.Tensor, onehot: torch.Tensor, regression: bool, raw: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Maps logits of experts' heads to fused labels, see `ExpertRun`.

    Args:
        logits: (G, n, C_b), or scores for regression; -inf in columns without a label.
        onehot: (G, C_b, C), which fused label each of an expert's labels is.
        regression: whether they are scores.
        raw: whether to return logits as well.

    Returns:
        Probabilities (G, n, C), or scores; and logits, or None.
    """
    outputs = torch.bmm(logits if regression else logits.softmax(-1), onehot)
    outputs = torch.where(outputs.isfinite().all(-1, keepdim=True), outputs, 0.0)
    return outputs, fused_logits(logits, onehot, regression) if raw else None


def label_map_matrix(label_maps: Sequence[Sequence[int]], labels: int) -> torch.Tensor:
    """One-hot maps from experts' labels to fused ones, (K, C_b, C).

    Args:
        label_maps: of each expert, the fused index of each of its labels, -1 for none.
        labels: C.
    """
    onehot = torch.zeros(len(label_maps), max(map(len, label_maps)), labels)
    for index, label_map in enumerate(label_maps):
        for label, fused in enumerate(label_map):
            if fused >= 0:
                onehot[index, label, fused] = 1
    return onehot


__all__ = ["RunningMixin", "fuse_outputs", "label_map_matrix"]
