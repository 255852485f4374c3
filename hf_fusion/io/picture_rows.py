"""Pictures in rows of a data set, opened by `io.pictures`; one that cannot be is named by its file and row."""

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

_NO_PICTURES = ("label",)  # a map of classes may be stored as a picture; its levels are numbers


class Pictures(Image):
    """The feature `datasets.Image`, with the package's limits and errors.

    Attributes:
        column: all pictures of the rows, as they are stored, to find the number of one that cannot be opened.
    """

    column: pyarrow.ChunkedArray | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Image) and (self.mode, self.decode) == (other.mode, other.decode)

    def __deepcopy__(self, memo: dict[int, Any]) -> Pictures:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "column"}

    def decode_example(self, value: Any, token_per_repo_id: dict[str, Any] | None = None) -> Picture:
        """A picture, see `pictures.open_picture`.

        Raises:
            FusionError: naming its file or row, for one that cannot be opened.
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
        """The row of a picture, by its number where that is known."""
        if self.column is None:
            return "a row of the data set"
        stored = (row.as_py() for chunk in self.column.chunks for row in chunk)
        number = next((number for number, row in enumerate(stored) if row == value), None)
        return "a row of the data set" if number is None else f"row {number} of the data set, counted from 0,"


def with_pictures(rows: Dataset) -> Dataset:
    """Rows whose pictures are opened by this package; others as they are."""
    for name, feature in rows.features.items():
        if type(feature) is Image and feature.decode and name not in _NO_PICTURES:
            pictures = Pictures(mode=feature.mode)
            rows = rows.cast_column(name, pictures)
            rows.features[name].column = rows.data.column(name)
    return rows


__all__ = ["Pictures", "with_pictures"]
