"""Untrusted images: opened within limits, or refused with one sentence that names them."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value, concatenate_datasets
from hostile_pictures import RED, accepted, refused, saved
from PIL import Image as Pillow
from threads import wrong_calls
from tiny import image_processor, vit

from hf_fusion import Expert, FoEModel, FusionError, evaluate
from hf_fusion.bench.rows import ours
from hf_fusion.bench.suite import Task
from hf_fusion.data import load_rows
from hf_fusion.io.pictures import MOST_BYTES, PictureError, open_picture
from hf_fusion.training.batches import read_examples

ROOT = Path(__file__).parents[2]
REFUSED, ACCEPTED = refused(), accepted()
# what a file of 25 megapixels takes decoded and converted, and Python, NumPy and Pillow themselves
MOST_MEMORY = 500 * 1024  # KiB
MEASURE = """
import sys
from pathlib import Path
from hf_fusion.io.pictures import PictureError, open_picture
for path in sys.argv[1:]:
    try:
        open_picture(path)
    except PictureError:
        pass
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.parametrize("name", REFUSED)
def test_refused_images_are_reported_with_reason_and_remedy(name, tmp_path):
    content, said = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(content)
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    for source, who in ((path, name), (str(path), name), (content, "that picture"), (url, "that picture")):
        with pytest.raises(PictureError, match=f"^{who} cannot be read: .*{said}"):
            open_picture(source)


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_images_become_eight_bit(name, tmp_path):
    content, mode, first = ACCEPTED[name]
    path = tmp_path / name
    path.write_bytes(content)
    for picture in (open_picture(path), open_picture(content)):
        assert picture.mode == mode
        assert first is None or picture.getpixel((0, 0)) == first
        assert np.asarray(picture).dtype == np.uint8


def test_levels_of_16_bits_are_scaled_and_turned_pictures_are_upright():
    assert np.asarray(open_picture(ACCEPTED["16-bits.png"][0])).tolist() == [[255, 1], [0, 128]]
    turned = open_picture(ACCEPTED["turned.png"][0])
    assert turned.size == (4, 2) and turned.getpixel((3, 1)) == (0, 0, 255)


def test_opened_pillow_images_are_checked_too():
    assert open_picture(Pillow.new("CMYK", (4, 4))).mode == "RGB"
    for picture, said in (
        (Pillow.new("1", (12_000, 12_000)), "12,000 × 12,000 pixels"),
        (Pillow.new("L", (0, 4)), "it has 0 × 4 pixels; give a picture that shows something"),
    ):
        with pytest.raises(PictureError, match=f"^mine cannot be read: .*{said}"):
            open_picture(picture, "mine")


def test_pipes_and_oversized_files_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(MOST_BYTES + 1_000_000)
    for source, said in (
        (tmp_path / "pipe.png", "pipe.png cannot be read: it is not a file"),
        (tmp_path, "it is not a file"),
        (large, "it has 51 MB and 50 MB are the most; make it smaller, or save it as JPEG"),
        (tmp_path / "none.png", "none.png cannot be read: No such file or directory; check the path"),
        ("a\0b.png", r"a\?b.png cannot be read: it is not a path; check the path"),
        (tmp_path / "a\x1b[2J\u202eb.png", r"a\?\[2J\?b.png cannot be read"),
        ("data:text/html;base64,aGk=", "it is not a picture"),
        ("data:image/png;base64,?", "it is not base64"),
        (f"data:image/png;base64,{'A' * (MOST_BYTES * 3 // 2)}", "50 MB are the most"),
    ):
        with pytest.raises(PictureError, match=said):
            open_picture(source)


@pytest.mark.process
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process's memory is read from /proc")
def test_images_take_little_memory(tmp_path):
    turned = Pillow.Exif()
    turned[0x0112] = 6
    largest = {  # the formats whose decoders take most
        "alpha.png": saved(Pillow.new("RGBA", (5_000, 5_000)), "PNG", compress_level=1),
        "inks.jpg": saved(Pillow.new("CMYK", (5_000, 5_000)), "JPEG"),
        "canvas.webp": saved(Pillow.new("RGBA", (5_000, 5_000), (*RED, 9)), "WEBP", method=0, exif=turned),
    }
    files = {**{name: row[0] for rows in (REFUSED, ACCEPTED) for name, row in rows.items()}, **largest}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in files)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert int(done.stdout) <= MOST_MEMORY


def test_threads_open_pictures():
    calls = {name: lambda content=row[0]: np.asarray(open_picture(content)).sum() for name, row in ACCEPTED.items()}
    before = threading.active_count()
    assert wrong_calls(calls, 40) == []
    assert threading.active_count() <= before + 8  # those of the decoders' pool; none for each picture


# ---------------------------------------------------------------- rows of data sets


def rows_of(*contents: bytes, path: str | None = None) -> Dataset:
    pictures = [{"bytes": content, "path": path} for content in contents]
    features = Features({"image": Image(), "label": Value("int64")})
    return Dataset.from_dict({"image": pictures, "label": [0, 1] * (len(contents) // 2)}, features=features)


@pytest.fixture(scope="module")
def hostile_rows(tmp_path_factory) -> Path:
    """Rows 0, 1 and 3 are pictures; row 2 is none."""
    good = saved(Pillow.new("RGB", (16, 16), RED), "PNG")
    path = tmp_path_factory.mktemp("rows") / "test.parquet"
    rows_of(good, ACCEPTED["inks.tiff"][0], REFUSED["bits.png"][0], good).to_parquet(path)
    return path


def test_rows_of_a_file_are_opened_within_limits(hostile_rows):
    rows = load_rows(hostile_rows)
    assert [rows[number]["image"].mode for number in (0, 1, 3)] == ["RGB"] * 3
    for changed in (
        rows,
        rows.shuffle(seed=1),
        rows.select([2]),
        rows.rename_column("image", "picture").rename_column("picture", "image"),
        rows.add_column("more", [1] * 4),
        rows.map(lambda row: {"more": 1}, keep_in_memory=True),
        rows.with_format("numpy"),
        concatenate_datasets([rows, rows]),
    ):
        with pytest.raises(
            FusionError, match="^the picture in row 2 of the data set .counted from 0. cannot be read: it"
        ):
            list(changed["image"])


def test_named_image_is_reported_by_name():
    content, said = REFUSED["cut.jpg"]
    rows = ours(rows_of(content, content, path="shots/seven.jpg"), Task("digits", "data:digits"))
    with pytest.raises(FusionError, match="seven.jpg in row 0 of the data set.*truncated"):
        rows[0]


def test_all_readers_of_rows_check_image_limits(hostile_rows):
    """Also rows that did not come through `load_rows`."""
    rows = Dataset.from_parquet(str(hostile_rows))
    expert = Expert("me/vit", vit(["a", "b"]), processor=image_processor(16), labels=["a", "b"])
    with pytest.raises(FusionError, match="row 2 of the data set.*12,000 × 12,000"):
        evaluate(FoEModel.from_experts([expert]), rows)
    examples = read_examples(expert, rows, 16)
    with pytest.raises(FusionError, match="row 2 of the data set.*12,000 × 12,000"):
        examples.collate([examples.rows[2]])


def test_pictures_are_opened_in_one_place():
    """Pillow opens nothing else but what this package wrote itself."""
    own = {"image_corruptions.py", "fresh_process.py", "pictures.py"}
    found = [path for folder in ("hf_fusion", "spaces") for path in (ROOT / folder).rglob("*.py")]
    opening = {path.name for path in found if "Image.open(" in path.read_text(encoding="utf-8")}
    assert opening == own
