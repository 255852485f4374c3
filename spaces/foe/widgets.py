"""Inputs that Gradio does not have: a pad to draw a digit on, and a budget with "all experts"."""

from __future__ import annotations

from html import escape
from pathlib import Path

import gradio as gr

ALL = "all"  # the budget's value for "all experts"; Gradio would turn null into an empty text
FOLDER = Path(__file__).parent

PAD = """<div class="foe-pad"><canvas width="336" height="336" aria-label="Draw a digit here"></canvas>
<div class="tools"><span>draw with a mouse or a finger</span>
<label><input type="file" accept="image/*">Upload</label><button type="button" class="clear">Clear</button></div>
<p class="ui-kicker">Examples</p><div class="examples">{examples}</div></div>"""

EXAMPLE = '<button type="button" aria-label="Example: {name}"><img src="{url}" alt="{name}"></button>'

BUDGET = """<div class="ui-card foe-budget"><label><span>Budget</span><output></output>
<input type="range" min="1" max="11" step="1" value="11"></label>
<div class="ends" aria-hidden="true"><span>10 % of the cost</span><span>all experts at once</span></div></div>"""


def pad(examples: dict[str, str], value: str = "") -> gr.HTML:
    """A square to draw on, with upload and examples; its value is a data URL, empty for a blank pad.

    Args:
        examples: name -> data URL.
        value: initial picture.
    """
    buttons = "".join(EXAMPLE.format(name=escape(name), url=escape(url)) for name, url in examples.items())
    return _widget(PAD.format(examples=buttons), "pad.js", value)


def budget() -> gr.HTML:
    """A slider from 10 % to 100 % of the experts' cost, then "all experts"; its value is the share or `ALL`."""
    return _widget(BUDGET, "budget.js", ALL)


def _widget(html: str, script: str, value: str) -> gr.HTML:
    # No `${value}` in the template, so that a new value does not replace the DOM and with it the drawing.
    code = (FOLDER / script).read_text(encoding="utf-8")
    return gr.HTML(value, html_template=html, js_on_load=code, apply_default_css=False)
