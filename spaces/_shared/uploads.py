"""Reads visitors' pictures, and embeds pictures in pages."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image
from shared.errors import InputError
from shared.pictures import PictureError, open_picture


def read_picture(source: Any) -> Image.Image:
    """Opens the picture in an uploaded file, or in a ``data:image/…;base64,…`` URL.

    Raises:
        InputError: the picture cannot be read; the message names the file, see `pictures.open_picture`.
    """
    try:
        return open_picture(source)
    except PictureError as error:
        raise InputError(f"{error}.") from error


def to_data_url(picture: Image.Image) -> str:
    """A PNG as a data URL."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
