"""The theme, the launch and the error messages of all pages."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from huggingface_hub import constants
from shared.errors import InputError, LoadError
from shared.page import about, message

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
THEME = gr.themes.Base(
    primary_hue="blue",
    neutral_hue="stone",
    # Gradio includes both fonts, so the pages do not load them from Google; its semi-bold files lack some letters
    font=[gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"],
    font_mono=[gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700)), "ui-monospace", "monospace"],
).set(
    body_background_fill="#f8f7f5",
    body_background_fill_dark="#100f0e",
    body_text_color="#1c1917",
    body_text_color_dark="#f3f1ef",
    body_text_color_subdued="#625d58",
    body_text_color_subdued_dark="#aaa39d",
    border_color_primary="#e2dfdb",
    border_color_primary_dark="#37332f",
    block_background_fill="#ffffff",
    block_background_fill_dark="#1b1917",
    block_radius="10px",
    input_background_fill="#ffffff",
    input_background_fill_dark="#1b1917",
    button_large_radius="8px",
    button_primary_background_fill="#0072b2",
    button_primary_background_fill_dark="#0072b2",
    button_primary_background_fill_hover="#00659e",
    button_primary_background_fill_hover_dark="#00659e",
    button_primary_text_color="#ffffff",
)


def launch(page: gr.Blocks, style: Path, **options: Any) -> None:
    """Serves a page.

    Args:
        page: the page.
        style: the Space's style sheet, loaded after the common one.
        options: of Gradio's `launch`.
    """
    page.launch(theme=THEME, css_paths=[FOLDER / "style.css", style], **options)


def show_load_error(error: LoadError, expected: str) -> None:
    """The page without a model; `expected` says what MODEL_ID should name, such as "a published router"."""
    logger.error("%s", error)
    hint = f"Set MODEL_ID to {expected} in the Space's settings, then restart the Space."
    gr.HTML(message("The model could not be loaded", str(error), hint), apply_default_css=False)


def show_about(paper: str, arxiv: str, model_url: str | None = None) -> None:
    """The foot of the page: the paper, the model, and, on the Hub, the Space's own documentation and a copy of it.

    Args:
        paper: its title.
        arxiv: its number.
        model_url: address of the model's page, if it is on the Hub.
    """
    links = [(f"Paper: {paper}", f"https://arxiv.org/abs/{arxiv}")]
    if model_url:
        links.append(("Model", model_url))
    if space := os.environ.get("SPACE_ID"):  # set by the Hub
        address = f"{constants.ENDPOINT}/spaces/{space}"
        links += [
            ("Documentation", f"{address}/blob/main/README.md"),
            ("Duplicate this Space", f"{address}?duplicate=true"),
        ]
    gr.HTML(about(links), apply_default_css=False)


@contextmanager
def reported() -> Iterator[None]:
    """Logs errors of a model and shows them on the page; invalid inputs are left to the caller."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        logger.exception("the model failed")
        raise gr.Error(f"The model failed: {type(error).__name__}: {error}") from error


@contextmanager
def refused() -> Iterator[None]:
    """Turns invalid inputs into an error of Gradio, for the API."""
    try:
        yield
    except InputError as error:
        raise gr.Error(str(error), title="Invalid input") from error
