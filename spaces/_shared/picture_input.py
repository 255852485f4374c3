"""An input for pictures that only `pictures.open_picture` opens, not Gradio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData


def picture(**options: Any) -> gr.Image:
    """Gradio's input for images, which passes uploads on unopened, since `pictures.open_picture` opens them safely."""
    component = gr.Image(type="filepath", image_mode=None, **options)
    component.preprocess = _unopened  # type: ignore[method-assign]  # a subclass would make Gradio write a stub beside it
    return component


def _unopened(payload: ImageData | None) -> str | Path | None:
    """The file or data URL of an upload."""
    if payload is None or (payload.url or "").startswith("data:"):
        return payload and payload.url
    return Path(payload.path) if payload.path else ""
