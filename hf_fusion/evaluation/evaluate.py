"""One call for models of every family: measured beside what their papers compare them with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError, suggestion
from hf_fusion.evaluation.fusion import measure_foe
from hf_fusion.evaluation.harness import measure_harness
from hf_fusion.evaluation.merging import measure_merged, measure_static
from hf_fusion.evaluation.results import Results
from hf_fusion.evaluation.routing import measure_routing
from hf_fusion.families import FAMILIES
from hf_fusion.training.adamerging import CoefficientMerge

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_fusion.hub.load import ExpertLike
    from hf_fusion.models.modeling_phatgoose import PhatgooseRouter


def _of_router(router: PhatgooseRouter, suite: Mapping[str, Dataset], **options: Any) -> Results:
    """Rebuilds the router from its experts, as other routing strategies are built, with the router's own options."""
    experts = options.pop("experts", ())
    if not experts:
        raise FusionError(
            "a PHATGOOSE router is measured beside its experts, but no experts were given",
            hint="evaluate(router, suite, experts=[…]), as load_experts takes them",
        )
    config = {"top_k": router.config.num_experts_per_tok, "temperature": router.config.router_temperature}
    return measure_routing(experts, suite, **{**config, **options})


# family, by the name in `hf_fusion.families.FAMILIES` -> how its models are measured
MEASURES: dict[str, Callable[..., Results]] = {
    "foe": measure_foe,
    "phatgoose": _of_router,
    "wemoe": measure_merged,
}


def _measure_of(model: object) -> tuple[str, Callable[..., Results], bool]:
    """What a model is in words, how it is measured, and whether task by task."""
    if isinstance(model, (list, tuple)):
        return "a list of PHATGOOSE experts", measure_routing, True
    if isinstance(model, CoefficientMerge):
        return "a merge with coefficients", measure_merged, True
    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
    if family is None:
        return "a static merge", measure_static, True
    return family.title, MEASURES[family.name], family.by_task


def evaluate(
    model: ExpertLike | CoefficientMerge | Sequence[ExpertLike],
    data: Dataset | Mapping[str, Dataset] | None = None,
    *,
    harness: str | Sequence[str] | None = None,
    **options: Any,
) -> Results:
    """Measures a fused model beside its experts and simpler ways to use them.

        results = evaluate(model, rows)
        print(results.text())
        results["FoE"].only_score  # Score(score=0.98, ci95=(0.972, 0.986))
        results.save("fused/results.json")

    What is measured beside the model depends on its family:

    ============================  ==============================================================================
    `FoEModel`                    each expert, the frugal variant at every cost, mean ensemble, max confidence, the
                                  oracle; options of `hf_fusion.evaluation.fusion.measure_foe`
    `PhatgooseRouter`             the base, each expert, other routing strategies, the oracle; ``experts=`` and the
                                  options of `hf_fusion.evaluation.routing.measure_routing`
    `WEMoEModel`,                 with ``experts=`` the base, simple merges, each task's own expert; options of
    `CoefficientMerge`            `hf_fusion.evaluation.merging.measure_merged`
    a static merge                with ``experts=`` each of them and their base; options of
                                  `hf_fusion.evaluation.merging.measure_static`
    ============================  ==============================================================================

    Batches are divided among the processes of ``accelerate launch``, all of which must call this.

    Language models also run tasks of lm-evaluation-harness, in place of labelled rows:

        evaluate(model, harness=["arc_easy", "tasks/mine.yaml"], fewshot=5, limit=100, compare=True)

    Args:
        model: a fused model; of a static merge also its folder or its id on the Hub; of PHATGOOSE also a list of its
            experts, adapters with gates, as `load_experts` takes them.
        data: labelled rows that nothing was fitted on: one data set with columns ``text``, ``prompt`` or ``image`` and
            ``label`` or ``target`` for a FoE; task → data set for all others.
        harness: tasks of lm-evaluation-harness, with the options of `hf_fusion.evaluation.harness.measure_harness`.
        options: of the family, see above. All families have ``batch_size``, rows per step, and ``command``, which is
            stored in the results.

    Returns:
        What each predictor scored, with 95 % intervals; ``print(results.text())`` shows it.

    Raises:
        FusionError: for an option that the family does not have, data of another form, or rows that the model cannot
            read.
    """
    if isinstance(model, tuple) and any(hasattr(part, "forward") for part in model):
        raise FusionError("evaluate takes a model, not the pair (model, recipe)", "evaluate(load_fused(folder)[0], …)")
    if (data is None) == (harness is None):
        raise FusionError(
            "evaluate takes labelled rows or tasks of the harness, one of the two",
            "evaluate(model, rows) or evaluate(model, harness=['TASK.yaml'])",
        )
    if harness is not None:
        if isinstance(model, (CoefficientMerge, Sequence)) and not isinstance(model, str):
            raise FusionError("the harness runs one model", "fuse the experts first: hf_fusion.fuse(…)")
        if unknown := [name for name in options if name not in _options_of(measure_harness)]:
            hint = suggestion(unknown[0], _options_of(measure_harness))
            raise FusionError(f"evaluate has no option {unknown[0]!r} for tasks of the harness", hint)
        return measure_harness(model, harness, **options)
    assert data is not None
    title, measure, by_task = _measure_of(model)
    known = {*_options_of(measure_routing), "experts"} if measure is _of_router else {*_options_of(measure)}
    if unknown := [name for name in options if name not in known]:
        raise FusionError(
            f"evaluate has no option {unknown[0]!r} for {title}", hint=suggestion(unknown[0], sorted(known))
        )
    if by_task != isinstance(data, Mapping):
        raise FusionError(
            f"{title} is measured on {'a data set for each task' if by_task else 'one data set'}",
            hint="evaluate(model, {'task': rows})" if by_task else "evaluate(model, rows)",
        )
    return measure(model, data, **options)


def _options_of(measure: Callable[..., Any]) -> list[str]:
    """Parameters after the model and the data."""
    return list(inspect.signature(measure).parameters)[2:]


__all__ = ["evaluate"]
