"""Fusion of Experts: learn to fuse the outputs of experts with complementary knowledge (arXiv 2310.01542).

`FoEModel` fuses classifiers and regressors by their outputs, or selects among experts with different label spaces;
`FoEForGeneration` selects among language models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput

from .assembly_foe import fill_adapters, plan_config
from .backbones_foe import BackbonesMixin
from .configuration_foe import FoEConfig
from .ensemble_foe import LEAST_PROBABILITY, FixedFuser, check_ensemble
from .experts_foe import Backbone
from .frugal_foe import build_policy, run_policy
from .fused import FusedPreTrainedModel
from .fused_calls import Calls
from .fused_loading import explained
from .fused_summary import Summary, described
from .fuser_foe import build_fuser
from .generation_foe import SelectionMixin
from .processing_foe import FoEProcessor
from .running_foe import RunningMixin
from .trace_foe import FoETrace


class FoEModel(RunningMixin, BackbonesMixin, FusedPreTrainedModel):
    """Experts, and the fuser that combines them into one model.

    Build one with `from_experts`, fit it with `hf_fusion.fit_fuser`, load a published one with
    ``AutoModel.from_pretrained(id, trust_remote_code=True)`` and feed it what its processor returns.

    Args:
        config: the experts, their backbones and the fuser's shape.
        models: the transformer of each backbone, in the order of ``config.backbones``; None builds empty ones, which
            `from_pretrained` fills.
    """

    config: FoEConfig
    config_class = FoEConfig
    main_input_name = "input_ids"

    def __init__(self, config: FoEConfig, models: Sequence[PreTrainedModel] | None = None) -> None:
        super().__init__(config)
        self.backbones = [
            Backbone(
                plan["head"],
                config.backbone_config(index),
                plan["ranks"],
                plan["saved"],
                plan["num_labels"],
                models[index] if models else None,
            )
            for index, plan in enumerate(config.backbones)
        ]
        for index, backbone in enumerate(self.backbones):
            self.add_module(f"backbone_{index}", backbone.model)
        self._freeze_experts()
        self.fuser: Any  # an `nn.Module`; all but ensembles' have `read` and `combine`
        if config.rule:
            self.fuser = FixedFuser(config.num_experts, config.rule, config.over, config.weights)
        else:
            self.fuser = build_fuser(config)
        if config.frugal:
            self.policy = build_policy(config, self.fuser)
        self.record_routing = False
        self._calls = Calls()
        self._label_maps: dict[tuple[int, torch.device], torch.Tensor] = {}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.in_features**-0.5
                init.uniform_(module.bias, -bound, bound)

    def _freeze_experts(self) -> None:
        for backbone in self.backbones:
            backbone.model.requires_grad_(False)

    def train(self, mode: bool = True) -> FoEModel:
        """Sets the training mode of the fuser alone: the experts are frozen, and their dropout stays off.

        Args:
            mode: True for training, False for evaluation.

        Returns:
            This model.
        """
        super().train(mode)
        for backbone in self.backbones:
            backbone.model.eval()
        return self

    # ---------------------------------------------------------------- building, loading

    @classmethod
    def from_experts(
        cls,
        experts: Sequence[Any],
        base: Any = None,
        mode: str = "output",
        label_maps: Mapping[str, Mapping[str, str | None]] | None = None,
        labels: Sequence[str] | None = None,
        costs: Sequence[float] | None = None,
        features_from: int | None = None,
        fuser_hidden: Sequence[int] | None = None,
        fuser_dropout: float | None = None,
    ) -> FoEModel:
        """Builds a FoE whose fuser is still to be fitted.

        Args:
            experts: loaded experts, or ids ("owner/name@revision"), folders and transformers models, which need
                hf_fusion installed to be resolved.
            base: base of the adapters, if it is not the one they name.
            mode: "output" fuses outputs over one label space; "selection" picks one expert per example.
            label_maps: expert name -> {its label: fused label, or None to drop it}.
            labels: the fused labels, in the order of the model's outputs.
            costs: cost of querying each expert, any unit (parameters by default, measured latency, a price).
            features_from: in selection, the index of the one expert whose embedding feeds the fuser; all by default.
            fuser_hidden: hidden widths of the fuser; (512, 512) by default, the paper's selection has (8192, 8192).
            fuser_dropout: 0 by default in output mode, 0.5 in selection, as in the paper.

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: experts do not fit together; the message names the expert and the remedy.
        """
        if features_from is not None and not (mode == "selection" and 0 <= features_from < len(experts)):
            raise ValueError(f"features_from={features_from} must be the index of an expert, in mode='selection'")
        dropout = (0.5 if mode == "selection" else 0.0) if fuser_dropout is None else fuser_dropout
        fields = {"features_from": features_from, "fuser_hidden": fuser_hidden, "fuser_dropout": dropout}
        return cls._built(experts, base, mode, label_maps, labels, costs, **fields)

    @classmethod
    def ensemble(
        cls,
        experts: Sequence[Any],
        base: Any = None,
        rule: str = "mean",
        weights: Sequence[float] | None = None,
        over: str = "logits",
        label_maps: Mapping[str, Mapping[str, str | None]] | None = None,
        labels: Sequence[str] | None = None,
        costs: Sequence[float] | None = None,
    ) -> FoEModel:
        """Builds an ensemble of classifiers or regressors, which needs no fitting.

        Over logits the rules are fusion_bench's simple and weighted ensembles and its max-model predictor. If several
        labels of an expert map to one fused label, its logit is the log-sum-exp of theirs.

        Args:
            experts: see `from_experts`.
            base: see `from_experts`.
            rule: "mean", or "max_model": for each label the largest output of all experts.
            weights: weight of each expert in the mean, normalised to sum to 1; equal by default.
            over: what is combined: "logits"; or "probabilities", so that an expert with large logits does not dominate
                and labels that an expert does not know count as 0. For regression, always the scores.
            label_maps: see `from_experts`.
            labels: see `from_experts`.
            costs: see `from_experts`.

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: experts do not fit together; the message names the expert and the remedy.
        """
        shares = None if weights is None else [float(weight) for weight in weights]
        fields = {"rule": rule, "over": over, "weights": shares, "fuser_hidden": []}
        return cls._built(experts, base, "output", label_maps, labels, costs, **fields)

    @classmethod
    def _built(cls, experts: Sequence[Any], base: Any, mode: str, *arguments: Any, **fields: Any) -> FoEModel:
        """A model of loaded experts, with an untrained fuser."""
        if not experts:
            raise ValueError("a fusion needs at least one expert; the list is empty")
        if base is not None or not all(hasattr(expert, "adapter") for expert in experts):
            if cls.load_experts is None:
                raise ValueError("ids and folders can be resolved only with hf_fusion installed: pip install hf_fusion")
            experts = cls.load_experts(experts, base=base)
        config, models, processor = plan_config(experts, mode, *arguments, **fields)
        if config.rule is not None:
            if config.problem_type == "regression":
                config.over = "logits"
            check_ensemble(config)
        dtypes = {parameter.dtype for model in models for parameter in model.parameters()}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # one model has one dtype
        family = FoEForGeneration if config.vocabularies else FoEModel
        model: Any = family(config, models).to(dtype)  # type: ignore[arg-type]  # the stubs lose `self`
        for index, plan in enumerate(config.backbones):
            members = [e for e, row in zip(experts, config.experts, strict=True) if row["backbone"] == index]
            if plan["ranks"] or plan["saved"]:
                fill_adapters(model.backbones[index], plan, members, members[0].model)
        model._processor = processor
        return model.eval()

    @property
    def processor(self) -> FoEProcessor:
        """The processor that prepares this model's inputs; a loaded model fetches it from its folder or repo.

        Raises:
            ValueError: the model was neither built from experts nor loaded; or the processor needs the repo's code, and
                the model was loaded without ``trust_remote_code``.
        """
        if self._processor is None:
            if self._source is None:
                raise ValueError("this model was built from a bare config, so it has no processor")
            source, hub = self._source
            with explained(source):
                self._processor = FoEProcessor.from_pretrained(source, trust_remote_code=self._trusted, **hub)
        return self._processor

    def _after_loading(self, name: Any, hub: dict[str, Any]) -> None:
        self._freeze_experts()  # loading creates new parameters, all of which require gradients

    # ---------------------------------------------------------------- forward

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        budget: float | None = None,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> SequenceClassifierOutput | tuple[torch.Tensor, ...]:
        """Runs the experts and fuses their outputs.

        Args:
            input_ids: (B, T), from the processor.
            attention_mask: (B, T), from the processor.
            pixel_values: (B, channels, height, width), from the processor.
            labels: (B,) class indices, or (B,) targets for regression; adds the loss.
            budget: share of the cost of all experts, in (0, 1], that querying experts for one example may cost; the
                experts are then queried one after the other. None, without ``config.budget``, queries all of them.
            return_dict: False returns a tuple, as in transformers.
            inputs: all else that the processor returned, such as ``input_ids_1`` for its second tokenizer.

        Returns:
            The output, with logits (B, C) and the loss if there are labels. In selection mode labels that the chosen
            expert does not know have probability 1e-8.

        Raises:
            ValueError: a budget for a model that was not fitted frugally, or an expert's inputs are missing.
        """
        all_inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values, **inputs}
        budget = self.config.budget if budget is None else budget
        if self.config.mode == "selection":
            logits = self._select_and_predict(all_inputs, budget)
        elif budget is None:
            runs = self.run_experts(
                all_inputs, embed=self._depths if self.reads_states else None, raw=self.reads_logits
            )
            features = torch.cat([self.part_of(run) for run in runs], 1)
            order = torch.arange(1, len(runs) + 1, device=features.device).expand(len(features), -1)
            if self.config.rule:
                logits, shown = self.fuser(features), features.view(*order.shape, -1)
            else:
                shown = self.fuser.read(features)
                logits = self.fuser.combine(shown, order > 0)
            self._record(logits, order=order, outputs=shown[..., : self.config.num_outputs])
        else:
            shown, order = self._run_frugally(all_inputs, budget)
            logits = self.fuser.combine(shown, order > 0)
            self._record(logits, order=order, outputs=shown[..., : self.config.num_outputs])
        loss = None if labels is None else self._loss(logits, labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _run_frugally(
        self, inputs: Mapping[str, Any], budget: float, outputs: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the queried experts show and their order, see `FrugalPolicy.run`; fills in `outputs` (B, K, C)."""
        batch = len(next(value for value in inputs.values() if torch.is_tensor(value)))

        def query(rows: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
            run = self._query(inputs, rows, experts, show=True)
            if outputs is not None:
                outputs[rows, experts] = run.outputs
            assert run.shown is not None
            return run.shown

        return run_policy(getattr(self, "policy", None), self.config, self.fuser, query, batch, budget)

    def _select_and_predict(self, inputs: Mapping[str, Any], budget: float | None) -> torch.Tensor:
        """Logits of the expert that the fuser chooses for each example, (B, C)."""
        source, count = self.config.features_from, self.config.num_experts
        if budget is not None:
            batch = len(next(value for value in inputs.values() if torch.is_tensor(value)))
            outputs = torch.zeros(batch, count, self.config.num_outputs, device=self.device)
            shown, order = self._run_frugally(inputs, budget, outputs)
            scores, has_run = self.fuser.combine(shown, order > 0), order > 0
        else:
            read = range(count) if source is None else [source]
            runs = self.run_experts(inputs, read, embed=self._depths, raw=self.reads_logits)
            scores = self.fuser(torch.cat([self.part_of(run) for run in runs], 1))  # (B, K)
            outputs = torch.zeros(len(scores), count, self.config.num_outputs, device=self.device)
            has_run = torch.zeros_like(scores, dtype=torch.bool)
            for expert, run in zip(read, runs, strict=True):
                outputs[:, expert], has_run[:, expert] = run.outputs, True
            order = torch.zeros_like(scores, dtype=torch.long)
        choice = scores.argmax(1)
        rows = torch.arange(len(choice), device=choice.device)
        predictions = outputs[rows, choice]
        missing = rows[~has_run[rows, choice]]
        if len(missing):  # experts that did not run to choose by
            predictions[missing] = self._query(inputs, missing, choice[missing]).outputs
        if budget is None:
            order = nn.functional.one_hot(choice, count)
        else:
            order = order.clone()
            order[missing, choice[missing]] = order[missing].amax(1) + 1
        self._record(predictions, order=order, scores=scores)
        if self.config.problem_type == "regression":
            return predictions
        return predictions.clamp(min=LEAST_PROBABILITY).log()

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.config.problem_type == "regression":
            return nn.functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
        return nn.functional.cross_entropy(logits, labels)

    # ---------------------------------------------------------------- trace, summary

    def _record(self, answers: torch.Tensor, **routing: torch.Tensor) -> None:
        if self.record_routing:
            self._calls.keep({"answers": answers.detach(), **{k: v.detach() for k, v in routing.items()}})

    def routing_trace(self) -> FoETrace:
        """The routing of this thread's or task's last forward; set ``model.record_routing = True`` first.

        Returns:
            A dict: "experts" (names), "cost_shares", "answers" (B, C), the model's outputs, "order" (B, K): 1 for the
            expert queried first, 0 for one not queried (in selection: 1 for the chosen one), and "outputs" (B, K, C),
            as the fuser reads them, in output mode or "scores" (B, K) in selection.

        Raises:
            ValueError: nothing was recorded in this thread or task.
        """
        if (trace := self._calls.kept()) is None:
            raise ValueError(
                "no routing was recorded: set model.record_routing = True, run the model, and read its routing in the "
                "same thread or task"
            )
        names = [expert["name"] for expert in self.config.experts]
        return FoETrace({"experts": names, "cost_shares": self.config.cost_shares, **trace}, self.config.id2label)

    def summary(self) -> Summary:
        """Describes the model in numbers.

        Returns:
            mode, experts (names), parameters, trainable (those of the fuser) and cost_shares (expert -> its share of
            the cost of querying all).
        """
        names = [expert["name"] for expert in self.config.experts]
        return Summary(
            mode=self.config.rule or self.config.mode,
            experts=names,
            parameters=self.num_parameters(),
            trainable=sum(p.numel() for p in self.fuser.parameters()),
            cost_shares=dict(zip(names, self.config.cost_shares, strict=True)),
        )

    def __repr__(self) -> str:
        config = self.config
        outputs = config.num_outputs if config.mode == "output" else None
        names = [expert["name"] for expert in config.experts]
        return described(self, "backbone_0", mode=config.rule or config.mode, experts=names, labels=outputs)


class FoEForGeneration(SelectionMixin, FoEModel, GenerationMixin):
    """Language models among which the fuser selects one per prompt to generate.

    Args:
        config: see `FoEModel`.
        models: see `FoEModel`.
    """


__all__ = ["FoEForGeneration", "FoEModel"]
