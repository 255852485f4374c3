"""Fusion of Experts: give one input to a published model and see each expert's prediction and cost.

    MODEL_ID=owner/name MODEL_REVISION=<commit> TRUST_REMOTE_CODE=true python app.py

It needs nothing but gradio, transformers and torch, and loads any published FoE by its id.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import curve
import gradio as gr
import page
import widgets
from model import Served, load
from PIL import Image
from processing import Routing, read_picture, to_mnist
from shared.blocks import launch, refused, reported, show_about, show_load_error
from shared.errors import InputError, LoadError
from shared.page import message
from shared.picture_input import picture
from shared.settings import on_gpu, read_settings
from shared.uploads import to_data_url

PAPER = ("Fusing Models with Complementary Expertise", "2310.01542")
FOLDER = Path(__file__).parent
SETTINGS = read_settings("hf-fusion/foe-digits")
EXAMPLES = {path.stem.partition("-")[2]: path for path in sorted((FOLDER / "examples").glob("*.png"))}
LONGEST_TEXT = 10_000
FIRST = "seven"  # the example that the page opens with

EMPTY = {
    "digits": "Draw a digit on the pad, upload a picture of one, or pick an example.",
    "image": "Upload a picture to see what each expert predicts.",
    "text": "Write something, then query the experts.",
}


@cache
def served() -> Served:
    """The model, loaded once."""
    return load(SETTINGS)


@on_gpu
def ask(example: str | Image.Image, budget: float | None) -> Routing:
    """Runs the model; the only function that needs a GPU."""
    return served().ask(example, budget)


def read_input(value: str | Path | None) -> str | Image.Image:
    """The model's input for an input of the page or the API.

    Raises:
        InputError: the input is empty or cannot be read.
    """
    if served().kind == "text":
        text = str(value or "").strip()
        if not text:
            raise InputError("There is no text yet: write something first.")
        if len(text) > LONGEST_TEXT:
            raise InputError(f"That text is too long: at most {LONGEST_TEXT:,} characters are allowed.")
        return text
    if not value:
        raise InputError("There is no picture yet.")
    picture = read_picture(value)
    return to_mnist(picture) if served().digits else picture.convert("RGB")


def read_budget(budget: float | None) -> float | None:
    """Checks a budget.

    Raises:
        InputError: the budget is outside (0, 1], or this model does not support one.
    """
    if budget is None:
        return None
    if served().model.config.frugal is None:
        raise InputError("This model always queries every expert: it was fitted without frugal=True. Omit the budget.")
    if not 0 < budget <= 1:
        raise InputError(
            f"The budget is {budget:g}; it must be above 0 and at most 1, a share of the cost of all experts."
        )
    return float(budget)


def predict(value: Any, budget: float | None = None) -> Routing:
    """Runs the fused model on one text or picture.

    Args:
        value: a text or a picture, whichever the model takes.
        budget: maximum cost, as a share of the cost of all experts, above 0 and at most 1. Without one every expert is
            queried.

    Returns:
        answer, confidence, labels and probabilities of the fused prediction; cost as a share of querying every expert;
        and experts, each with name, cost_share, order (0: not queried), score (in selection), labels (those it knows)
        and probabilities (null: not queried).
    """
    with refused():
        return ask(read_input(value), read_budget(budget))


def show(value: Any, budget: float | str | None = widgets.ALL) -> tuple[str, str, str]:
    """The page's parts for one input: answer, experts, results."""
    results = served().results
    try:
        with reported():
            example = read_input(value)
            routing = ask(example, None if budget in (None, widgets.ALL) else read_budget(float(budget)))
    except InputError as error:
        text = EMPTY[input_kind()] if not value else str(error)
        title = "No input yet" if not value else "Invalid input"
        return message(title, text), "", curve.results_panel(results)
    seen = to_data_url(example) if isinstance(example, Image.Image) and served().digits else None
    urls = served().expert_urls
    return page.answer_panel(routing, seen), page.experts_panel(routing, urls), curve.results_panel(results, routing)


def input_kind() -> str:
    """ "digits", "image" or "text": which input the page shows."""
    return "digits" if served().digits else served().kind


def build() -> gr.Blocks:
    """The page of the model named by MODEL_ID, or a page that says why it cannot be served."""
    with gr.Blocks(title="Fusion of Experts", analytics_enabled=False) as blocks:
        try:
            served()
        except LoadError as error:
            show_load_error(error, "a published Fusion of Experts")
            show_about(*PAPER)
            return blocks
        config = served().model.config
        gr.HTML(
            page.header(
                served().id,
                served().url,
                served().sha,
                len(config.experts),
                len(served().labels),
                config.mode,
                config.frugal is not None,
            ),
            apply_default_css=False,
        )
        pictures = {name: to_data_url(read_picture(path)) for name, path in EXAMPLES.items()}
        first = pictures.get(FIRST, "") if input_kind() == "digits" else (served().examples or [""])[0]
        parts = show(first) if input_kind() != "image" else show(None)
        with gr.Row(elem_classes="ui-top"):
            with gr.Column(scale=4, min_width=300, elem_classes="foe-input"):
                component, triggers = _input(input_kind(), pictures, first)
            with gr.Column(scale=8, min_width=300, elem_classes="foe-output"):
                answer = gr.HTML(parts[0], apply_default_css=False, elem_classes="foe-fill")
                budget: gr.components.Component = gr.State(widgets.ALL)
                if config.frugal:
                    budget = slider = widgets.budget()
                    triggers.append(slider.input)
        experts = gr.HTML(parts[1], apply_default_css=False)
        results = gr.HTML(parts[2], apply_default_css=False)
        for trigger in triggers:
            trigger(
                show,
                [component, budget],
                [answer, experts, results],
                trigger_mode="always_last",
                show_progress="minimal",
                show_progress_on=answer,
                api_visibility="private",
            )
        show_about(*PAPER, served().url)
        _api(served().kind)
    return blocks


def _input(kind: str, pictures: dict[str, str], first: str) -> tuple[gr.components.Component, list[Any]]:
    """The component for a kind of input, and the events that run the model."""
    if kind == "digits":
        pad = widgets.pad(pictures, first)
        return pad, [pad.input]
    if kind == "image":
        image = picture(label="Picture", sources=["upload", "clipboard", "webcam"], height=320)
        return image, [image.change]
    text = gr.Textbox(first, label="Text", lines=7, max_length=LONGEST_TEXT, placeholder="Write something …")
    button = gr.Button("Query the experts", variant="primary")
    triggers = [button.click, text.submit]
    if served().examples:
        examples = gr.Dataset(
            label="Examples",
            components=[gr.Textbox(visible=False)],
            samples=[[example] for example in served().examples],
            type="values",
        )
        picked = examples.click(lambda row: row[0], examples, text, api_visibility="private", show_progress="hidden")
        triggers.append(picked.success)
    return text, triggers


def _api(kind: str) -> None:
    """The API's only endpoint; it takes a file in place of the pad, and a number in place of the slider."""
    with gr.Row(visible=False):
        value = picture(label="picture") if kind == "image" else gr.Textbox(label="text")
        budget = gr.Number(None, label="budget")
        gr.Button().click(predict, [value, budget], gr.JSON(label="routing"), api_name="predict")


demo = build()

if __name__ == "__main__":
    launch(demo, FOLDER / "style.css")
