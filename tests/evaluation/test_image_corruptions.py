"""Image corruptions: deterministic, stronger with severity as in the paper, in the image's mode."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hf_fusion.errors import FusionError
from hf_fusion.evaluation.image_corruptions import CORRUPTIONS, SIZE, corrupt


def picture(mode: str, size: int = SIZE) -> Image.Image:
    """Bright rings on a dark ground: edges and slopes in every direction, in three different channels."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    rings = [0.45 + 0.35 * np.sin(9 * np.hypot(x - shift, y)) for shift in (0, 0.2, -0.4)]
    return Image.fromarray((255 * np.stack(rings, -1)).astype(np.uint8)).convert(mode)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(float)


def distance(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(pixels(one) - pixels(other)).mean())


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruption_is_deterministic_and_strongest_at_severity_5(name, mode):
    clean = picture(mode)
    before = clean.tobytes()
    mild, severe = ([corrupt(clean, name, severity, seed) for seed in range(8)] for severity in (1, 5))
    assert [corrupt(clean, name, 5, seed).tobytes() for seed in range(8)] == [image.tobytes() for image in severe]
    assert {(image.mode, image.size) for image in mild + severe} == {(mode, clean.size)}
    distances = [np.mean([distance(clean, image) for image in images]) for images in (mild, severe)]
    assert 0 < distances[0] < distances[1]
    assert clean.tobytes() == before


@pytest.mark.parametrize("name", ["gaussian_noise", "impulse_noise", "motion_blur", "spatter"])
def test_another_seed_gives_another_picture(name):
    assert distance(corrupt(picture("RGB"), name, 3, 0), corrupt(picture("RGB"), name, 3, 1)) > 0


def test_parameters_match_cifar_10_c():
    """What can be computed in another way."""
    clean = picture("RGB")
    mean = pixels(clean).mean((0, 1))
    low = pixels(corrupt(clean, "contrast", 5, 0))
    np.testing.assert_allclose(low, mean + 0.15 * (pixels(clean) - mean), atol=1)
    grey = Image.new("L", (400, 400), 128)
    noise = pixels(corrupt(grey, "gaussian_noise", 4, 0)) / 255
    assert noise.std() == pytest.approx(0.09, rel=0.02)
    impulses = pixels(corrupt(grey, "impulse_noise", 5, 0))
    assert (impulses == 0).mean() == pytest.approx(0.035, rel=0.05)
    assert (impulses == 255).mean() == pytest.approx(0.035, rel=0.05)
    speckled = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE), dtype=np.uint8))
    assert len(np.unique(pixels(corrupt(speckled, "pixelate", 5, 0)), axis=0)) == int(0.65 * SIZE)


def test_motion_smears_a_point_to_one_side_and_keeps_its_light():
    point = Image.new("L", (SIZE, SIZE))
    point.putpixel((16, 16), 255)
    smeared = pixels(corrupt(point, "motion_blur", 5, seed=0))
    assert smeared.sum() == pytest.approx(255, abs=SIZE)  # cut to whole levels
    assert np.nonzero(smeared)[1].max() == 16  # nothing to the right of it
    assert len(np.nonzero(smeared)[0]) >= 4


def test_water_brightens_and_mud_covers():
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    water, mud = (pixels(corrupt(grey, "spatter", severity, 0)) for severity in (2, 5))
    assert water.min() == 128
    assert water.max() > 150
    assert mud.min(axis=(0, 1)) == pytest.approx([63, 42, 20], abs=6)


def test_other_modes_and_small_pictures():
    assert corrupt(picture("RGB").convert("P"), "contrast", 1, 0).mode == "RGB"
    small = corrupt(picture("L", size=16), "pixelate", 1, 0)
    assert (small.mode, small.size) == ("L", (SIZE, SIZE))
    assert corrupt(picture("L", size=28), "jpeg_compression", 5, 0).size == (28, 28)


@pytest.mark.parametrize(
    ("name", "severity", "said"),
    [("fog", 1, "no corruption 'fog'"), ("contrast", 6, "severity 6"), ("spatter", 0, "0")],
)
def test_unknown_corruptions_are_refused(name, severity, said):
    with pytest.raises(FusionError, match=said):
        corrupt(picture("L"), name, severity, 0)
