"""The PHATGOOSE Space's data and HTML: colours, numbers, and escaping of prompts and outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from spaces.colours import INK_AND_CARD, SCHEMES, contrast, rgb, variables
from tiny import make_tokenizer

SPACE = Path(__file__).parents[2] / "spaces" / "phatgoose"
EVIL = "<img src=x onerror=alert(1)>\"'{{evil}}${evil}"
NAMES = ["sport", "art", "law"]
MODULES = [f"model.layers.{layer}.{path}" for layer in (0, 1) for path in ("self_attn.q_proj", "mlp.up_proj")]


@pytest.fixture(scope="module")
def routing(space_modules):
    return space_modules("phatgoose", "routing")[0]


@pytest.fixture(scope="module")
def page(space_modules):
    return space_modules("phatgoose", "page")[0]


@pytest.fixture
def made(routing):
    """Four tokens, of which the last was never read: the first is most of all for sport, the next two for law."""
    choice = torch.tensor([[[0, 1]] * 4, [[2, 0]] * 4, [[2, 1]] * 4, [[-1, -1]] * 4], dtype=torch.int16)
    weight = torch.tensor([[[0.75, 0.25]] * 4, [[0.625, 0.375]] * 4, [[1.0, 0.0]] * 4, [[0.0, 0.0]] * 4])
    choice[0, 3] = torch.tensor([1, -1])  # the last linear knows one expert only
    weight[0, 3] = torch.tensor([1.0, 0.0])
    return routing.Routing(
        pieces=["<s>", "a\nb", " c", "!"],
        special=[True, False, False, False],
        prompt=2,
        experts=["me/x-sport", "me/x-art", "me/x-law"],
        modules=MODULES,
        choice=choice,
        weight=weight,
        usage=[0.3, 0.2, 0.5],
        entropy=[0.5, 0.7, 1.0, 0.2],
    )


def tokens(html: str) -> list[tuple[str, str]]:
    """Colour and title of each token button."""
    return re.findall(
        r'data-token="\d+" data-number="\d+" title="([^"]*)" class="ui-expert" style="--c:var\(--e(\d+)\)', html
    )


def test_weights_are_averaged_over_the_linears_that_read_a_token(made):
    means = made.means()
    assert means[0].tolist() == pytest.approx([0.5625, 0.4375, 0])
    assert means[3].tolist() == [0, 0, 0]
    assert made.at(1)[0].tolist() == [0.375, 0, 0.625]
    assert made.dominant() == [(0, pytest.approx(0.5625)), (2, pytest.approx(0.625)), (2, 1.0), None]
    assert made.layers() == {"0": [0, 1], "1": [2, 3]}
    assert made.layer_entropy() == {"0": pytest.approx(0.6), "1": pytest.approx(0.6)}


def test_a_trace_is_read_from_its_end(routing):
    """A routed head reads only the tokens it writes from."""
    parts = {
        "model.layers.0.q": (torch.tensor([[[0, 1], [1, 2], [2, 0]]]), torch.full((1, 3, 2), 0.5)),
        "lm_head": (torch.tensor([[[1]]]), torch.ones(1, 1, 1)),
    }
    trace = SimpleNamespace(
        modules=list(parts),
        experts=NAMES,
        choices=parts.get,
        usage=lambda: dict.fromkeys(NAMES, 1 / 3),
        entropy=lambda: dict.fromkeys(parts, 0.5),
    )
    read = routing.read_trace(trace, ["a", "b", "c", "d"], [False] * 4, 3)
    assert read.choice[:, 0].tolist() == [[0, 1], [1, 2], [2, 0], [-1, -1]]
    assert read.choice[:, 1].tolist() == [[-1, -1], [-1, -1], [1, -1], [-1, -1]]
    assert read.layers() == {"0": [0], "head": [1]}


def test_data_is_plain(routing, made):
    data = json.loads(json.dumps(routing.to_data(made)))
    assert [token["expert"] for token in data["tokens"]] == ["me/x-sport", "me/x-law", "me/x-law", None]
    assert [token["part"] for token in data["tokens"]] == ["prompt", "prompt", "answer", "answer"]
    assert data["modules"][MODULES[3]]["experts"] == [[1, -1], [2, 0], [2, 1], [-1, -1]]
    assert data["modules"][MODULES[0]]["weights"][1] == [0.625, 0.375]
    assert data["usage"] == dict(zip(made.experts, made.usage))


@pytest.mark.parametrize("text", ["the fox: café 😀!\n\n x", "😀", "", " two  spaces "])
def test_pieces_of_text_are_whole_characters(routing, text):
    tokenizer = make_tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = routing.split_text(ids, tokenizer.decode)
    assert len(pieces) == len(ids) and "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_invalid_utf8_is_split_into_pieces(routing):
    tokenizer = make_tokenizer()
    broken = tokenizer("é", add_special_tokens=False).input_ids[:1] * 9
    pieces = routing.split_text(broken, tokenizer.decode)
    assert len(pieces) == 9 and set("".join(pieces)) == {"\ufffd"}


def test_tokens_have_their_experts_colour_number_and_share(page, made):
    html = str(page.answer(made, NAMES, 1))
    assert tokens(html) == [
        ("1 sport, 56 % of the weight", "0"),
        ("3 law, 62 % of the weight", "2"),
        ("3 law, 100 % of the weight", "2"),
    ]
    assert re.findall(r'tabindex="(-?\d)"', html) == ["-1", "0", "-1"]
    assert "<small>&lt;s&gt;</small>" in html and 'a<i class="pg-break"></i>\nb</span>' in html
    assert html.count("not read by the model") == 2  # the last token's title and the legend
    assert re.findall(r'data-number="(\d)"', html) == ["1", "3", "3"]
    legend = html[html.index("pg-legend") :]
    assert "sport" in legend and "law" in legend and "art" not in legend  # nowhere dominant


def test_one_token_as_a_heat_map_with_numbers(page, made):
    html = str(page.heat_map(made, NAMES, 0))
    rows = [re.findall(r">([^<]*)</t[hd]>", row) for row in html.split("<tr")[2:]]
    assert rows == [
        ["layer 0, mean", ".75", ".25"],
        ["q_proj", ".75", ".25"],
        ["up_proj", ".75", ".25"],
        ["layer 1, mean", ".38", ".62"],
        ["q_proj", ".75", ".25"],
        ["up_proj", "·", "1.00"],
    ]
    assert re.findall(r'<th scope="col" title="(\w+)"', html) == ["sport", "art"]  # law has no weight here
    whole = str(page.inspector(made, NAMES, 1))
    assert "token 2 of 4, in the prompt, from which the answer begins" in whole and "<q>a↵b</q>" in whole
    assert re.findall(r'<i title="([^"]*)"', whole)[0] == "layer 0, q_proj: 3 law 0.62"


def test_many_experts_are_summed(page, routing, made):
    names = [f"e{i}" for i in range(20)]
    values = {**made.__dict__, "experts": names, "modules": ["h.0.attn.c_proj", "h.0.mlp.c_proj"], "entropy": [1, 2]}
    many = routing.Routing(
        **values
        | {
            "choice": torch.arange(20, dtype=torch.int16).repeat(4, 2, 1),
            "weight": torch.linspace(0.1, 0, 20).softmax(0).repeat(4, 2, 1),
            "usage": [0.05] * 20,
        }
    )
    html = str(page.heat_map(many, names, 0))
    assert "4 others" in html and html.count('<th scope="col"') == 1 + 16 + 1
    assert "attn.c_proj" in html and "mlp.c_proj" in html  # the last part alone would not tell them apart
    assert float(re.findall(r">(\.\d+)</td></tr>", html)[0]) == pytest.approx(
        float(many.weight[0, 0, 16:].sum()), abs=0.01
    )
    assert "4 other experts" in page.overview(many, names) and "20.0 %" in page.overview(many, names)


def test_usage_is_sorted_and_entropy_has_a_table(page, made):
    html = str(page.overview(made, NAMES))
    assert re.findall(r'class="name" title="(\w+)"', html) == ["law", "sport", "art"]
    assert re.findall(r'class="number">([^<]*)<', html) == ["50.0 %", "30.0 %", "20.0 %"]
    assert re.findall(r'<th scope="row">(layer \d)</th><td>([\d.]+)</td>', html) == [
        ("layer 0", "0.60"),
        ("layer 1", "0.60"),
    ]
    assert "1.10 all 3 equally" in html


def test_answers_are_shown_side_by_side(page):
    html = str(
        page.comparison(
            [("A", "a", " yes\n", True), ("B", "b", "ye", False), ("C", "c", None, False), ("D", "d", " ", True)]
        )
    )
    assert re.findall(r'aria-busy="(\w+)"', html) == ["false", "true", "true", "false"]
    assert '<p class="pg-text">yes</p>' in html and "ye<i" in html and ">…<" in html and "(nothing)" in html


def test_no_text_becomes_markup(page, routing, made):
    evil = routing.Routing(
        **made.__dict__ | {"pieces": [EVIL] * 4, "modules": [f"model.layers.0.{EVIL}.{i}" for i in range(4)]}
    )
    names = [EVIL] * 3
    html = "".join(
        (
            page.header(EVIL, EVIL, EVIL, 3, 3, 2),
            page.streaming(EVIL, EVIL),
            page.answer(evil, names, 1),
            page.inspector(evil, names, 1),
            page.overview(evil, names),
            page.comparison([(EVIL, EVIL, EVIL, False)]),
        )
    )
    assert "<img" not in html and "&lt;img" in html
    assert not re.search(r"[\w-]+=\"[^\"]*'", html)  # nor does a quote end an attribute


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_on_an_experts_colour_is_read(scheme):
    colours = [rgb(colour) for name, colour in variables("_shared", scheme).items() if name.startswith("e")]
    most = int(variables("phatgoose", scheme)["most"].rstrip("%")) / 100
    ink, card = map(rgb, INK_AND_CARD[scheme])
    assert all(contrast(ink, most * colour + (1 - most) * card) >= 4.5 for colour in colours)
