"""One processor for experts that each need their own tokenizer or image processor."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer, BatchEncoding, BatchFeature
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import PushToHubMixin, cached_file

from .fused_custom_code import load_processor
from .fused_files import ForeignFileError, check_processor, is_plain

PROCESSOR_FILE = "processor_config.json"
# kind of input -> how to load a processor of it, and the file and auto class by which pipelines find it
LOADERS: dict[str, Any] = {"text": AutoTokenizer, "image": AutoImageProcessor}
PIPELINE_FILES = {
    "text": ("tokenizer_config.json", {"AutoTokenizer": [None, "processing_foe.FoEProcessor"]}),
    "image": ("preprocessor_config.json", {"AutoImageProcessor": "processing_foe.FoEProcessor"}),
}
# A fast tokenizer stores a call's padding and truncation in itself, so calls of other threads have to wait.
_TOKENIZING = threading.RLock()


class FoEProcessor(PushToHubMixin):
    """Takes plain text or images and prepares them for every expert.

    The inputs of processor 0 keep their names (``input_ids``, ``pixel_values``); those of processor g carry the suffix
    ``_g`` (``input_ids_1``). With one processor this is its usual output, so a FoE whose experts share a tokenizer
    also works with that tokenizer alone. With several it stands in for the tokenizer or image processor of a pipeline.

    Args:
        processors: the distinct processors of the experts, in the order of the model's backbones' ``inputs``.
        kinds: "text" or "image" for each.
        vocabularies: for language models, the vocabulary size of each processor. The fused vocabulary is their
            concatenation: token ids of processor g are offset by the sizes before it.
        modes: for each processor the PIL mode that its experts need, "L" or "RGB", since pipelines pass RGB only. None
            leaves images unchanged.
    """

    _auto_class = "AutoProcessor"

    def __init__(
        self,
        processors: list[Any],
        kinds: list[str] | None = None,
        vocabularies: list[int] | None = None,
        modes: list[str | None] | None = None,
    ) -> None:
        self.processors = processors
        self.kinds = kinds or ["text" if hasattr(p, "tokenize") else "image" for p in processors]
        self.vocabularies = vocabularies or []
        self.modes = modes or [None] * len(processors)

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        images: Any = None,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchEncoding | BatchFeature:
        """Prepares a batch (or one example) for all experts.

        Args:
            text: a string or a list of strings.
            text_pair: second sentences; empty strings and None stand for "no second sentence".
            images: PIL images or arrays.
            return_tensors: "pt" for PyTorch, as in transformers.
            kwargs: passed to the tokenizers; ``padding`` and ``truncation`` are True by default.

        Returns:
            The inputs of `FoEModel.forward`.

        Raises:
            ValueError: text or images that an expert needs are missing.
        """
        inputs: dict[str, Any] = {}
        for index, (processor, kind) in enumerate(zip(self.processors, self.kinds)):
            if (text if kind == "text" else images) is None:
                raise ValueError(f"processor {index} takes {kind}, but none was given: pass {kind}=")
            if kind == "text":
                with _TOKENIZING:
                    encoded = self._tokenize(processor, text, text_pair, return_tensors, kwargs)
            else:
                encoded = processor(images=_in_mode(images, self.modes[index]), return_tensors=return_tensors)
            inputs.update({name if index == 0 else f"{name}_{index}": value for name, value in encoded.items()})
        # pipelines cast inputs to the model's dtype, which a BatchFeature supports and a BatchEncoding does not
        return BatchFeature(inputs) if "image" in self.kinds else BatchEncoding(inputs)

    @staticmethod
    def _tokenize(tokenizer: Any, text: Any, pair: Any, return_tensors: str, kwargs: dict[str, Any]) -> BatchEncoding:
        options = {"padding": True, "truncation": tokenizer.model_max_length < 10**9, **kwargs}
        if pair is None or isinstance(text, str):
            return tokenizer(text, pair or None, return_tensors=return_tensors, **options)
        # A pooled batch mixes single sentences and pairs; encoding "no pair" as a pair would add a separator.
        padding = options.pop("padding")
        rows = [tokenizer(a, b or None, **options) for a, b in zip(text, pair, strict=True)]
        return tokenizer.pad(
            {key: [row[key] for row in rows] for key in rows[0]}, padding, return_tensors=return_tensors
        )

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        """Decodes generated sequences, each token by the tokenizer its id belongs to.

        Args:
            sequences: B sequences of token ids in the fused vocabulary.
            kwargs: passed to each tokenizer's `decode`, such as ``skip_special_tokens=True``.

        Returns:
            B texts.
        """
        return [self.decode(sequence, **kwargs) for sequence in sequences]

    def decode(self, sequence: Any, **kwargs: Any) -> str:
        """Decodes one generated sequence.

        Args:
            sequence: token ids in the fused vocabulary.
            kwargs: see `batch_decode`.

        Returns:
            The text.
        """
        ids = sequence.tolist() if hasattr(sequence, "tolist") else list(sequence)
        start, parts = 0, []
        for tokenizer, size in zip(self.processors, self.vocabularies or [max(ids, default=0) + 1]):
            tokens = [token - start for token in ids if start <= token < start + size]
            parts.append(tokenizer.decode(tokens, **kwargs))
            start += size
        return "".join(parts)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves all processors and the code that loads them; a single one is saved at the root of the folder.

        Args:
            save_directory: folder; created if missing.
            push_to_hub: also uploads it.
            kwargs: for the upload, as in transformers; ``repo_id`` defaults to the folder's name.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        alone = len(self.processors) == 1 and self.modes[0] != "L"
        folders = ["" if alone else f"processor_{index}" for index in range(len(self.processors))]
        for processor, name in zip(self.processors, folders):
            processor.save_pretrained(folder / name)
        _lift_code(folder, [name for name in folders if name])
        config = {"folders": folders, "kinds": self.kinds, "vocabularies": self.vocabularies, "modes": self.modes}
        _write_json(folder / PROCESSOR_FILE, {**config, "auto_map": {"AutoProcessor": "processing_foe.FoEProcessor"}})
        if not alone:
            for kind in set(self.kinds):
                file, auto_map = PIPELINE_FILES[kind]
                _write_json(folder / file, {"auto_map": auto_map})
        custom_object_save(self, folder)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> FoEProcessor:
        """Loads a processor from a folder or the Hub.

        A processor that transformers does not know needs the repo's code, which runs only with
        ``trust_remote_code=True``.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id.
            kwargs: Hub arguments as in transformers (revision, token, cache_dir …), and ``trust_remote_code``.

        Returns:
            The processor.

        Raises:
            UntrustedCodeError: the repo's code is needed and not trusted, or it is another repo's.
            ForeignFileError: a folder, a file or a link leads out of the model.
        """
        hub = {
            name: kwargs[name]
            for name in ("cache_dir", "force_download", "token", "revision", "local_files_only")
            if kwargs.get(name) is not None
        }
        source = str(pretrained_model_name_or_path)
        check_processor(source, hub)
        config = json.loads(Path(str(cached_file(source, PROCESSOR_FILE, **hub))).read_text(encoding="utf-8"))
        trusted = kwargs.get("trust_remote_code") is True
        for folder in config["folders"]:
            if folder:
                if not is_plain(folder):
                    raise ForeignFileError(
                        f"{source}: {PROCESSOR_FILE} names {folder!r}, which is not a folder within it"
                    )
                check_processor(source, {**hub, "subfolder": folder})
        processors = [
            load_processor(LOADERS[kind], source, {**hub, "subfolder": folder}, trusted=trusted)
            for folder, kind in zip(config["folders"], config["kinds"], strict=True)
        ]
        return cls(processors, config["kinds"], config["vocabularies"], config["modes"])

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoProcessor") -> None:
        """Sets the auto class that saved processors name.

        Args:
            auto_class: its name; "AutoProcessor" is set already.
        """
        cls._auto_class = auto_class


def _in_mode(images: Any, mode: str | None) -> Any:
    """Converts PIL images to a mode; arrays and tensors are returned unchanged."""
    if isinstance(images, (list, tuple)):
        return [_in_mode(image, mode) for image in images]
    return images.convert(mode) if mode and hasattr(images, "convert") else images


def _lift_code(folder: Path, inner: list[str]) -> None:
    """Moves the processors' code files to the root, where transformers looks for them whatever the sub-folder.

    Raises:
        ValueError: two processors bring different files of one name, or one of them a name of this family's files.
    """
    own_folder = Path(__file__).parent
    lifted = {path.name: path.read_bytes() for name in ("*_foe.py", "fused*.py") for path in own_folder.glob(name)}
    for path in [path for name in inner for path in sorted((folder / name).glob("*.py"))]:
        if lifted.setdefault(path.name, path.read_bytes()) != path.read_bytes():
            raise ValueError(f"two experts bring different code called {path.name}: rename that of one of them")
        path.replace(folder / path.name)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


__all__ = ["FoEProcessor"]
