"""What the Spaces share: texts, styles, colours, and positions of labels."""

from __future__ import annotations

import json
import re
from itertools import combinations

import numpy as np
import pytest
from spaces.colours import EYES, INK_AND_CARD, SCHEMES, SPACES, contrast, lab, linear, rgb, variables

SERVED = {  # Space -> the config of a model that it serves
    "foe": {"model_type": "foe"},
    "phatgoose": {"model_type": "phatgoose"},
    "wemoe": {"model_type": "wemoe", "head": "causal-lm"},
}
EVIL = "<img src=x onerror=alert(1)>\"'{{evil}}${evil}"


@pytest.fixture(scope="module")
def page(space_modules):
    return space_modules("wemoe", "shared.page")[0]


@pytest.fixture(scope="module")
def experts(space_modules):
    return space_modules("wemoe", "shared.experts")[0]


@pytest.fixture(scope="module")
def plots(space_modules):
    return space_modules("wemoe", "shared.plots")[0]


@pytest.mark.parametrize("space", SERVED)
def test_code_runs_by_consent_and_wrong_settings_are_named(space_modules, space, tmp_path):
    (model,) = space_modules(space, "model")
    (tmp_path / "config.json").write_text(json.dumps(SERVED[space]))
    folder = str(tmp_path)
    for settings, said in (
        (model.Settings(folder), "code that would run in this Space: read it, then set TRUST_REMOTE_CODE=true"),
        (model.Settings(folder, trusted=True, template="Hi"), "PROMPT_TEMPLATE is 'Hi'; put {} where"),
        (model.Settings("no id at all/"), "neither a folder nor a model id"),
    ):
        with pytest.raises(model.LoadError, match=said):
            model.load(settings)


def test_no_text_becomes_markup(page, experts):
    parts = (
        page.header(EVIL, EVIL, EVIL, EVIL),
        page.message(EVIL, EVIL, EVIL),
        page.link(EVIL, EVIL, EVIL),
        page.link(None, EVIL, EVIL),
        experts.head_cell(0, EVIL),
    )
    html = "".join(parts)
    assert "<img" not in html and html.count("&lt;img") >= 10
    assert not re.search(r"[\w-]+=\"[^\"]*'", html)  # nor does a quote end an attribute


def test_a_message_has_a_hint_or_none(page):
    assert str(page.message("a", "b")).endswith("<p>b</p></section>")
    assert "<p>b</p><p>c</p></section>" in page.message("a", "b", "c")
    assert "<p>b</p><pre>c</pre></section>" in page.message("a", "b", page.Markup("<pre>c</pre>"))


def test_numbers_are_read_with_their_words(page):
    assert (page.percent(0.314), page.percent(0.3149, 1)) == ("31 %", "31.5 %")
    assert (page.count(1, "expert"), page.count(1200, "row")) == ("1 expert", "1,200 rows")


def test_short_names(experts):
    names = experts.short_names
    assert names(["me/smol-sport", "me/smol-art"]) == ["sport", "art"]
    assert names(["me/art", "you/law"]) == ["art", "law"]
    assert names(["me/art", "you/art"]) == ["me/art", "you/art"]  # else they would be one
    assert names(["me/art"]) == ["art"]
    assert names(["me/art-", "me/art-x"]) == ["me/art-", "me/art-x"]


def test_experts_beyond_the_colours_are_dashed_and_then_all_grey(experts):
    assert "var(--e7)" in experts.look(7) and "dashed" not in experts.look(7)
    assert "var(--e0)" in experts.look(8) and "dashed" in experts.look(8)
    assert "var(--e-rest)" in experts.look(16) and "dashed" not in experts.look(16)


def test_labels_are_spread_within_bounds(plots):
    assert plots.spread([0.5, 0.5], 0.25) == [0.375, 0.625]
    assert plots.spread([0.0, 0.0, 1.0], 0.25) == [0.0, 0.25, 1.0]
    assert plots.spread([10, 90, 90], 20, 0, 100) == [10, 80, 100]
    assert plots.axis_labels(["0", "1"]) == ["0", "1"]
    assert [label for label in plots.axis_labels([str(layer) for layer in range(13)]) if label] == ["0", "5", "10"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_expert_colours_are_distinguishable(scheme):
    colours = [rgb(colour) for name, colour in variables("_shared", scheme).items() if name.startswith("e")]
    assert len(colours) == 9
    for eye in map(np.array, EYES.values()):
        seen = [lab(eye @ linear(colour)) for colour in colours]
        assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 12


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_is_readable_on_its_ground(scheme):
    style, theme = variables("_shared", scheme), (SPACES / "_shared" / "blocks.py").read_text(encoding="utf-8")
    ink, card = INK_AND_CARD[scheme]
    assert f'"{ink}"' in theme and f'"{card}"' in theme
    suffix = "" if scheme == "light" else "_dark"
    soft, page = (
        re.search(rf'{name}{suffix}="(#\w+)"', theme)[1] for name in ("text_color_subdued", "background_fill")
    )
    pairs = [(ink, card), (ink, style["track"]), (soft, card), (soft, style["track"]), (soft, page)]
    for text, ground in [*pairs, (style["focus"], card), (style["focus"], page)]:
        assert contrast(rgb(text), rgb(ground)) >= 4.5, (text, ground)  # WCAG 2, AA
