"""The WEMoE Space's data and HTML: colours, numbers, tables, and escaping of inputs and outputs."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from spaces.colours import EYES, INK_AND_CARD, SCHEMES, contrast, lab, linear, rgb, variables
from tiny import images

SPACE = Path(__file__).parents[2] / "spaces" / "wemoe"
EVIL = "<img src=x onerror=alert(1)>\"'{{evil}}${evil}"
NAMES = ["sport", "art", "law"]
VALUES = [[0.3, 0.5, 0.1], [0.4, 0.3, 0.2]]


@pytest.fixture(scope="module")
def space(space_modules):
    """The Space's modules by name."""
    names = ("coefficients", "model", "batch", "page", "plots")
    return SimpleNamespace(**dict(zip(names, space_modules("wemoe", *names), strict=True)))


@pytest.fixture
def found(space):
    return space.coefficients.Coefficients(NAMES, ["0", "1"], VALUES, 0.3)


@pytest.fixture
def answer(space, found):
    return space.model.Answer("yes", ["no", "maybe", "yes", "never"], [0.1, 0.2, 0.65, 0.05], found)


# ---------------------------------------------------------------- data


def test_a_trace_is_read_row_by_row(space):
    tables = torch.rand(2, 3, 3)
    trace = SimpleNamespace(layers=[f"bert.encoder.layer.{i}" for i in range(3)], coefficients=lambda: tables)
    rows = space.coefficients.read_trace(trace, NAMES, 0.3, 2)
    assert [row.layers for row in rows] == [["0", "1", "2"]] * 2
    assert rows[1].means() == pytest.approx(tables[1].mean(0).tolist())
    data = json.loads(json.dumps(rows[0].to_data()))
    assert data["layers"]["2"] == pytest.approx(tables[0, 2].tolist(), abs=1e-4)
    assert data["means"]["art"] == pytest.approx(float(tables[0, :, 1].mean()), abs=1e-4)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["bert.encoder.layer.0", "bert.encoder.layer.11"], ["0", "11"]),
        (["encoder.block.0.layer.1", "decoder.block.0.layer.2"], ["encoder 0", "decoder 0"]),
        (["h.0.attn", "h.0.mlp"], ["h.0.attn", "h.0.mlp"]),
        (["mlp"], ["mlp"]),
    ],
)
def test_layers_are_called_by_their_numbers(space, paths, names):
    assert space.coefficients.layer_names(paths) == names


def test_inputs_are_read_from_lines_and_csv(space, tmp_path):
    Example = space.model.Example
    assert space.batch.read_lines(" one \n\ntwo\tthree\n") == [Example("one"), Example("two", "three")]
    assert space.batch.read_lines(None) == []
    path = tmp_path / "rows.csv"
    path.write_bytes('\ufefftext,text_pair,other\n"a, b",c,1\n,x,2\n"line\nbreak",,3\n'.encode())
    assert space.batch.read_csv(path) == [Example("a, b", "c"), Example("line\nbreak")]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"sentence,label\nx,1\n", "has the columns sentence, label; it needs one named text"),
        (b"", "has the columns none"),
        (b"text\n\xff\xfe\n", "not CSV in UTF-8"),
        (b'text\n"open', "not CSV in UTF-8"),
        (b"text\n" + b"x" * 5_000_001, "at most 5 MB are allowed"),
    ],
)
def test_files_that_cannot_be_read_are_named(space, tmp_path, content, problem):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(space.model.InputError, match=problem):
        space.batch.read_csv(path)


def test_pictures_are_read_from_files(space, tmp_path):
    images(1)[0].save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    [example] = space.batch.read_pictures([str(tmp_path / "a.png")])
    assert (example.name, example.image.size) == ("a.png", (20, 20))
    with pytest.raises(space.model.InputError, match="b.png cannot be read: it is not a picture.*; save it as PNG"):
        space.batch.read_pictures([str(tmp_path / "b.png")])


def test_download_has_the_rows_of_the_table(space, answer):
    Example = space.model.Example
    examples = [Example("a, b", "c"), Example('says "x"\n')]
    rows = list(csv.DictReader(io.StringIO(space.batch.to_csv(examples, [answer, answer], "law"))))
    assert [row["input"] for row in rows] == ["a, b", 'says "x"\n'] and rows[0]["text_pair"] == "c"
    assert (rows[0]["task"], rows[0]["answer"], rows[0]["probability"]) == ("law", "yes", "0.6500")
    assert [float(rows[0][name]) for name in NAMES] == pytest.approx([0.35, 0.4, 0.15])
    written = space.model.Answer("some words", coefficients=answer.coefficients)
    [row] = csv.DictReader(io.StringIO(space.batch.to_csv([Example("a")], [written], "")))
    assert (row["probability"], "text_pair" in row) == ("", False)


# ---------------------------------------------------------------- HTML


def cells(html: str) -> list[tuple[str, float, str]]:
    """Side, strength and number of each cell of a heat map."""
    found = re.findall(r'<td class="(more|less)" style="--a:([\d.]+)">(-?[\d.]+)</td>', html)
    return [(side, float(strength), number) for side, strength, number in found]


def test_the_heat_map_has_numbers_and_how_far_they_are_from_the_constant(space, found):
    html = str(space.plots.heat_map(found, False))
    numbers = " ".join(number for *_, number in cells(html))
    assert numbers == "0.30 0.50 0.10 0.40 0.30 0.20 0.35 0.40 0.15"
    assert [side for side, *_ in cells(html)[:3]] == ["more", "more", "less"]
    assert [strength for _, strength, _ in cells(html)[:3]] == [0, 1, 1]
    assert "more than 0.3" in html and "the constant of task arithmetic" in html
    assert "equal coefficients" in str(space.plots.heat_map(found, True))
    flat = space.plots.heat_cells([[0.301, 0.3]], 0.3)
    assert cells(str(flat[0]))[0][1] < 0.05  # noise is no choice


def test_depth_lines_match_the_axis(space, found):
    html = str(space.plots.depth_plot(found, 1, False))
    ticks = {float(name): float(y) for y, name in re.findall(r'<span style="top:([\d.]+)%">([\d.]+)</span>', html)}

    def y(value):
        low, high = min(ticks), max(ticks)
        return ticks[low] + (ticks[high] - ticks[low]) * (value - low) / (high - low)

    lines = re.findall(r'<polyline class="([^"]*)" style="--c:var\(--e(\d)\)" points="([^"]*)"/>', html)
    assert [(kind, colour) for kind, colour, _ in lines] == [("", "0"), ("", "2"), ("own", "1")]  # its own on top
    points = [tuple(map(float, point.split(","))) for point in lines[-1][2].split()]
    assert points == [(25.0, pytest.approx(y(0.5), abs=0.01)), (75.0, pytest.approx(y(0.3), abs=0.01))]
    assert float(re.search(r'class="constant" style="top:([\d.]+)%"', html)[1]) == pytest.approx(y(0.3), abs=0.01)
    assert "thick: art, the expert of this task" in html
    assert "layer 1: 2 art 0.30" in html
    ends = [float(top) for top in re.findall(r'<span style="top:([\d.]+)%" class', html)]
    assert all(b - a >= 100 * space.plots.LABEL_GAP - 0.02 for a, b in zip(ends, ends[1:]))


@pytest.mark.parametrize("layers", [1, 40])
def test_any_depth_and_many_experts(space, layers):
    names = [f"e{i}" for i in range(20)]
    values = np.random.default_rng(0).uniform(-1, 1, (layers, 20)).tolist()
    found = space.coefficients.Coefficients(names, [str(i) for i in range(layers)], values, 0.3)
    html = str(space.plots.coefficients_panel(found, None, False))
    assert html.count("<polyline") == 20 and html.count("--e-rest") >= 4 and "dashed" in html
    axis = re.findall(r'<span style="left:[\d.]+%">(\d*)</span>', html)
    assert [name for name in axis if name] == [str(i) for i in range(0, layers, 1 if layers == 1 else 5)]
    ends = [float(top) for top in re.findall(r'<span style="top:([\d.-]+)%" class', html)]
    assert min(ends) >= 0 and max(ends) <= 100


@pytest.mark.parametrize("values", [[0.3], [0.3, 0.3001], [-2.0, 3.0], [0.0, 1.0]])
def test_the_axis_holds_all_values_and_is_never_too_fine(space, values):
    low, high, ticks = space.plots.axis(values)
    assert low <= min(values) and max(values) <= high and high - low >= 0.2 - 1e-9
    assert 2 <= len(ticks) <= 8 and ticks == sorted(ticks)


def test_the_answer_and_its_likeliest_classes(space, answer):
    html = str(space.page.answer_panel(answer, "law", "data:image/png;base64,AA"))
    assert "Answer, with the head of law" in html and ">yes</p>" in html and "65.0 % confident" in html
    assert re.findall(r'title="(\w+)"', html) == ["yes", "maybe", "no", "never"]
    assert 'src="data:image/png;base64,AA"' in html
    short = str(space.page.bars(answer, 2))
    assert "2 others" in short and "15 %" in short
    score = str(space.page.answer_panel(space.model.Answer("3.2"), ""))
    assert "sure" not in score and "we-bars" not in score and ">Answer<" in score
    assert "(nothing)" in str(space.page.answer_panel(space.model.Answer(""), ""))


def test_comparisons_appear_one_by_one(space, answer):
    html = str(space.page.others(NAMES, answer, [None, answer, None], 1, 0.3, False))
    assert re.findall(r'aria-busy="(\w+)"', html) == ["false", "true", "false", "true"]
    assert "0.3 for all, head of art" in html and html.count("ui-card own") == 1
    assert "the expert of this task" in html and "its own head" in html
    smile = str(space.page.others(NAMES, None, [None] * 3, None, 1 / 3, True))
    assert "Equal coefficients" in smile and "0.333 for all<" in smile and "head" not in smile


def test_many_answers_as_a_table(space, answer, found):
    Example = space.model.Example
    other = space.model.Answer(
        "no", ["no", "yes"], [0.9, 0.1], space.coefficients.Coefficients(NAMES, ["0"], [[0, 0, 0]], 0.3)
    )
    html = str(
        space.page.table(
            NAMES,
            [Example("a" * 200), Example("b")],
            [answer, other],
            lambda rows: space.plots.heat_cells(rows, 0.3),
            "art",
        )
    )
    assert "2 answers" in html and "with the head of art" in html
    shown = [float(number) for *_, number in cells(html)]
    assert shown == pytest.approx([0.35, 0.4, 0.15, 0, 0, 0, 0.175, 0.2, 0.075], abs=0.0051)
    assert re.findall(r'class="said" title="(\w+)"', html) == ["yes", "no"]
    assert f"{'a' * 79}…" in html


CONFIG = {
    "routing": "wemoe",
    "merge": "task_arithmetic",
    "scaling": 0.3,
    "router_layers": 2,
    "shared_router": False,
    "adaptation": None,
    "experts": [{"name": "me/a", "license": "mit", "labels": ["x", "y", "z", "w"]}, {"name": "me/b", "labels": []}],
    "base": {"id": "me/base"},
}
SUMMARY = {
    "units": ["l.0", "l.1"],
    "upscaled_linears": 4,
    "task_vectors": "low-rank",
    "stored_bytes": 2_500_000,
    "energy": {"l.0": 0.9, "l.1": 0.8},
}
PARTS = {
    "upscaled_parameters": 1000,
    "task_vectors": 6000,
    "merged_parameters": 2500,
    "head_parameters": 0,
    "trainable": 500,
}


def test_the_parts_have_numbers_and_shares(space):
    html = str(space.page.facts_panel(SimpleNamespace(**CONFIG), SUMMARY, PARTS, {"me/a": "http://hub/me/a"}))
    rows = re.findall(r'part-(\w+)"></i>.*?<td>([\d,]+)<small>([\d.]+ %)</small>', html)
    assert rows == [
        ("upscaled_parameters", "1,000", "10.0 %"),
        ("task_vectors", "6,000", "60.0 %"),
        ("merged_parameters", "2,500", "25.0 %"),
        ("trainable", "500", "5.0 %"),
    ]
    assert "10,000 parameters, 2.5 MB" in html
    assert "as low-rank products, which keep 85.0 % of their energy" in html
    assert '<a href="http://hub/me/a"' in html and "mit · x, y, z, … (4)" in html and "no licence given" in html
    assert "Not adapted: every coefficient is about 0.3" in html and "All fine-tuned from me/base" in html


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"loss": "entropy"},
            "Adapted without labels, by minimising the entropy of predictions: 1,000 steps on 5 rows of 2 tasks.",
        ),
        ({"loss": "labels"}, "Adapted with labels: 1,000 steps"),
        ({"loss": "expert"}, "Adapted without labels, by imitating each task's expert: 1,000 steps"),
        ({"loss": "another"}, "Adapted: 1,000 steps"),
        ({"loss": "entropy", "stopped": "a narrowed"}, "Stopped early: a narrowed"),
    ],
)
def test_how_routers_were_adapted(space, changed, said):
    how = {"steps": 1000, "rows": {"a": 2, "b": 3}, "stopped": None, **changed}
    assert said in space.page.adaptation(SimpleNamespace(**{**CONFIG, "adaptation": how}))


def test_no_text_becomes_markup(space):
    found = space.coefficients.Coefficients([EVIL] * 3, [EVIL, EVIL + "1"], VALUES, 0.3)
    answer = space.model.Answer(EVIL, [EVIL, "b"], [0.6, 0.4], found)
    example = space.model.Example(EVIL, EVIL, name=EVIL)
    config = SimpleNamespace(
        **{
            **CONFIG,
            "merge": EVIL,
            "base": {"id": EVIL},
            "experts": [{"name": EVIL, "license": EVIL, "labels": [EVIL]}],
            "adaptation": {"loss": "labels", "steps": 1, "rows": {EVIL: 1}, "stopped": EVIL},
        }
    )
    page, plots = space.page, space.plots
    html = "".join(
        (
            page.header(EVIL, EVIL, EVIL, 3, 2, False),
            page.answer_panel(answer, EVIL, EVIL),
            page.others([EVIL] * 3, answer, [answer] * 3, 0, 0.3, False),
            page.table([EVIL] * 3, [example], [answer], lambda rows: plots.heat_cells(rows, 0.3), EVIL),
            page.facts_panel(config, {**SUMMARY, "units": [EVIL], "task_vectors": EVIL}, PARTS, {EVIL: EVIL}),
            plots.coefficients_panel(found, 1, False),
        )
    )
    assert "<img src=x" not in html and "&lt;img" in html
    assert not re.search(r"[\w-]+=\"[^\"]*'", html)  # nor does a quote end an attribute


@pytest.mark.parametrize("scheme", SCHEMES)
def test_cells_are_distinguishable_and_legible(scheme):
    style = variables("wemoe", scheme)
    more, less = rgb(style["more"]), rgb(style["less"])
    for eye in map(np.array, EYES.values()):
        assert np.linalg.norm(lab(eye @ linear(more)) - lab(eye @ linear(less))) > 30
    most = int(style["most"].rstrip("%")) / 100
    ink, card = map(rgb, INK_AND_CARD[scheme])
    assert all(contrast(ink, most * colour + (1 - most) * card) >= 4.5 for colour in (more, less))
