"""An input that Gradio does not have: a picture that is opened by `pictures.open_picture` alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData


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
