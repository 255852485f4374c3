"""Corrupted images at five severities: for measuring a model's accuracy on images that are not clean.

Corruptions and parameters of CIFAR-10-C (Hendrycks & Dietterich, 2019, arXiv 1903.12261; its make_cifar_c.py). They fit
pictures of about 32 px; the parameters that its authors chose for 224 px would leave nothing of such small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from hf_fusion.errors import FusionError, suggestion

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Pixels = NDArray[np.float64]

SIZE = 32
"""Side in px of the pictures that the parameters were made for."""

_WATER, _MUD = (175, 238, 238), (63, 42, 20)  # pale turquoise and brown, RGB
_EMBOSS = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
_BOX = np.full((3, 3), 1 / 9)


def corrupt(image: Image.Image, name: str, severity: int, seed: int) -> Image.Image:
    """A corrupted copy of a picture; the same arguments give the same picture.

    Args:
        image: grey (L) or RGB; other modes become RGB. An image with a side below 28 px is first enlarged to 32 x 32:
            corruptions that leave 32 px readable would destroy a smaller one.
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: of the noise, the direction of motion and the drops; use a different one for every image.

    Returns:
        A picture of the same mode and, unless it was enlarged, the same size.

    Raises:
        FusionError: no such corruption or severity.
    """
    if name not in CORRUPTIONS:
        raise FusionError(f"there is no corruption {name!r}", hint=suggestion(name, CORRUPTIONS))
    if severity not in range(1, 6):
        raise FusionError(f"{name} has no severity {severity!r}", hint="use 1, 2, 3, 4 or 5")
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    if min(image.size) < 28:
        image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    function, parameters = CORRUPTIONS[name]
    return _image(function(_pixels(image), parameters[severity - 1], np.random.default_rng(seed)))


def _pixels(image: Image.Image) -> Pixels:
    """(H, W, C) in 0..1, C = 1 for grey."""
    return np.asarray(image, dtype=np.float64).reshape(image.height, image.width, -1) / 255


def _image(pixels: Pixels) -> Image.Image:
    values = (pixels.clip(0, 1) * 255).astype(np.uint8)  # cut, not rounded, as in CIFAR-10-C
    return Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)


def _contrast(x: Pixels, share: float, rng: np.random.Generator) -> Pixels:
    mean: Pixels = x.mean((0, 1), keepdims=True)
    return (x - mean) * share + mean


def _gaussian_noise(x: Pixels, scale: float, rng: np.random.Generator) -> Pixels:
    return x + rng.normal(scale=scale, size=x.shape)


def _impulse_noise(x: Pixels, share: float, rng: np.random.Generator) -> Pixels:
    """Salt and pepper: a share of the values become 0 or 1."""
    return np.where(rng.random(x.shape) < share, rng.integers(0, 2, x.shape), x)


def _jpeg(x: Pixels, quality: int, rng: np.random.Generator) -> Pixels:
    buffer = BytesIO()
    _image(x).save(buffer, "JPEG", quality=quality)
    return _pixels(Image.open(buffer))


def _pixelate(x: Pixels, share: float, rng: np.random.Generator) -> Pixels:
    image = _image(x)
    small = image.resize((int(image.width * share), int(image.height * share)), Image.Resampling.BOX)
    return _pixels(small.resize(image.size, Image.Resampling.BOX))


def _motion_blur(x: Pixels, how: tuple[int, float], rng: np.random.Generator) -> Pixels:
    """One half of a Gaussian along a line within 45° of the horizontal, as ImageMagick's."""
    radius, sigma = how
    angle = np.deg2rad(rng.uniform(-45, 45))
    reach = 2 * radius
    steps = np.arange(reach + 1)
    rows, columns = (np.ceil(steps * part - 0.5).astype(int) + reach for part in (np.sin(angle), np.cos(angle)))
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    np.add.at(kernel, (rows, columns), np.exp(-(steps**2) / (2 * sigma**2)))
    return _correlate(x, kernel / kernel.sum())


def _spatter(x: Pixels, how: tuple[float, float, float, float, float, bool], rng: np.random.Generator) -> Pixels:
    """Drops where smoothed noise is high: water that shines at its rims, or mud that covers."""
    mean, scale, sigma, threshold, strength, mud = how
    liquid = _correlate(rng.normal(mean, scale, (*x.shape[:2], 1)), _gaussian(sigma))
    drops = liquid >= threshold
    colour: Pixels = np.array(_MUD if mud else _WATER) / 255
    if x.shape[-1] == 1:
        colour = colour @ [[0.299], [0.587], [0.114]]  # luma (ITU-R 601)
    if mud:
        cover: Pixels = _correlate(drops.astype(float), _gaussian(strength))
        cover[cover < 0.8] = 0
        return x * (1 - cover) + cover * colour
    rims = drops & (_correlate(drops.astype(float), _BOX) < 1 - 1e-9)
    depth = _equalized(_correlate(_distance(rims, limit=20), _BOX))
    shine = liquid * drops * _correlate(_correlate(depth, _EMBOSS).clip(0, 255), _BOX)
    return x + strength * shine / max(float(shine.max()), 1e-9) * colour


def _gaussian(sigma: float) -> Pixels:
    steps = np.arange(-int(4 * sigma + 0.5), int(4 * sigma + 0.5) + 1)
    line: Pixels = np.exp(-(steps**2) / (2 * sigma**2))
    return np.outer(line, line) / float(line.sum()) ** 2


def _correlate(x: Pixels, kernel: Pixels) -> Pixels:
    """Each pixel as the weighted sum of its neighbours; the border is repeated outwards."""
    height, width = x.shape[:2]
    half = len(kernel) // 2
    padded = np.pad(x, ((half, half), (half, half), (0, 0)), mode="edge")
    taps = ((row, column) for row, column in np.argwhere(kernel))
    return sum((kernel[r, c] * padded[r : r + height, c : c + width] for r, c in taps), np.zeros_like(x))


def _distance(marked: NDArray[np.bool_], limit: int) -> Pixels:
    """Euclidean distance in px to the nearest marked pixel, at most `limit`; (H, W, 1) in and out."""
    squared = np.where(marked, 0.0, float(limit**2))
    for axis in (0, 1):
        pad = [(limit, limit) if axis == moved else (0, 0) for moved in range(3)]
        padded = np.pad(squared, pad, constant_values=limit**2)
        shifts = [(step - limit) ** 2 + np.roll(padded, -step, axis) for step in range(2 * limit + 1)]
        squared = np.min(shifts, axis=0)[: marked.shape[0], : marked.shape[1]]
    distance: Pixels = np.sqrt(squared.clip(max=limit**2))
    return distance


def _equalized(x: Pixels) -> Pixels:
    """Equalises the histogram: levels 0..255, with the same number of pixels in each range."""
    levels, indices, counts = np.unique(x.astype(int), return_inverse=True, return_counts=True)
    above = counts.cumsum() - counts[0]  # of the levels over the lowest
    equalized: Pixels = 255 * above / max(above[-1], 1)
    return equalized[indices].reshape(x.shape)


CORRUPTIONS: dict[str, tuple[Callable[[Pixels, Any, np.random.Generator], Pixels], Sequence[Any]]] = {
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "gaussian_noise": (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "impulse_noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "jpeg_compression": (_jpeg, (80, 65, 58, 50, 40)),
    "motion_blur": (_motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "spatter": (
        _spatter,
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, False),
            (0.65, 0.1, 0.8, 0.7, 0.5, False),
            (0.65, 0.3, 1.0, 0.69, 0.5, False),
            (0.65, 0.1, 0.7, 0.69, 0.6, True),
            (0.65, 0.1, 0.5, 0.68, 0.6, True),
        ),
    ),
}
"""Name -> what it does, and its parameter at each severity."""
