"""The base classes of all families' configs: checked fields, a format version, a recipe, the inner model's config.

`FusedConfig` is the base of every family, `BackboneConfig` of families whose experts share one backbone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from .fused_checks import (
    FORMAT,
    MODEL,
    NAME,
    TEXT,
    Row,
    Table,
    check_file,
    check_format,
    check_values,
    each,
    inner_config,
    optional,
    refuse,
    row,
)
from .fused_custom_code import without_code

GENERATING = ("causal-lm", "seq2seq-lm")
"""Heads of models that generate text."""
# fields of an expert, and of the base, in every family
EXPERT: Table = {
    "name": NAME,
    "revision": optional(TEXT),
    "license": optional(TEXT),
    "task": optional(TEXT),
    "labels": each(TEXT),
}
BASE: Table = {"id": optional(TEXT), "revision": optional(TEXT)}


class FusedConfig(PreTrainedConfig):
    """Base class of the families' configs, which define `FIELDS`, `CHECKED`, `_relations` and `_recipe_parameters`.

    Attributes:
        head: kind of the model's head, a key of `fused_heads.AUTO_CLASSES`.
        experts: one dict per expert, with the keys in the family's table.
        recipe: the content of ``fusion.yaml`` from `hf_fusion.fuse`, without paths of folders; None: see
            `to_recipe`.
        format_version: of this config; older code refuses a newer one.
        FIELDS: the family's fields and their allowed values.
        CHECKED: the fields that are also checked in a config built in Python.
    """

    FIELDS: ClassVar[Table] = {}
    CHECKED: ClassVar[tuple[str, ...]] = ()

    head: str = "features"
    # None stands for an empty container: a config's defaults may not be mutable.
    experts: list[dict[str, Any]] = None  # type: ignore[assignment]
    is_encoder_decoder: bool = False
    recipe: dict[str, Any] | None = None
    format_version: int = FORMAT

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, after validation.

        Raises:
            ValueError: a field is invalid, or the format is newer; the message names the field and what is expected.
        """
        check_file(config_dict, cls.FIELDS, cls)
        made = super().from_dict(config_dict, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        refuse(config._relations())
        return made

    def __post_init__(self, **kwargs: Any) -> None:
        check_format(self.format_version)
        self.experts = self.experts or []
        super().__post_init__(**kwargs)
        family = type(self)
        check_values(self, {name: family.FIELDS[name] for name in family.CHECKED})

    def _relations(self) -> Iterator[Row]:
        """Constraints between fields, see `fused_checks.Row`."""
        return iter(())

    @property
    def num_experts(self) -> int:
        """K, the number of experts."""
        return len(self.experts)

    def without_paths(self) -> Any:
        """A copy for uploading, with local paths replaced by names."""
        return self

    def to_recipe(self) -> dict[str, Any]:
        """The recipe in this config, or one made from its experts and settings.

        It has no paths: a folder is given by its name, with the sha256 of its content if that is known.
        """
        if self.recipe:
            return self.recipe
        parameters = {name: value for name, value in self._recipe_parameters().items() if value is not None}
        return {
            "method": self._recipe_method(),
            **self._recipe_base(),
            "experts": self._recipe_experts(),
            "parameters": parameters,
        }

    def _recipe_method(self) -> str:
        return str(self.model_type)

    def _recipe_base(self) -> dict[str, str]:
        return {}

    def _recipe_experts(self) -> list[Any]:
        return [pinned(expert["name"], expert.get("revision")) for expert in self.experts]

    def _recipe_parameters(self) -> dict[str, Any]:
        """The arguments of the family's `from_experts`; None values are left out."""
        return {}


class BackboneConfig(FusedConfig):
    """Base class of the configs of families whose experts share one backbone.

    Attributes:
        backbone: the config of the backbone, as a plain dict.
        base: id and revision of the experts' base, if known.
    """

    backbone: dict[str, Any] = None  # type: ignore[assignment]
    base: dict[str, Any] = None  # type: ignore[assignment]
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.backbone = self.backbone or {}
        self.base = self.base or {}
        if self.pad_token_id is None:  # the Trainer pads generated tokens with it
            self.pad_token_id = (self.backbone.get("text_config") or self.backbone).get("pad_token_id")
        super().__post_init__(**kwargs)

    def _relations(self) -> Iterator[Row]:
        names = [expert["name"] for expert in self.experts]
        for index, name in enumerate(names):
            yield f"experts[{index}].name", name, names.count(name) == 1, "another name for each expert"

    def backbone_config(self) -> PreTrainedConfig:
        """The backbone's config, rebuilt from the stored dict."""
        return inner_config(AutoConfig.for_model, without_code(self.backbone), "backbone")

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """For language models the backbone's text config, which `generate()` reads; else this config."""
        if self.head in GENERATING and self.backbone:
            return self.backbone_config().get_text_config(decoder=decoder, encoder=encoder)
        return self

    def without_paths(self) -> Any:
        """A copy for uploading, with local paths replaced by names."""
        folder = Path(str(self.base.get("id") or ""))
        if not folder.is_absolute():
            return self
        config = copy.deepcopy(self)
        config.base = {"id": folder.name, "revision": None}
        return config

    def _recipe_base(self) -> dict[str, str]:
        return {"base": pinned(self.base["id"], self.base.get("revision"))} if self.base.get("id") else {}


BACKBONE: Table = {
    "backbone": MODEL,
    "base": optional(row(BASE)),
}
"""The fields of a `BackboneConfig`, for a family's `FIELDS`."""


def pinned(name: str, revision: str | None) -> str:
    """``name@revision``, or the name if the revision is not known."""
    return f"{name}@{revision}" if revision else str(name)


__all__ = ["BACKBONE", "EXPERT", "GENERATING", "BackboneConfig", "FusedConfig", "pinned"]
