"""Custom code of models: whether it is needed, and whether it may run.

Python files of a folder or repo run only if transformers has no class for what is loaded, the caller passed
``trust_remote_code=True``, and the code is pinned: in a local folder, or at a commit that the caller named. Code of
another repo (``owner/name--module.Class``, or a kernel ``owner/name``) never runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hf_fusion.errors import FusionError, shown
from hf_fusion.families import FAMILIES
from hf_fusion.hub.formats import IMAGE_FILES, PROCESSOR_FILES
from hf_fusion.hub.model_files import Source, folder_source
from hf_fusion.io.json_files import read_json

MANIFESTS_OF = {
    "AutoTokenizer": ("tokenizer_config.json",),
    "AutoImageProcessor": ("processor_config.json", "preprocessor_config.json"),
}
"""Auto class of a processor -> the files that name its class, and its code."""


class Code(NamedTuple):
    """A reference to code in a configuration.

    Attributes:
        file: path from the model's root.
        key: in that file, such as ``auto_map.AutoTokenizer``.
        reference: ``module.Class``, or ``owner/name--module.Class`` for another repo.
    """

    file: str
    key: str
    reference: str

    def __str__(self) -> str:
        return f"{self.file}: {shown(self.key).strip(_QUOTES)} is {shown(self.reference)}"

    @property
    def is_foreign(self) -> bool:
        """Whether it is code of another repo."""
        return "--" in self.reference


_QUOTES = "'\""


def model_code(config: Mapping[str, Any]) -> list[Code]:
    """The code that is required to build a model; empty if transformers knows its ``model_type``."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from hf_fusion.models.fused_custom_code import code_in

    model_type = config.get("model_type")
    if not config.get("auto_map") or (isinstance(model_type, str) and model_type in CONFIG_MAPPING):
        return []
    found = [Code(*named) for named in code_in(dict(config), "config.json")]
    return found or [
        Code("config.json", "auto_map", str(config["auto_map"]))
    ]  # auto_map names nothing that can be loaded


def processor_class(source: Source) -> str | None:
    """The Auto class of a model's tokenizer or image processor; None if it has neither."""
    kinds = ((PROCESSOR_FILES, "AutoTokenizer"), (IMAGE_FILES, "AutoImageProcessor"))
    return next((auto for files, auto in kinds if any(file in source.sizes for file in files)), None)


def processor_code(source: Source, auto: str) -> list[Code]:
    """The code that is required to load a model's tokenizer or image processor; see `model_code`.

    Args:
        source: the model's files.
        auto: "AutoTokenizer" or "AutoImageProcessor".
    """
    from hf_fusion.models.fused_custom_code import needed_code

    return [Code(*named) for named in needed_code(auto, source.json)]


def refuse_code(source: Source, needed: Sequence[Code], *, agreed: bool, pinned: bool | None = None) -> None:
    """Raises unless required code may run: with consent, from the model's repo, at a commit that the caller named.

    Args:
        source: the model's files.
        needed: from `model_code` or `processor_code`; if empty, no consent is required.
        agreed: whether the caller passed ``trust_remote_code=True``.
        pinned: whether the caller named the commit or the folder; default: ``source.pinned``.

    Raises:
        FusionError: naming the code, and what the caller has to pass.
    """
    if not needed:
        return
    from hf_fusion.models.fused_custom_code import MANIFESTS, code_in

    manifests = [Code(*named) for file in MANIFESTS for named in code_in(source.json(file), file)]
    if foreign := next((code for code in [*needed, *manifests] if code.is_foreign), None):
        raise FusionError(
            f"{source.name} takes its code from another repo ({foreign}), which no commit pins",
            hint=f"leave {source.name} out",
        )
    first, named = needed[0], "" if source.is_local else " and owner/name@sha"
    if not agreed:
        file = shown(f"{first.reference.partition('.')[0]}.py").strip(_QUOTES)
        raise FusionError(
            f"{source.name} needs its own code to run ({first})",
            hint=f"read {file}, then pass --trust-remote-code (trust_remote_code=True in Python){named}",
        )
    if not (source.pinned if pinned is None else pinned):
        what = "its folder was not named in the call" if source.is_local else "no commit is named"
        raise FusionError(
            f"{source.name} needs its own code to run, and {what} ({first})",
            hint=f"name the folder: {source.folder}"
            if source.is_local
            else f"write {source.name}@<40-digit commit sha>",
        )


def refuse_kernels(config: Mapping[str, Any], name: str) -> None:
    """Raises for a configuration that selects a kernel of another repo for attention or experts.

    transformers downloads and runs such kernels if the library `kernels` is installed. The model's results do not
    depend on them.
    """
    from hf_fusion.models.fused_custom_code import KERNELS

    stack: list[tuple[str, Any]] = [("", dict(config))]
    while stack:
        path, value = stack.pop()
        if isinstance(value, (Mapping, list)):
            entries = value.items() if isinstance(value, Mapping) else enumerate(value)
            stack += [(f"{path}.{key}" if path else str(key), inner) for key, inner in entries]
        elif isinstance(value, str) and "/" in value and not {*path.split(".")}.isdisjoint(KERNELS):
            code = Code("config.json", path, value)
            raise FusionError(
                f"{name} runs code of another repo ({code})",
                hint=f"remove this key from its config.json, or leave {name} out",
            )


def refuse_own_code(folder: Path, config: Mapping[str, Any], *, agreed: bool) -> None:
    """Raises, before weights are read, if a processor of a fused model needs custom code that may not run.

    The family's processor class, a copy of which is in the folder, is not custom code: this package's class is used.

    Args:
        folder: of the fused model.
        config: content of its ``config.json``.
        agreed: whether the caller passed ``trust_remote_code=True``.
    """
    refuse_kernels(config, str(folder))
    for below, auto in _processors(folder, config):
        if (folder / below).is_dir():
            source = folder_source(folder / below)
            source.name = f"{folder.resolve().name}/{below}".rstrip("/")
            refuse_code(source, processor_code(source, auto), agreed=agreed)


def _processors(folder: Path, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(subfolder, Auto class) of each processor in a fused model's folder."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or not family.processors:
        auto = processor_class(folder_source(folder))
        return [("", auto)] if auto else []
    autos = {"text": "AutoTokenizer", "image": "AutoImageProcessor"}
    file = folder / family.processors
    content = read_json(file, str(folder)) if file.exists() else {}
    folders, kinds = content.get("folders"), content.get("kinds")
    if not isinstance(folders, list) or not isinstance(kinds, list):
        return []
    pairs = zip(map(str, folders), map(str, kinds), strict=False)
    return [(below, autos[kind]) for below, kind in pairs if kind in autos]
