"""Hostile image files: which must be refused, and which must be read with care."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

RED = (200, 30, 60)


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, *chunks: tuple[bytes, bytes], rows: int | None = None) -> bytes:
    """A black PNG of one bit a pixel, with chunks before its pixels and as many rows as are wanted."""
    pixels = zlib.compress(bytes((width + 7) // 8 + 1) * (height if rows is None else rows), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    written = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def patched(content: bytes, at: int, by: bytes) -> bytes:
    return content[:at] + by + content[at + len(by) :]


def text_bomb(size: int) -> tuple[bytes, bytes]:
    return b"zTXt", b"Comment\0\0" + zlib.compress(bytes(size))


def refused() -> dict[str, tuple[bytes, str]]:
    """Name of a file → its content, and what is said of it."""
    small = Image.new("RGB", (64, 48), RED)
    jpeg, clear = saved(small, "JPEG"), Image.new("RGBA", (64, 48), (*RED, 4))
    webp = saved(clear, "WEBP", save_all=True, append_images=[Image.new("RGBA", (64, 48))])
    too_large = "25 megapixels are the most; make it smaller"
    broken = r"it is truncated or broken \(.+\); open it in an image editor and save it again"
    unknown = "it is not a picture, or of a format that is not known; save it as PNG, JPEG or WebP"
    depth = r"its levels have another form than 8 or 16 bits \(Pillow calls it .\); save it with 8 bits a channel"
    return {
        "bits.png": (png(12_000, 12_000), f"it has 12,000 × 12,000 pixels, and {too_large}"),
        "just-above.png": (png(5_001, 5_000), f"it has 5,001 × 5,000 pixels, and {too_large}"),
        "header.png": (png(60_000, 60_000, rows=1), too_large),
        "header.jpg": (patched(jpeg, jpeg.index(b"\xff\xc0") + 5, struct.pack(">HH", 65_000, 65_000)), too_large),
        "header.bmp": (patched(saved(small, "BMP"), 18, struct.pack("<ii", 30_000, 30_000)), too_large),
        "canvas.webp": (patched(webp, webp.index(b"VP8X") + 12, (16_382).to_bytes(3, "little") * 2), too_large),
        "screen.gif": (
            b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b"," + bytes(4) + b"\xff" * 4 + b"\0\x08\0;",
            too_large,
        ),
        "comment.png": (png(8, 8, text_bomb(80_000_000)), broken),
        "comments.png": (png(8, 8, *[text_bomb(1_000_000)] * 70), broken),
        "profile.png": (png(8, 8, (b"iCCP", b"a\0\0" + zlib.compress(bytes(80_000_000)))), broken),
        "cut.png": (saved(small, "PNG")[:60], broken),
        "cut.jpg": (jpeg[:400], broken),
        "cut.webp": (webp[:60], broken),
        "exif.png": (
            png(8, 8, (b"eXIf", b"garbage!garbage")),
            r"its EXIF data is broken \(.+\); save it again",
        ),
        "no-width.png": (png(0, 8), unknown),
        "float.tiff": (saved(Image.new("F", (4, 4), 0.5), "TIFF"), depth),
        "int.tiff": (saved(Image.new("I", (4, 4), 5), "TIFF"), depth),
        "icon.ico": (saved(small, "ICO"), unknown),
        "program.eps": (saved(small, "EPS"), unknown),
        "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", unknown),
        "words.png": (b"hello", unknown),
        "empty.png": (b"", "it is empty; give the file of a picture"),
    }


def accepted() -> dict[str, tuple[bytes, str, Any]]:
    """Name of a file → its content, and mode and first pixel of what it shows."""
    red = Image.new("RGB", (4, 2), RED)
    red.putpixel((3, 1), (0, 0, 255))
    levels = np.array([[65_535, 257], [0, 128 * 257]], dtype=np.uint16)
    frames = [Image.new("RGB", (64, 48), (level % 256, 0, 0)) for level in range(400)]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: what is on the left belongs on top
    turned = saved(red.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    return {
        "turned.png": (turned, "RGB", RED),
        "inks.tiff": (saved(red.convert("CMYK"), "TIFF"), "RGB", RED),
        "palette.png": (saved(red.quantize(2), "PNG"), "RGB", RED),
        "holes.png": (saved(red.quantize(2), "PNG", transparency=0), "RGBA", None),
        "16-bits.png": (saved(Image.fromarray(levels), "PNG"), "L", 255),
        "bits.png": (saved(Image.new("1", (4, 2), 1), "PNG"), "L", 255),
        "film.gif": (saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), "RGB", (0, 0, 0)),
        "pages.tiff": (saved(frames[9], "TIFF", save_all=True, append_images=frames[:200]), "RGB", (9, 0, 0)),
        "largest.png": (png(5_000, 5_000), "L", 0),
    }
