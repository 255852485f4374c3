"""The base class of all families' models: checked loading, saving with processor and recipe, pushing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from transformers import PreTrainedModel

from .fused_config import FusedConfig
from .fused_custom_code import UntrustedCodeError, load_processor
from .fused_files import ForeignFileError, check_files, check_processor
from .fused_heads import AUTO_CLASSES
from .fused_loading import check_size, load_checked
from .fused_saving import push_options, saved_whole

Model = TypeVar("Model", bound="FusedPreTrainedModel")
RECIPE_FILE = "fusion.yaml"
# arguments of `from_pretrained` that say where a model's files are
HUB = ("revision", "token", "cache_dir", "local_files_only", "subfolder")


class FusedPreTrainedModel(PreTrainedModel):
    """Base class of the families' models.

    A family defines `from_experts`, and overrides the hooks `_before_loading`, `_after_loading` and `_before_saving`.
    """

    config: FusedConfig
    base_model_prefix = ""
    _auto_class = "AutoModel"
    # Turns ids and folders into loaded experts; set where hf_fusion is installed, absent in a published model's code.
    load_experts: ClassVar[Callable[..., Any] | None] = None

    # These describe where the model came from, not the state of a call.
    _processor: Any = None
    _source: tuple[str, dict[str, Any]] | None = None
    _trusted: bool = False  # whether the repo's custom code may run for the processor

    def post_init(self) -> None:
        """As in transformers; then checks that the weights are not larger than the files that are being loaded."""
        super().post_init()
        check_size(self)

    @property
    def processor(self) -> Any:
        """The tokenizer or image processor; a loaded model loads it from its own repo or folder. None without one.

        Raises:
            UntrustedCodeError: it needs custom code, and the model was loaded without ``trust_remote_code``.
        """
        if self._processor is None and self._source is not None:
            from transformers import AutoImageProcessor, AutoTokenizer

            auto = AutoImageProcessor if self.main_input_name == "pixel_values" else AutoTokenizer
            try:  # with our config: without one transformers reads another, and warns
                source, hub = self._source
                check_processor(source, hub)
                self._processor = load_processor(auto, source, hub, trusted=self._trusted, config=self.config)
            except (ForeignFileError, UntrustedCodeError):
                raise
            except (OSError, ValueError):  # a repo without one
                return None
        return self._processor

    # ---------------------------------------------------------------- loading

    @classmethod
    def from_pretrained(cls: type[Model], pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Model:
        """As in transformers, with checks of the files; the processor can be loaded from the same source later.

        Raises:
            ValueError: the config, the weights or the files are invalid, see
                `fused_loading.load_checked`, or belong to another model.
        """
        name = pretrained_model_name_or_path
        hub = {key: kwargs[key] for key in HUB if kwargs.get(key) is not None}
        trusted = kwargs.get("trust_remote_code") is True
        if name is not None:  # without a name, all weights are passed as state_dict
            check_files(name, hub)
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs = cls._before_loading(name, hub, kwargs)
        model, info = load_checked(super().from_pretrained, name, args, kwargs, hub)
        model._after_loading(name, hub)
        model._source, model._trusted = (str(name), hub), trusted
        loaded: Any = (model, info) if wants_info else model
        return loaded

    @classmethod
    def _before_loading(cls, name: Any, hub: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments for `from_pretrained` of transformers."""
        return kwargs

    def _after_loading(self, name: Any, hub: dict[str, Any]) -> None:
        """Check and complete a model after its weights were loaded."""

    # ---------------------------------------------------------------- saving

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As in transformers; also writes the processor, the modelling code and the recipe."""
        pushed = push_options(save_directory, kwargs)
        name = f"{_module(type(self))}.{type(self).__name__}"
        family, head = type(self.config), AUTO_CLASSES[self.config.head].__name__
        self.config.auto_map = {"AutoConfig": f"{_module(family)}.{family.__name__}", "AutoModel": name, head: name}
        self._before_saving(kwargs)
        with saved_whole(save_directory) as staging:
            is_known = self._processor is not None or self._source is not None
            if is_known and (processor := self.processor) is not None:
                processor.save_pretrained(staging)
            super().save_pretrained(staging, *args, **kwargs)
            self._write_recipe(staging)
        if pushed:
            self.push_to_hub(**pushed)

    def _before_saving(self, kwargs: dict[str, Any]) -> None:
        """Complete the config, and the keyword arguments for `save_pretrained` of transformers."""

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; local paths are replaced in what is uploaded."""
        return super(FusedPreTrainedModel, self._without_paths()).push_to_hub(*args, **kwargs)

    def _write_recipe(self, folder: Path) -> None:
        """Write ``fusion.yaml``, with local paths where `hf_fusion.fuse` recorded them."""
        known = getattr(self, "fusion_recipe", None)
        content = self.config.to_recipe() if known is None else known.to_dict()
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=10_000)
        (folder / RECIPE_FILE).write_text(text, encoding="utf-8")

    def _without_paths(self) -> Any:
        """A copy for uploading, which shares the weights, with names of folders in its recipe instead of paths."""
        sent: Any = copy.copy(self)  # the weights are shared
        sent.fusion_recipe = None
        sent.config = self.config.without_paths()
        return sent


def _module(family: type) -> str:
    """The module of a class, as in ``auto_map``."""
    return family.__module__.rpartition(".")[2]


__all__ = ["FusedPreTrainedModel"]
