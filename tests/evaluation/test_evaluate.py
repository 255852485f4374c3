"""`evaluate` chooses the measurement and the baselines by the model's family."""

from __future__ import annotations

import pytest
from golden_cells import classifiers, generated, labelled, routed, said
from tiny import llama, make_tokenizer

from hf_fusion import Expert, FoEModel, FusionError, PhatgooseRouter, evaluate
from hf_fusion.evaluation.loop import TaskRows, predict_task, score_task
from hf_fusion.evaluation.predictions import Predictions
from hf_fusion.evaluation.predictors import Batch, OutputPredictor
from hf_fusion.evaluation.results import MeasuredTask
from hf_fusion.evaluation.routing import PREDICTORS


def test_options_and_data_of_other_families_are_refused():
    model = FoEModel.from_experts(classifiers())
    with pytest.raises(FusionError, match="evaluate has no option 'owners' for a Fusion of Experts"):
        evaluate(model, labelled(), owners={})
    with pytest.raises(FusionError, match="a Fusion of Experts is measured on one data set"):
        evaluate(model, {"task": labelled()})
    with pytest.raises(FusionError, match="a static merge is measured on a data set for each task"):
        evaluate("me/merge", labelled())
    with pytest.raises(FusionError, match="not the pair"):
        evaluate((model, None), labelled())  # as load_fused returns them


def test_rows_that_a_fusion_of_experts_cannot_be_measured_on_are_named():
    classes = FoEModel.from_experts(classifiers())
    with pytest.raises(FusionError, match="the task data has no rows"):
        evaluate(classes, labelled().select([]))
    with pytest.raises(FusionError, match="but no 'label' to measure against"):
        evaluate(classes, labelled().remove_columns("label"))
    experts = [Expert(f"me/{seed}", llama(seed), processor=make_tokenizer()) for seed in range(2)]
    language = FoEModel.from_experts(experts, mode="selection")
    rows = generated(llama())
    with pytest.raises(FusionError, match="the task words has no rows"):
        evaluate(language, rows.select([]), name="words")
    with pytest.raises(FusionError, match="but no 'target' to measure against"):
        evaluate(language, rows.remove_columns("target"))
    with pytest.raises(FusionError, match="none of .*'prompt'"):
        evaluate(language, rows.remove_columns("prompt"))


def test_a_router_is_measured_beside_its_experts():
    experts = routed(llama(), 3, ["layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"])
    router = PhatgooseRouter.from_experts(experts, top_k=1)
    suite = {"zero": said(router, "expert-0", 3)}
    options = {"train_rows": {}, "owners": {"zero": "expert-0"}, "predictors": ["PHATGOOSE", "experts"]}
    with pytest.raises(FusionError, match="no experts were given"):
        evaluate(router, suite, **options)
    results = evaluate(router, suite, experts=experts, metrics={"zero": "tokens"}, **options)
    assert results.settings["top_k"] == 1
    same = evaluate(experts, suite, top_k=1, metrics={"zero": "tokens"}, **options)
    assert results.predictors == same.predictors


def test_tasks_belong_to_the_experts_whose_names_they_bear():
    experts = routed(llama(), 2, ["layers.1.mlp.up_proj"])
    router = PhatgooseRouter.from_experts(experts)
    suite = {"expert-1": said(router, "expert-1", 3), "other": said(router, None, 2)}
    results = evaluate(router, suite, experts=experts)
    left_out = {"retrieval", "average activation"}  # nothing is known of what the experts were trained on
    names = {*PREDICTORS, "best in hindsight", "expert-0", "expert-1"} - left_out - {"experts"}
    assert {predictor.name for predictor in results.predictors} == names
    assert [task.owner for task in results.tasks] == ["expert-1", None]
    assert results["oracle"].scores.keys() == {"expert-1"}
    with pytest.raises(FusionError, match="retrieval needs rows that expert-0 was trained on"):
        evaluate(router, suite, experts=experts, predictors=["retrieval"])


def test_two_predictors_of_one_name_are_refused():
    data = TaskRows(MeasuredTask("task", "accuracy", 1), [{}], lambda batch: {})
    twins = [OutputPredictor("twin", kind, 1.0, Predictions([0], [0])) for kind in ("expert", "oracle")]
    with pytest.raises(FusionError, match="two predictors have the name 'twin'"):
        score_task(twins, data, 1)


def test_every_row_is_scored_once_in_its_place():
    """Rows are batched by length; their scores come back in the order of the data."""
    lengths = [5, 1, 4, 2, 3]
    rows = [{"input_ids": [0] * length, "index": index} for index, length in enumerate(lengths)]
    seen = []

    class Indices:
        name, kind, cost = "indices", "expert", None

        def predict(self, batch: Batch) -> Predictions:
            seen.append(batch.indices)
            return Predictions([row["index"] for row in batch.inputs["rows"]], batch.indices)

    data = TaskRows(MeasuredTask("task", "accuracy", 5), rows, lambda batch: {"rows": batch})
    kept = OutputPredictor("kept", "oracle", 1.0, Predictions([0, 1, 2, 3, 4], [4, 3, 2, 1, 0]))
    found = predict_task([Indices(), kept], data, 2)
    assert seen == [[1, 3], [4, 2], [0]]
    assert found["indices"] == Predictions([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    assert found["kept"] == kept.found
    assert score_task([kept], data, 2)["kept"].tolist() == [0, 0, 1, 0, 0]
