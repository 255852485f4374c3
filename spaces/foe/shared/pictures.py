"""Opens untrusted images: files, uploads, data URLs and rows of data sets.

The header is checked before the image is decoded, and the result has one of four modes. This file only needs Pillow and
NumPy: the Spaces for images contain copies of it.
"""

from __future__ import annotations

import base64
import binascii
import io
import stat
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MOST_PIXELS = 25_000_000
MOST_BYTES = 50_000_000
# formats whose header determines the decoded size; others (EPS, ICO, PDF …) do not, or need another program
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_UNNAMED = "that picture"
_READABLE = "save it as PNG, JPEG or WebP"
_AGAIN = "open it in an image editor and save it again"
# Pillow's mode → equivalent mode; modes with 32 bits per level have no common range and are not supported
_MODES = {
    **{mode: mode for mode in ("L", "LA", "RGB", "RGBA")},
    **{"1": "L", "La": "LA", "P": "RGB", "PA": "RGBA", "RGBa": "RGBA"},
    **dict.fromkeys(("RGBX", "CMYK", "YCbCr", "LAB", "HSV"), "RGB"),
}


class PictureError(ValueError):
    """An image cannot be read.

    Args:
        name: of the image.
        reason: why.
        remedy: what to do.
    """

    def __init__(self, name: str, reason: str, remedy: str) -> None:
        self.reason, self.remedy = reason, remedy
        super().__init__(f"{name} cannot be read: {reason}; {remedy}")


def open_picture(source: str | Path | bytes | Image.Image, name: str = "") -> Image.Image:
    """Decodes an image, rotated by its EXIF orientation; of an animation, the first frame.

    Args:
        source: a file, a ``data:image/…;base64,…`` URL, a file's content, or an image that Pillow opened.
        name: in errors; default: the file's name.

    Returns:
        Mode L, LA, RGB or RGBA with 8 bits per level: palettes and other colour spaces are converted, 16-bit levels
        divided by 257.

    Raises:
        PictureError: above 25 megapixels or 50 MB, empty, truncated or broken, in a format that is not among `FORMATS`,
            or with levels of 32 bits.
    """
    if isinstance(source, Image.Image):
        return _decoded(source, name or _UNNAMED)
    if isinstance(source, str) and source.startswith("data:"):
        name = name or _UNNAMED
        return _opened(io.BytesIO(_from_data_url(source, name)), name)
    if isinstance(source, bytes):
        name = name or _UNNAMED
        _check_size(len(source), name)
        return _opened(io.BytesIO(source), name)
    path, name = Path(source), _printable(name or Path(source).name or source)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise PictureError(name, "it is not a file", "give the file of a picture")
        _check_size(status.st_size, name)
        with path.open("rb") as file:
            return _opened(file, name)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        if isinstance(error, PictureError):
            raise
        reason = getattr(error, "strerror", None) or "it is not a path"
        raise PictureError(name, reason, "check the path") from error


def _from_data_url(url: str, name: str) -> bytes:
    head, _, body = url[:100].partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64")):
        raise PictureError(name, "it is not a picture", "give a URL that begins with data:image/png;base64,")
    _check_size((len(url) - len(head)) * 3 // 4, name)
    try:
        return base64.b64decode(url[len(head) + 1 :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise PictureError(name, "it is not base64", "encode the file's bytes with base64") from error


def _check_size(size: int, name: str) -> None:
    if not size:
        raise PictureError(name, "it is empty", "give the file of a picture")
    if size > MOST_BYTES:
        reason = f"it has {size // 1_000_000:,} MB and {MOST_BYTES // 1_000_000} MB are the most"
        raise PictureError(name, reason, "make it smaller, or save it as JPEG")


def _opened(file: BinaryIO, name: str) -> Image.Image:
    try:
        picture = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise PictureError(name, "it is not a picture, or of a format that is not known", _READABLE) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name) from error
    except Exception as error:  # plugins raise many types for broken files
        raise _broken(name, error) from error
    return _decoded(picture, name)


def _decoded(picture: Image.Image, name: str) -> Image.Image:
    width, height = picture.size
    if not width or not height:
        raise PictureError(name, f"it has {width} × {height} pixels", "give a picture that shows something")
    if width * height > MOST_PIXELS:
        raise _too_large(name, f"{width:,} × {height:,} pixels")
    mode = picture.mode
    if mode not in _MODES and not mode.startswith("I;16"):
        reason = f"its levels have another form than 8 or 16 bits (Pillow calls it {mode})"
        raise PictureError(name, reason, "save it with 8 bits a channel")
    try:
        picture.load()
    except Exception as error:
        raise _broken(name, error) from error
    if picture.size != (width, height):
        raise PictureError(name, "its header tells another size than its content", _AGAIN)
    try:
        picture = _upright(picture)
    except Exception as error:
        remedy = "save it again without EXIF data"
        raise PictureError(name, f"its EXIF data is broken ({_said(error)})", remedy) from error
    if mode not in _MODES:
        return Image.fromarray((np.asarray(picture) // 257).astype(np.uint8))
    has_holes = mode == "P" and "transparency" in picture.info
    return _converted(picture, "RGBA" if has_holes else _MODES[mode])


def _upright(picture: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(picture) if picture.getexif().get(0x0112, 1) != 1 else picture


def _converted(picture: Image.Image, mode: str) -> Image.Image:
    return picture if picture.mode == mode else picture.convert(mode)


def _too_large(name: str, size: str = "too many pixels") -> PictureError:
    reason = f"it has {size}, and {MOST_PIXELS // 1_000_000} megapixels are the most"
    return PictureError(name, reason, "make it smaller")


def _broken(name: str, error: Exception) -> PictureError:
    return PictureError(name, f"it is truncated or broken ({_said(error)})", _AGAIN)


def _said(error: Exception) -> str:
    return _printable(str(error) or type(error).__name__)


def _printable(text: object) -> str:
    """Untrusted text on one line, shortened and without control characters."""
    return "".join(character if character.isprintable() else "?" for character in str(text))[:200]


__all__ = ["FORMATS", "MOST_BYTES", "MOST_PIXELS", "PictureError", "open_picture"]
