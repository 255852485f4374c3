"""What the models of all families have in common: where they come from, how they are loaded, saved and pushed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from transformers import PreTrainedModel

from .fused_config import FusedConfig
from .fused_files import ForeignFileError, check_files, check_processor
from .fused_heads import AUTO_CLASSES
from .fused_loading import check_size, load_checked
from .fused_own_code import UntrustedCodeError, load_processor
from .fused_saving import push_options, saved_whole

Model = TypeVar("Model", bound="FusedPreTrainedModel")
RECIPE_FILE = "fusion.yaml"
# where to look for a model's files, as `from_pretrained` takes it
HUB = ("revision", "token", "cache_dir", "local_files_only", "subfolder")


class FusedPreTrainedModel(PreTrainedModel):
    """Base of the families' models.

    A family has a `from_experts`, and says in `_before_loading`, `_after_loading` and `_before_saving` what it does
    beside what every family does.
    """

    config: FusedConfig
    base_model_prefix = ""
    _auto_class = "AutoModel"
    # Turns ids and folders into loaded experts; set where hf_fusion is installed, absent in a published model's code.
    load_experts: ClassVar[Callable[..., Any] | None] = None

    # None of these is state of a call: they say where the model came from.
    _processor: Any = None
    _source: tuple[str, dict[str, Any]] | None = None
    _trusted: bool = False  # whether the repo's own code may run for the processor

    def post_init(self) -> None:
        """As any model's; the weights that were made are no more than the files of a model that is loaded hold."""
        super().post_init()
        check_size(self)

    @property
    def processor(self) -> Any:
        """The tokenizer or image processor; a loaded model fetches it from where it came from.

        Raises:
            UntrustedCodeError: it needs the repo's own code, and the model was loaded without ``trust_remote_code``.
        """
        if self._processor is None and self._source is not None:
            from transformers import AutoImageProcessor, AutoTokenizer

            auto = AutoImageProcessor if self.main_input_name == "pixel_values" else AutoTokenizer
            try:  # with a config: else another is read, and warned of
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
        """As any model's; remembers where it came from, so that its processor can follow.

        Raises:
            ValueError: naming what is wrong in the config, the weights or the files, see
                `fused_loading.load_checked`; or that these are another model's.
        """
        name = pretrained_model_name_or_path
        hub = {key: kwargs[key] for key in HUB if kwargs.get(key) is not None}
        trusted = kwargs.get("trust_remote_code") is True
        if name is not None:  # else all weights are given
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
        """The keyword arguments that transformers' `from_pretrained` is given."""
        return kwargs

    def _after_loading(self, name: Any, hub: dict[str, Any]) -> None:
        """Checks and completes a model whose weights are in place."""

    # ---------------------------------------------------------------- saving

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As any model's; writes the processor, the code and the recipe beside the weights."""
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
        """Completes the config, and the keyword arguments of transformers' `save_pretrained`."""

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As any model's; what is sent says nothing of this machine's folders."""
        return super(FusedPreTrainedModel, self._without_paths()).push_to_hub(*args, **kwargs)

    def _write_recipe(self, folder: Path) -> None:
        """Writes ``fusion.yaml``: with the paths of this machine where `hf_fusion.fuse` knows them."""
        known = getattr(self, "fusion_recipe", None)
        content = self.config.to_recipe() if known is None else known.to_dict()
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=10_000)
        (folder / RECIPE_FILE).write_text(text, encoding="utf-8")

    def _without_paths(self) -> Any:
        """The same model, to be sent to the Hub: its recipe names folders, and not where on this machine they lie."""
        sent: Any = copy.copy(self)  # the weights are shared
        sent.fusion_recipe = None
        sent.config = self.config.without_paths()
        return sent


def _module(family: type) -> str:
    """The file that a class is in, as an ``auto_map`` names it."""
    return family.__module__.rpartition(".")[2]


__all__ = ["FusedPreTrainedModel"]
