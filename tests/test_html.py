"""What a notebook shows of each object: tables with the right content, escaped, cut with a count."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from html_tables import Tables
from models.test_shown import FUSED, foe
from tiny import TEXTS, images, make_tokenizer, vit

from hf_fusion import (
    Expert,
    ExpertInfo,
    FoETrace,
    Gates,
    PhatgooseTrace,
    Recipe,
    RecipeExpert,
    WEMoETrace,
    load_experts,
)
from hf_fusion.evaluation.intervals import Score
from hf_fusion.evaluation.results import MeasuredTask, PredictorScores, Results
from hf_fusion.hub.compat import Compatibility, Rejected
from hf_fusion.hub.discover import Experts
from hf_fusion.hub.rejection_reasons import Reason, ReasonKind
from hf_fusion.merging.extraction_report import ExtractedPart, Extraction
from hf_fusion.merging.merge_report import MergeReport
from hf_fusion.models.fused_html import LONGEST, MOST_COLUMNS, MOST_ROWS
from hf_fusion.models.fused_summary import Summary
from hf_fusion.training.adaptation import Adaptation, Diagnostics
from hf_fusion.training.fuser import Fit
from hf_fusion.training.fuser_choice import Scored

EVIL = "<script>alert(1)</script>"


def shown(value: object) -> list[list[list[str]]]:
    """The cells of the tables that a notebook shows."""
    return Tables(value._repr_html_()).tables


def info(name: str, **more: object) -> ExpertInfo:
    return ExpertInfo(name, "0123456789" * 4, **{"size": 1_500_000, "architecture": "ViT", **more})


def test_experts_found_are_a_table_without_empty_columns():
    experts = Experts((info("me/a", labels=("x", "y")), info("me/b", is_adapter=True, has_gates=True)))
    parsed = Tables(experts._repr_html_())
    assert parsed.captions == ["2 experts found"]
    assert parsed.tables == [
        [
            ["id", "sha", "kind", "labels", "gates", "MB"],
            ["me/a", "0123456", "ViT", "x, y", "", "1.5"],
            ["me/b", "0123456", "adapter", "", "yes", "1.5"],
        ]
    ]
    assert Tables(Experts()._repr_html_()).captions == ["0 experts found"]


def test_one_table_has_the_accepted_and_the_rejected_with_their_reasons():
    reasons = Reason(ReasonKind.SHAPES, "a is [1], not [2]"), Reason(ReasonKind.LICENSE, "forbids derivatives")
    parsed = Tables(Compatibility([info("me/a")], [Rejected(info("me/b"), reasons)])._repr_html_())
    assert parsed.captions == ["1 accepted, 1 rejected"]
    assert [row[:3] for row in parsed.tables[0]] == [
        ["id", "accepted", "rejected because"],
        ["me/a", "yes", ""],
        ["me/b", "no", "shapes: a is [1], not [2]\nlicense: forbids derivatives"],
    ]
    assert "rejected because" not in shown(Compatibility([info("me/a")]))[0][0]


def test_long_lists_are_cut_with_a_count_and_rejections_stay_visible():
    many = [info(f"me/{i}", labels=tuple(map(str, range(1000)))) for i in range(100)]
    reason = (Reason(ReasonKind.PICKLE, "has only pickle weights"),)
    [rows] = shown(Compatibility(many, [Rejected(each, reason) for each in many[:30]]))
    assert len(rows) == 1 + 2 * MOST_ROWS
    assert rows[MOST_ROWS] == [f"… and {100 - MOST_ROWS + 1} more accepted"]
    assert rows[-1] == [f"… and {30 - MOST_ROWS + 1} more rejected"]
    assert rows[1][-2] == "0, 1, 2, 3, 4, 5, 6, 7, 8, … and 991 more"
    assert len(shown(Experts(tuple(many[:MOST_ROWS])))[0]) == 1 + MOST_ROWS


def test_loaded_experts_are_a_list_and_a_table_without_weights():
    model = vit(["a", "b"], 0)
    expert = Expert("me/vit", model, labels=["a", "b"], revision="f" * 40, gates=Gates({"q": torch.ones(2)}))
    experts = load_experts([expert, model])
    assert isinstance(experts, list) and experts[0] is expert
    assert shown(experts)[0][:2] == [
        ["name", "commit", "model", "task", "labels", "gates"],
        ["me/vit", "fffffff", "ViTForImageClassification", "", "a, b", "trained"],
    ]
    assert ["commit", "fffffff"] in shown(expert)[0]
    assert shown(Gates({"q": torch.ones(2)}, facts={"steps": 50})) == [
        [["gates", "trained"], ["linears", "q"], ["steps", "50"]]
    ]
    assert shown(info("me/a", labels=("x", "y")))[0] == [
        ["id", "me/a"], ["commit", "0123456789" * 4], ["MB", "1.5"], ["architecture", "ViT"], ["labels", "x\ny"],
    ]  # fmt: skip


def score(value: float) -> Score:
    return Score(value, (value - 0.1, value + 0.1))


def test_results_on_pooled_rows_are_a_table():
    results = Results(
        [MeasuredTask("digits", "accuracy", 1597, pooled=True)],
        [PredictorScores("FoE", "fused", {"digits": score(0.5)}, cost=1.0)],
    )
    parsed = Tables(results._repr_html_())
    assert parsed.captions == ["digits: 1,597 rows"]
    assert parsed.tables == [
        [["predictor", "accuracy", "95 % interval", "cost"], ["FoE", "50.0%", "40.0% – 60.0%", "100%"]]
    ]


def test_results_by_task_are_the_tables_of_their_text():
    results = Results(
        [MeasuredTask("cola", "accuracy", 100, "me/a")],
        [
            PredictorScores("merged", "fused", {"cola": score(0.5)}, {"held-in": score(0.5)}),
            PredictorScores("me/a", "expert", {"cola": score(0.6)}, {"held-in": score(0.6)}, {"held-in": score(-0.1)}),
        ],
    )
    tables = shown(results)
    assert tables[0][0] == ["task", "n", "merged", "best single: me/a"]
    assert tables[0][1] == ["cola", "100", "50.0 (40 to 60)", "60.0 (50 to 70)"]
    assert tables[1] == [["lead over", "held-in"], ["me/a", "-10.0 (-20 to 0)"]]
    assert tables[2][1] == ["cola", "100", "60"]
    words = {word for table in tables for row in table for cell in row for word in cell.split()}
    assert words >= set(results.text().split())


def test_reports_are_tables():
    recipe = Recipe("ties", [RecipeExpert("me/a"), RecipeExpert("me/b")], base="me/base")
    assert "method: ties" in recipe._repr_html_()
    assert shown(MergeReport(Path("merged"), recipe, 1234, 2_000_000, 3.21, warnings=["a", "b"]))[0] == [
        ["folder", "merged"], ["method", "ties"], ["base", "me/base"], ["experts", "me/a\nme/b"], ["tensors", "1,234"],
        ["MB", "2"], ["seconds", "3.2"], ["warnings", "a\nb"],
    ]  # fmt: skip
    assert ["held out rows", "10"] in shown(Fit("mlp", 90, 10, 0.25, 0.9, None, []))[0]
    before, after = Diagnostics(0.5, 1, 0.25, 0.125, 2), Diagnostics(0.75, 0.5, 1, 1, 0)
    report = Adaptation(
        "expert", 0.0, 1e-3, 16, steps=50, rows={"cola": 600}, before={"cola": before}, after={"cola": after}
    )
    facts, tasks = shown(report)
    assert ["rows", "cola  600"] in facts
    assert tasks[1] == ["cola", "0.50 → 0.75", "1.00 → 0.50", "0.25 → 1.00", "0.12 → 1.00", "2.00 → 0.00"]


@pytest.mark.parametrize("family", FUSED)
def test_a_summary_is_the_table_that_it_prints(family):
    summary = FUSED[family]().summary()
    [rows] = shown(summary)
    assert [cell.split() for row in rows for cell in row] != []
    printed = re.sub(r"\s+", " ", str(summary)).strip()
    assert re.sub(r"\s+", " ", " ".join(cell for row in rows for cell in row)).strip() == printed


def routed(family: str) -> tuple[object, object]:
    """A model and its trace of two inputs."""
    model = FUSED[family]()
    model.record_routing = 4096
    with torch.no_grad():
        model(**make_tokenizer()(TEXTS[:2], return_tensors="pt", padding=True))
    return model, model.routing_trace()


def numbers(cells: list[str]) -> list[float]:
    return [float(cell) for cell in cells]


def test_a_routers_trace_has_the_weights_by_linear_and_by_token():
    model, trace = routed("phatgoose")
    by_linear, by_token = shown(trace)
    assert by_linear[0] == ["linear", *model.experts]
    assert by_linear[1][0] == "all"
    assert numbers(by_linear[1][1:]) == pytest.approx(list(trace.usage().values()), abs=0.005)
    module = trace.modules[2]
    total = trace.expert_weights(module).sum((0, 1))
    assert by_linear[4][0] == module
    assert numbers(by_linear[4][1:]) == pytest.approx((total / total.sum()).tolist(), abs=0.005)
    mean = trace.mean_weights()[0]
    read = mean.sum(-1).nonzero().flatten().tolist()
    assert len(read) < len(mean)  # the other input is longer
    assert [int(row[0]) for row in by_token[1:]] == read[-MOST_ROWS:]
    for row in by_token[1:]:
        assert numbers(row[1:]) == pytest.approx(mean[int(row[0])].tolist(), abs=0.005)


def test_a_wemoe_trace_has_the_coefficients_by_layer_and_by_input():
    model, trace = routed("wemoe")
    by_layer, by_input = shown(trace)
    w = trace.coefficients()
    assert by_layer[0] == ["layer", *model.experts]
    assert [row[0] for row in by_layer[1:]] == trace.layers
    assert [numbers(row[1:]) for row in by_layer[1:]] == [pytest.approx(row, abs=0.005) for row in w.mean(0).tolist()]
    assert [numbers(row[1:]) for row in by_input[1:]] == [pytest.approx(row, abs=0.005) for row in w.mean(1).tolist()]
    one = WEMoETrace(["a", "b"])
    one.add("mlp", torch.tensor([[0.3, -0.1]]), 1)
    assert shown(one) == [[["layer", "a", "b"], ["mlp", "0.30", "-0.10"]]]


def test_a_foe_trace_has_predictions_and_the_order_of_the_experts():
    model = foe(3)
    model.record_routing = True
    pixels = model.processor(images=images(2))
    with torch.no_grad():
        logits = model(**pixels).logits
    trace = model.routing_trace()
    assert isinstance(trace, dict) and type(trace) is FoETrace and trace["order"].shape == (2, 3)
    names = ", ".join(model.config.experts[i]["name"] for i in trace["order"][0].argsort())
    assert shown(trace)[0] == [
        ["input", "prediction", "experts, in the order queried", "cost"],
        *([str(i), model.config.id2label[int(logits[i].argmax())], names, "100%"] for i in range(2)),
    ]
    values = {"experts": ["a", "b"], "cost_shares": [0.25, 0.75]}
    regression = FoETrace(values | {"answers": torch.tensor([[0.5]]), "order": torch.tensor([[2, 1]])})
    assert shown(regression)[0][1] == ["0", "0.5", "b, a", "100%"]
    choice = FoETrace(values | {"answers": torch.tensor([0] * 50), "order": torch.tensor([[1, 0]] * 50)})
    assert shown(choice)[0][1] == ["0", "a", "25%"]
    assert shown(choice)[0][-1] == [f"… and {50 - MOST_ROWS + 1} more inputs"]


def test_the_most_used_of_many_experts_have_columns():
    count = MOST_COLUMNS + 5
    trace = WEMoETrace([f"me/{i}" for i in range(count)])
    trace.add("mlp", torch.arange(count)[None] / 100, 1)
    [rows] = shown(trace)
    assert rows[0] == ["layer", *(f"me/{i}" for i in range(5, count)), "5 others"]
    assert rows[1][-1] == "0.10"  # 0 + 0.01 + … + 0.04


def hostile() -> list[object]:
    """Each kind of object with a script in every text that may come from a stranger."""
    facts = {EVIL: EVIL, "many": [EVIL] * 30, "mapping": {EVIL: EVIL}}
    evil = info(EVIL, task=EVIL, base_model=EVIL, labels=(EVIL,), license=EVIL, tags=(EVIL,), architecture=EVIL)
    wemoe, phatgoose = WEMoETrace([EVIL]), PhatgooseTrace([EVIL], {}, 10)
    wemoe.add(EVIL, torch.ones(2, 1), 2)
    phatgoose._parts[EVIL] = [(torch.zeros(1, 1, 1, dtype=torch.int16), torch.ones(1, 1, 1))]
    recipe = Recipe("ties", [RecipeExpert("me/a")], parameters={"x": EVIL}, base="me/base")
    values = {"experts": [EVIL], "cost_shares": [1.0], "answers": torch.ones(1, 2), "order": torch.ones(1, 1)}
    return [
        Experts((evil,)),
        Compatibility([evil], [Rejected(evil, (Reason(ReasonKind.LABELS, EVIL),))]),
        evil,
        load_experts([Expert(EVIL, vit(["a"], 0), labels=[EVIL], task=EVIL, license=EVIL)]),
        Gates({EVIL: torch.ones(1)}, kind=EVIL),
        Summary(facts),
        recipe,
        MergeReport(Path(EVIL), recipe, 1, 1, 1, warnings=[EVIL]),
        Extraction(Path(EVIL), EVIL, EVIL, (ExtractedPart(EVIL, "left out", 1, note=EVIL),), 1, 1.0),
        Fit("mlp", 1, 1, 1.0, None, None, [EVIL], [Scored(EVIL, 1.0, 0.5)]),
        Adaptation("expert", 0, 1, 1, rows={EVIL: 1}, stopped=EVIL),
        Results([MeasuredTask(EVIL, EVIL, 1, pooled=True)], [PredictorScores(EVIL, "fused", {EVIL: score(0.5)})]),
        wemoe,
        phatgoose,
        FoETrace(values, {0: EVIL, 1: EVIL}),
    ]


@pytest.mark.parametrize("value", hostile(), ids=lambda value: type(value).__name__)
def test_everything_is_escaped(value):
    html = value._repr_html_()
    assert "<script" not in html and "&lt;script&gt;" in html
    Tables(html)


def test_a_cell_has_a_limited_length():
    assert len(Summary(a="x" * 10**6)._repr_html_()) < LONGEST + 1000
