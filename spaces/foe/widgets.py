"""Inputs that Gradio does not have: a pad to draw a digit on, a picture opened by us, a budget with "all experts"."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData

ALL = "all"  # the budget's value for "all experts"; Gradio would turn null into an empty text
FOLDER = Path(__file__).parent

PAD = """<div class="foe-pad"><canvas width="336" height="336" aria-label="Draw a digit here"></canvas>
<div class="tools"><span>draw with mouse or finger</span>
<label><input type="file" accept="image/*">Upload</label><button type="button" class="clear">Clear</button></div>
<p class="foe-kicker">Examples</p><div class="examples">{examples}</div></div>"""

EXAMPLE = '<button type="button" aria-label="Example: {name}"><img src="{url}" alt="{name}"></button>'

BUDGET = """<div class="foe-card foe-budget"><label><span>Budget</span><output></output>
<input type="range" min="1" max="11" step="1" value="11"></label>
<div class="ends" aria-hidden="true"><span>10 % of the cost</span><span>all experts, at once</span></div></div>"""


def picture(**options: Any) -> gr.Image:
    """Gradio's own input, but that it hands on what was uploaded unopened: `pictures.open_picture` opens it."""
    component = gr.Image(type="filepath", image_mode=None, **options)
    component.preprocess = _unopened  # type: ignore[method-assign]  # a subclass would make Gradio write a stub beside it
    return component


def _unopened(payload: ImageData | None) -> str | Path | None:
    """A file, or a data URL, as it was given."""
    if payload is None or (payload.url or "").startswith("data:"):
        return payload and payload.url
    return Path(payload.path) if payload.path else ""


def pad(examples: dict[str, str], value: str = "") -> gr.HTML:
    """A square to draw on, with upload and examples; its value is a data URL, empty for a blank one.

    Args:
        examples: name -> data URL.
        value: what is on it at first.
    """
    buttons = "".join(EXAMPLE.format(name=escape(name), url=escape(url)) for name, url in examples.items())
    return _widget(PAD.format(examples=buttons), "pad.js", value)


def budget() -> gr.HTML:
    """A slider from 10 % to 100 % of the experts' cost, then "all experts"; its value is the share or `ALL`."""
    return _widget(BUDGET, "budget.js", ALL)


def _widget(html: str, script: str, value: str) -> gr.HTML:
    # No `${value}` in the template: a new value then leaves the DOM, and so the drawing, alone.
    code = (FOLDER / script).read_text(encoding="utf-8")
    return gr.HTML(value, html_template=html, js_on_load=code, apply_default_css=False)
