"""Hostile code in every place of a model's folder where transformers, PEFT and datasets look for some.

Whatever of it runs leaves a marker. Answers on stdin are "y": a load that asks for consent gets it, and is found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

MODULE = "evil_code"
AUTOS = (
    *("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"),
    *("AutoModelForImageClassification", "AutoModelForSeq2SeqLM", "AutoProcessor", "AutoTokenizer"),
    *("AutoImageProcessor", "AutoFeatureExtractor", "AutoVideoProcessor"),
)
CONFIGS = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


def auto_map(prefix: str = "") -> dict[str, Any]:
    """Every Auto class -> a class of the hostile module, of another repo where a prefix names one."""
    named: dict[str, Any] = dict.fromkeys(AUTOS, f"{prefix}{MODULE}.Evil")
    return named | {"AutoTokenizer": [f"{prefix}{MODULE}.Evil", None]}


class Bomb:
    """What unpickling runs: it leaves the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.marker, "unpickled")


class Planter:
    """Plants code that writes `marker` into folders of models.

    Args:
        marker: the file that code leaves.
        elsewhere: a folder that holds the same code, and stands for another repo.
    """

    def __init__(self, marker: Path, elsewhere: Path) -> None:
        self.marker, self.elsewhere = marker, elsewhere
        elsewhere.mkdir(exist_ok=True)
        self._code(elsewhere)

    def plant(self, place: str, folder: Path) -> None:
        """Plants code in a folder, in one of `PLACES`."""
        getattr(self, f"_in_{place}")(folder)

    def _code(self, folder: Path, name: str = f"{MODULE}.py") -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(
            f"open({str(self.marker)!r}, 'a').write(__name__)\n"
            "class Evil:\n"
            "    def __init__(self, *args, **kwargs): pass\n"
            "    from_pretrained = from_dict = classmethod(lambda cls, *args, **kwargs: cls())\n"
            "    register_for_auto_class = classmethod(lambda cls, *args, **kwargs: None)\n"
            "def generate(*args, **kwargs): return None\n"
        )

    def _everywhere(self, folder: Path) -> Iterator[Path]:
        """The folder and its sub-folders, each with the code in it."""
        for own in [folder, *sorted(path for path in folder.rglob("*") if path.is_dir())]:
            self._code(own)
            yield own

    def _named(self, folder: Path, file: str, **fields: Any) -> None:
        """Fields of a configuration at every level that has it, and at the root."""
        for own in self._everywhere(folder):
            if own == folder or (own / file).exists():
                edit(own / file, **fields)

    def _in_config(self, folder: Path) -> None:
        self._named(folder, "config.json", auto_map=auto_map())

    def _in_config_of_no_known_type(self, folder: Path) -> None:
        self._named(folder, "config.json", auto_map=auto_map(), model_type="evil")

    def _in_config_without_type(self, folder: Path) -> None:
        self._named(folder, "config.json", auto_map=auto_map(), model_type=None, architectures=["AutoModel"])

    def _in_architectures(self, folder: Path) -> None:
        self._named(folder, "config.json", auto_map=auto_map(), architectures=["Evil"])

    def _in_architectures_that_are_auto_classes(self, folder: Path) -> None:
        self._named(folder, "config.json", auto_map=auto_map(), architectures=["AutoModelForCausalLM"])

    def _in_nested_configs(self, folder: Path) -> None:
        for own in self._everywhere(folder):
            if (file := own / "config.json").exists():
                content = json.loads(file.read_text())
                named = {"auto_map": auto_map(), "_name_or_path": str(self.elsewhere), "name_or_path": str(folder)}
                plant_below(content, named)
                edit(file, **content, text_config=named, vision_config=named, sub=[{"auto_map": auto_map()}])

    def _in_kernels(self, folder: Path) -> None:
        self._named(folder, "config.json", attn_implementation="evil/kernel")

    def _in_nested_kernels(self, folder: Path) -> None:
        file = folder / "config.json"
        content = json.loads(file.read_text()) if file.exists() else {"text_config": {"model_type": "llama"}}
        plant_below(content, {"_attn_implementation": "evil/kernel", "experts_implementation": "evil/kernel"})
        edit(folder / "config.json", **content)

    def _in_tokenizer(self, folder: Path) -> None:
        self._named(folder, "tokenizer_config.json", auto_map=auto_map(), tokenizer_class="Evil")

    def _in_tokenizer_of_a_known_class(self, folder: Path) -> None:
        self._named(folder, "tokenizer_config.json", auto_map=auto_map())

    def _in_tokenizer_of_old(self, folder: Path) -> None:
        self._named(folder, "tokenizer_config.json", auto_map=[f"{MODULE}.Evil", None], tokenizer_class="Evil")

    def _in_tokenizer_without_class(self, folder: Path) -> None:
        self._named(folder, "tokenizer_config.json", auto_map=auto_map(), tokenizer_class=None)

    def _in_processor(self, folder: Path) -> None:
        nested = {"auto_map": auto_map(), "image_processor_type": "Evil"}
        self._named(
            folder, "processor_config.json", auto_map=auto_map(), image_processor=nested, processor_class="Evil"
        )

    def _in_image_processor(self, folder: Path) -> None:
        fields = {"auto_map": auto_map(), "image_processor_type": "Evil", "feature_extractor_type": "Evil"}
        self._named(folder, "preprocessor_config.json", **fields)

    def _in_image_processor_of_a_known_class(self, folder: Path) -> None:
        self._named(folder, "preprocessor_config.json", auto_map=auto_map())

    def _in_feature_extractor(self, folder: Path) -> None:
        self._named(
            folder, "preprocessor_config.json", auto_map={"AutoFeatureExtractor": f"{MODULE}.EvilFeatureExtractor"}
        )
        self._named(folder, "feature_extractor_config.json", auto_map=auto_map(), feature_extractor_type="Evil")

    def _in_video_processor(self, folder: Path) -> None:
        self._named(folder, "video_preprocessor_config.json", auto_map=auto_map(), video_processor_type="Evil")

    def _in_generation(self, folder: Path) -> None:
        self._code(folder, "custom_generate/generate.py")
        for file in ("generation_config.json", "config.json"):
            edit(folder / file, custom_generate=str(folder), trust_remote_code=True)

    def _in_chat_template(self, folder: Path) -> None:
        escape = (
            "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}"
            "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{% if c.__name__ == '_wrap_close' %}"
            "{{ c.__init__.__globals__['system']('touch MARKER') }}{% endif %}{% endfor %}"
        ).replace("MARKER", str(self.marker))
        for own in self._everywhere(folder):
            (own / "chat_template.jinja").write_text(escape)
            if (own / "tokenizer_config.json").exists():
                edit(own / "tokenizer_config.json", chat_template=escape)

    def _in_adapter(self, folder: Path) -> None:
        mapping = {"base_model_class": "Evil", "parent_library": MODULE}
        for own in self._everywhere(folder):
            if (own / "adapter_config.json").exists():
                edit(own / "adapter_config.json", auto_mapping=mapping, task_type=None, auto_map=auto_map())

    def _in_another_repo(self, folder: Path) -> None:
        for file in CONFIGS:
            self._named(folder, file, auto_map=auto_map(f"{self.elsewhere}--"))

    def _in_another_repo_where_code_is_needed(self, folder: Path) -> None:
        self._in_another_repo(folder)
        self._named(folder, "tokenizer_config.json", tokenizer_class="Evil")
        self._named(folder, "preprocessor_config.json", image_processor_type="Evil")

    def _in_pickles(self, folder: Path) -> None:
        for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"):
            torch.save(Bomb(self.marker), folder / name)

    def _in_pickles_alone(self, folder: Path) -> None:
        self._in_pickles(folder)
        for file in folder.glob("*.safetensors"):
            if "gates" not in file.name:
                file.unlink()

    def _in_sentence_modules(self, folder: Path) -> None:
        self._code(folder)
        (folder / "modules.json").write_text(
            json.dumps([{"idx": 0, "name": "0", "path": "", "type": f"{MODULE}.Evil"}])
        )

    def _in_recipe(self, folder: Path) -> None:
        (folder / "fusion.yaml").write_text(f"method: !!python/object/apply:os.system ['touch {self.marker}']\n")

    def _in_copies_of_this_package(self, folder: Path) -> None:
        """The code that a fused model travels with; its auto_map names it."""
        for file in folder.glob("*.py"):
            self._code(folder, file.name)
        for name in ("setup.py", "conftest.py", "__init__.py", "hf_fusion.py", "transformers.py", "torch.py"):
            self._code(folder, name)


PLACES = tuple(name.removeprefix("_in_") for name in vars(Planter) if name.startswith("_in_"))


def plant_below(content: Any, named: dict[str, Any]) -> None:
    """Adds keys to every mapping within a configuration that says a model's type."""
    for inner in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        plant_below(inner, named)
        if isinstance(inner, dict) and "model_type" in inner:
            inner.update(named)


def edit(file: Path, **fields: Any) -> None:
    """Sets keys of a JSON file, which is made where it is missing; None removes one."""
    content = (json.loads(file.read_text()) if file.exists() else {}) | fields
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
