"""The FoE Space's HTML: its content, axes, and escaping of text from a model."""

from __future__ import annotations

import re

import pytest

EVIL = "<img src=x onerror=alert(1)>\"'"
LABELS = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def page(space_modules):
    return space_modules("foe", "page")[0]


@pytest.fixture(scope="module")
def curve(space_modules):
    return space_modules("foe", "curve")[0]


def expert(name: str, order: int, probabilities: list[float | None] | None, share: float = 0.25, score=None) -> dict:
    known = (
        LABELS if probabilities is None else [x for x, p in zip(LABELS, probabilities, strict=True) if p is not None]
    )
    return {
        "name": name,
        "revision": None,
        "cost_share": share,
        "order": order,
        "score": score,
        "labels": known,
        "probabilities": probabilities,
    }


def routing(budget: float | None = 0.8, **changes) -> dict:
    experts = [
        expert("me/pets", 2, [0.25, 0.75, None], 0.5),
        expert("me/birds", 0, None),
        expert("me/all", 1, [0.625, 0.25, 0.125]),
    ]
    values = {
        "answer": "dog",
        "confidence": 0.787,
        "labels": LABELS,
        "probabilities": [0.2, 0.787, 0.013],
        "cost": 0.75,
        "budget": budget,
        "mode": "output",
        "axis": [0.0, 1.0],
        "experts": experts,
    }
    return {**values, **changes}


RESULTS = {
    "metric": "accuracy",
    "n": 1500,
    "dataset": "digits",
    "systems": [
        {"name": "FoE", "kind": "foe", "score": 0.95, "ci95": (0.94, 0.96), "cost": 1.0},
        {"name": "FoE, frugal", "kind": "frugal", "score": 0.943, "ci95": (0.93, 0.95), "cost": 0.4},
        {"name": "mean ensemble", "kind": "baseline", "score": 0.9, "ci95": (0.89, 0.91), "cost": 1.0},
        {"name": "me/pets", "kind": "expert", "score": 0.6, "ci95": (0.58, 0.62), "cost": 0.2},
        {"name": "me/birds", "kind": "expert", "score": 0.2, "ci95": (0.18, 0.22), "cost": 0.2},
        {"name": "oracle expert", "kind": "oracle", "score": 0.99, "ci95": (0.98, 1.0), "cost": 1.0},
    ],
    "curve": [
        {"score": 0.7, "cost": 0.2, "ci95": (0.68, 0.72)},
        {"score": 0.943, "cost": 0.4, "ci95": (0.93, 0.95)},
    ],
}


def rows(html: str) -> list[tuple[str, str, str]]:
    """Class, label and number of every bar."""
    return re.findall(r'<li class="(\w*)"><span class="name"[^>]*>([^<]*)</span>.*?class="number">([^<]*)<', html)


def test_every_expert_has_the_same_labels_on_the_same_axis(page):
    html = str(page.experts_panel(routing(), {}))
    cards = html.split("<article")[1:]
    assert [re.findall(r"<h3>.*?>([^<]*)</", card)[0] for card in cards] == ["all", "pets", "birds"]  # order of asking
    assert rows(cards[0]) == [("differs", "cat", "0.62"), ("same", "dog", "0.25"), ("", "owl", "0.12")]
    assert rows(cards[1]) == [("", "cat", "0.25"), ("same", "dog", "0.75"), ("unknown", "owl", "–")]
    assert "not queried" in cards[2] and not rows(cards[2])
    axes = re.findall(r'foe-axis" aria-hidden="true">(.*?)</div>', html)
    assert axes == ["<span>0</span><span>0.5</span><span>1</span>"] * 2
    assert len(set(re.findall(r"--label:\d+ch", html))) == 1


def test_answer_order_and_cost_are_shown(page):
    html = str(page.answer_panel(routing()))
    assert "78.7 % confident" in html and "2 of 3 experts queried" in html and "<b>75 %</b> of the cost" in html
    assert re.findall(r"<li><b>(\d)</b>(\w+) <span>(\d+ %)", html) == [("1", "all", "25 %"), ("2", "pets", "50 %")]
    everyone = str(page.answer_panel(routing(budget=None)))
    assert "All 3 experts queried" in everyone and "<li><b>" not in everyone


def test_selection_shows_the_chosen_expert_and_scores(page):
    experts = [expert("me/pets", 1, [0.2, 0.8, None], score=0.9), expert("me/birds", 0, None, score=0.1)]
    values = routing(None, mode="selection", experts=experts)
    html = str(page.answer_panel(values))
    assert (
        "pets was chosen" in html and ("same", "pets", "0.900") in rows(html) and ("", "birds", "0.100") in rows(html)
    )
    assert "not chosen" in page.experts_panel(values, {})


def test_language_model_generates_text(page):
    experts = [expert("me/poet", 1, None, score=0.9), expert("me/clerk", 0, None, score=0.1)]
    values = routing(
        None,
        mode="selection",
        experts=experts,
        labels=[],
        probabilities=[],
        confidence=None,
        answer="Once upon a time " * 3,
    )
    html = str(page.answer_panel(values))
    assert "Once upon a time" in html and "confident" not in html and "foe-word long" in html
    assert "chosen" in page.experts_panel(values, {})


def test_texts_of_a_model_never_become_markup(page, curve):
    labels = [EVIL, "dog", "owl"]
    experts = [expert(f"me/{EVIL}", 1, [0.25, 0.75, None])]
    values = routing(labels=labels, answer=EVIL, experts=experts)
    systems = [{**system, "name": EVIL, "kind": system["kind"]} for system in RESULTS["systems"]]
    results = {**RESULTS, "systems": [*systems, {**systems[0], "kind": EVIL}], "metric": "accuracy", "dataset": EVIL}
    html = "".join(
        (
            page.header(EVIL, EVIL, EVIL, 3, 3, "output", True),
            page.answer_panel(values, EVIL),
            page.experts_panel(values, {f"me/{EVIL}": EVIL}),
            curve.results_panel(results, values),
            curve.results_panel({**results, "metric": EVIL}, values),
        )
    )
    assert "<img src=x" not in html and "&lt;img" in html
    assert not re.search(r"[\w-]+=\"[^\"]*'", html)  # nor does a quote end an attribute


def test_the_plot_has_a_table_beside_it(curve):
    html = str(curve.results_panel(RESULTS, routing()))
    table = re.findall(r'title="([^"]*)"><i></i>[^<]*</th><td>([\d.]+)</td><td>± ([\d.]+)</td><td>(\d+ %)', html)
    assert table[0] == ("FoE", "95.0", "1.0", "100 %") and len(table) == len(RESULTS["systems"])
    assert "costs <b>40 %</b>" in html and "0.7 points below" in html
    level = [{**system, "score": 0.95} for system in RESULTS["systems"][:2]]
    assert "as accurate as querying every expert" in curve.results_panel({**RESULTS, "systems": level})
    assert "budget 80 %" in html and "this input 75 %" in html
    assert "1 weaker predictor is outside the axis" in html  # me/birds, under the axis that begins at 0.6 or less
    assert "budget 80 %" not in curve.results_panel(RESULTS, routing(budget=None))


def test_missing_results_are_reported(curve):
    assert "no results.json" in curve.results_panel(None)


@pytest.mark.parametrize("metric", ["accuracy", "mse"])
@pytest.mark.parametrize("scores", [[0.5], [0.5, 0.5], [0.931, 0.934, 0.6], [0.0, 1.0], [12.0, 90.0]])
def test_axes_hold_every_score(curve, metric, scores):
    systems = [{"kind": "foe", "score": score} for score in scores]
    low, high, ticks = curve.score_axis({"metric": metric, "systems": systems, "curve": []})
    assert low <= min(scores) < high and max(scores) <= high
    assert 2 <= len(ticks) <= 8 and ticks[0] == low and ticks[-1] <= high + 1e-9


def test_names_in_the_margin_do_not_overlap(curve):
    for places in ([0.1, 0.1, 0.1], [0.0, 0.02, 0.9], [0.95, 0.97, 1.0], [0.5], []):
        apart = curve.spread(places, 0.05)
        assert len(apart) == len(places) and all(place <= 1 for place in apart)
        assert all(b - a >= 0.05 - 1e-9 for a, b in zip(apart, apart[1:]))
    assert curve.spread([0.2, 0.6], 0.05) == [0.2, 0.6]
