"""The colours of the Spaces' style sheets, and how distinguishable they are, also with colour blindness."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

SPACES = Path(__file__).parents[2] / "spaces"
SCHEMES = ("light", "dark")
INK_AND_CARD = {"light": ("#1c1917", "#ffffff"), "dark": ("#f3f1ef", "#1b1917")}  # of the theme
# What eyes without one kind of cone see, in linear RGB (Machado, Oliveira, Fernandes, 2009)
EYES = {
    "all cones": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "no green": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "no blue": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def linear(colour: np.ndarray) -> np.ndarray:
    return np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)


def lab(light: np.ndarray) -> np.ndarray:
    """CIE Lab of linear RGB."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(to_xyz @ light.clip(0.001, 1) / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(text: np.ndarray, ground: np.ndarray) -> float:
    """The ratio of WCAG 2, of which AA wants 4.5 at least."""
    lights = [float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (text, ground)]
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def variables(space: str, scheme: str) -> dict[str, str]:
    """The variables of a Space's style sheet, or of the common one ("_shared")."""
    blocks = (SPACES / space / "style.css").read_text(encoding="utf-8").split("}")
    return dict(re.findall(r"--([\w-]+): ([^;]+);", blocks[SCHEMES.index(scheme)]))
