"""What the configs of all families have in common: checked fields, a format, a recipe, the config of an inner model.

`FusedConfig` is the base of every family, `BackboneConfig` of those that put their experts into one model.
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
from .fused_own_code import without_code

GENERATING = ("causal-lm", "seq2seq-lm")
"""Heads of models that generate text."""
# what every family says of an expert, and of the base where it has one
EXPERT: Table = {
    "name": NAME,
    "revision": optional(TEXT),
    "license": optional(TEXT),
    "task": optional(TEXT),
    "labels": each(TEXT),
}
BASE: Table = {"id": optional(TEXT), "revision": optional(TEXT)}


class FusedConfig(PreTrainedConfig):
    """Base of the families' configs. Each of them has `FIELDS`, `CHECKED`, `_relations` and `_recipe_parameters`.

    Args:
        head: what kind of model this is, a key of `fused_heads.AUTO_CLASSES`.
        experts: one dict per expert, with what the family's table says of it.
        recipe: what `hf_fusion.fuse` made it of, as ``fusion.yaml`` has it, without the paths of folders; None: see
            `to_recipe`.
        format_version: of this config; code refuses what is newer than itself.

    Attributes:
        FIELDS: the family's own fields and what they may hold.
        CHECKED: those of them that are checked in a config made by hand, too.
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
        """As any config's, once what it says is known to be right.

        Raises:
            ValueError: naming the field, what it is and what is expected; or a newer format.
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
        """What has to fit together, see `fused_checks.Row`."""
        return iter(())

    @property
    def num_experts(self) -> int:
        """K, the number of experts."""
        return len(self.experts)

    def without_paths(self) -> Any:
        """This config as others are told it: without the path of a folder of this machine."""
        return self

    def to_recipe(self) -> dict[str, Any]:
        """The recipe in this config; where it holds none, what its experts and settings tell.

        The paths of folders are not in it: a folder is named, with the sha256 of its content where that is known.
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
        """The arguments of the family's `from_experts`; those that are None are left out."""
        return {}


class BackboneConfig(FusedConfig):
    """Base of the configs of families whose experts are put into one model, the backbone.

    Args:
        backbone: the config of that model, as a plain dict.
        base: id and revision of the base that the experts were made from, where they are known.
    """

    backbone: dict[str, Any] = None  # type: ignore[assignment]
    base: dict[str, Any] = None  # type: ignore[assignment]
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.backbone = self.backbone or {}
        self.base = self.base or {}
        if self.pad_token_id is None:  # the Trainer pads what was generated by it
            self.pad_token_id = (self.backbone.get("text_config") or self.backbone).get("pad_token_id")
        super().__post_init__(**kwargs)

    def _relations(self) -> Iterator[Row]:
        names = [expert["name"] for expert in self.experts]
        for index, name in enumerate(names):
            yield f"experts[{index}].name", name, names.count(name) == 1, "another name for each expert"

    def backbone_config(self) -> PreTrainedConfig:
        """The backbone's config, rebuilt from the plain dict that is stored."""
        return inner_config(AutoConfig.for_model, without_code(self.backbone), "backbone")

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The backbone's text config for language models, which `generate()` asks for; else this config."""
        if self.head in GENERATING and self.backbone:
            return self.backbone_config().get_text_config(decoder=decoder, encoder=encoder)
        return self

    def without_paths(self) -> Any:
        """This config, its base called by the name of its folder."""
        folder = Path(str(self.base.get("id") or ""))
        if not folder.is_absolute():
            return self
        told = copy.deepcopy(self)
        told.base = {"id": folder.name, "revision": None}
        return told

    def _recipe_base(self) -> dict[str, str]:
        return {"base": pinned(self.base["id"], self.base.get("revision"))} if self.base.get("id") else {}


BACKBONE: Table = {
    "backbone": MODEL,
    "base": optional(row(BASE)),
}
"""The fields of a `BackboneConfig`, for a family's `FIELDS`."""


def pinned(name: str, revision: str | None) -> str:
    """``name@revision``; the name alone where the revision is not known."""
    return f"{name}@{revision}" if revision else str(name)


__all__ = ["BACKBONE", "EXPERT", "GENERATING", "BackboneConfig", "FusedConfig", "pinned"]
