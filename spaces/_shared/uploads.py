"""Pictures that visitors give, and pictures in pages."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image
from shared.errors import InputError
from shared.pictures import PictureError, open_picture


def read_picture(given: Any) -> Image.Image:
    """The picture in an uploaded file, or in a ``data:image/…;base64,…`` URL.

    Raises:
        InputError: naming the file that cannot be read, see `pictures.open_picture`.
    """
    try:
        return open_picture(given)
    except PictureError as error:
        raise InputError(f"{error}.") from error


def to_data_url(picture: Image.Image) -> str:
    """A PNG as a data URL."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
