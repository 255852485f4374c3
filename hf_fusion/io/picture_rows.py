"""Decodes images in rows of a data set by `io.pictures`; errors name the file and the row."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Image
from datasets.utils.file_utils import is_local_path, xopen

from hf_fusion.errors import FusionError, one_line
from hf_fusion.io.pictures import MOST_BYTES, PictureError, open_picture

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset
    from PIL.Image import Image as Picture

_NO_PICTURES = ("label",)  # label maps may be stored as images, whose pixels are class indices


class Pictures(Image):
    """The feature `datasets.Image`, with this package's limits and errors.

    Attributes:
        column: the stored images of all rows, to find the index of an invalid one.
    """

    column: pyarrow.ChunkedArray | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Image) and (self.mode, self.decode) == (other.mode, other.decode)

    def __deepcopy__(self, memo: dict[int, Any]) -> Pictures:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "column"}

    def decode_example(self, value: Any, token_per_repo_id: dict[str, Any] | None = None) -> Picture:
        """Decodes an image, see `pictures.open_picture`.

        Raises:
            FusionError: it cannot be opened; names its file or row.
        """
        path, content = (value["path"], value["bytes"]) if isinstance(value, dict) else (None, value)
        try:
            if content is None and path and not is_local_path(path):
                with xopen(path, "rb") as file:
                    content = file.read(MOST_BYTES + 1)
            picture = open_picture((path or b"") if content is None else content)
        except PictureError as error:
            name = one_line(Path(path).name) if path else "the picture"
            raise FusionError(f"{name} in {self._row(value)} cannot be read: {error.reason}", error.remedy) from None
        return picture if self.mode is None or picture.mode == self.mode else picture.convert(self.mode)

    def _row(self, value: object) -> str:
        """A description of an image's row, with its index if known."""
        if self.column is None:
            return "a row of the data set"
        stored = (row.as_py() for chunk in self.column.chunks for row in chunk)
        number = next((number for number, row in enumerate(stored) if row == value), None)
        return "a row of the data set" if number is None else f"row {number} of the data set (counted from 0)"


def with_pictures(rows: Dataset) -> Dataset:
    """Rows whose image columns are decoded by this package."""
    for name, feature in rows.features.items():
        if type(feature) is Image and feature.decode and name not in _NO_PICTURES:
            pictures = Pictures(mode=feature.mode)
            rows = rows.cast_column(name, pictures)
            rows.features[name].column = rows.data.column(name)
    return rows


__all__ = ["Pictures", "with_pictures"]
