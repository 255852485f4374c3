"""The model that is served: what it does, its tokenizers and its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fusion.errors import FusionError, first_line
from hf_fusion.families import FAMILIES
from hf_fusion.fusion import load_fused
from hf_fusion.hub.download import download
from hf_fusion.hub.load import load_experts
from hf_fusion.hub.refs_to_files import resolve
from hf_fusion.hub.task_heads import head_of_architecture
from hf_fusion.io.json_files import read_json
from hf_fusion.models.fused_config import GENERATING
from hf_fusion.serving.errors import invalid
from hf_fusion.serving.texts import UNFINISHED

if TYPE_CHECKING:
    import torch
    from huggingface_hub import HfApi
    from transformers import PreTrainedModel

ANSWERS, CLASSES, EMBEDDINGS = "answers", "classes", "embeddings"
# head, of a family's config or as an Auto class → what is served
KINDS = {
    **dict.fromkeys((*GENERATING, "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"), ANSWERS),
    **dict.fromkeys(("sequence-classification", "AutoModelForSequenceClassification"), CLASSES),
    **dict.fromkeys(("image-classification", "AutoModelForImageClassification"), CLASSES),
    **dict.fromkeys(("features", "AutoModel"), EMBEDDINGS),
}
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")  # names of a config's context length
UNLIMITED = 10**9  # a tokenizer without a limit says a larger number
POOLING = "1_Pooling/config.json"


@dataclass(eq=False)
class ServedModel:
    """A model with what requests to it need.

    Attributes:
        model: in evaluation mode, on its device.
        processor: its tokenizer, image processor, or `FoEProcessor`.
        name: by which requests name it.
        kind: what it gives: `ANSWERS`, `CLASSES` or `EMBEDDINGS`.
        pooling: how token states become an embedding: "mean", "cls" or "last".
    """

    model: Any
    processor: Any
    name: str
    kind: str
    pooling: str = "mean"

    @classmethod
    def of(cls, model: PreTrainedModel, processor: Any, name: str, pooling: str = "mean") -> ServedModel:
        """Checks that a model can be served.

        Raises:
            FusionError: its head is not served, or it has no tokenizer or image processor.
        """
        known = head_of_architecture(type(model).__name__)
        head = getattr(model.config, "head", None) or (known.auto if known else "")
        if head not in KINDS:
            raise FusionError(
                f"{name} is a {type(model).__name__}, which is not served",
                "serve a language model, a classifier of texts or images, or a model of features",
            )
        if processor is None:
            what = "image processor" if model.main_input_name == "pixel_values" else "tokenizer"
            raise FusionError(
                f"{name} has no {what}", f"save one beside it: {what.replace(' ', '_')}.save_pretrained(DIR)"
            )
        served = cls(model.eval(), processor, name, KINDS[head], pooling)
        if served.reads_images and served.kind == EMBEDDINGS:
            raise FusionError(f"{name} embeds images, and OpenAI's API embeds texts", "serve a model that reads texts")
        for tokenizer in served.tokenizers:
            tokenizer("a")  # the first call may change the tokenizer, which threads share from then on
        return served

    @property
    def device(self) -> torch.device:
        """Where inputs are put."""
        device: torch.device = self.model.device
        return device

    @property
    def family(self) -> str | None:
        """The name of its family; None for a plain model, such as a static merge."""
        name = getattr(self.model.config, "model_type", None)
        return name if name in FAMILIES else None

    @property
    def selects(self) -> bool:
        """Whether an expert is selected for each prompt, as in a Fusion of Experts that writes."""
        return self.kind == ANSWERS and self.family == "foe"

    @property
    def reads_images(self) -> bool:
        """Whether its inputs are images."""
        return bool(self.model.main_input_name == "pixel_values")

    @cached_property
    def tokenizers(self) -> list[Any]:
        """Its distinct tokenizers; one, but in a Fusion of Experts."""
        return [] if self.reads_images else list(getattr(self.processor, "processors", [self.processor]))

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether prompt and answer have positions of their own."""
        return bool(getattr(self.model.config, "is_encoder_decoder", False))

    @cached_property
    def context(self) -> int | None:
        """The most tokens it reads, those of the answer included in a causal model; None without a limit."""
        backbones = getattr(self.model, "backbones", None)
        inner = (
            [each.model for each in backbones]
            if backbones is not None
            else [getattr(self.model, "backbone", self.model)]
        )
        configs = [model.config.get_text_config() for model in inner] if not self.reads_images else []
        limits = [getattr(config, name, None) for config in configs for name in LENGTHS]
        limits += [tokenizer.model_max_length for tokenizer in self.tokenizers]
        return min((int(n) for n in limits if isinstance(n, int) and 0 < n < UNLIMITED), default=None)

    def tokenizer_of(self, choice: int | None) -> Any:
        """The tokenizer that an answer is written with.

        Args:
            choice: index of the expert that writes, if one is selected.
        """
        if choice is None or len(self.tokenizers) == 1:
            return self.tokenizers[0]
        config = self.model.config
        return self.tokenizers[config.backbones[config.experts[choice]["backbone"]]["inputs"]]

    def prompt(self, given: str | Sequence[int]) -> list[list[int]]:
        """The token ids of a prompt, for each tokenizer.

        Raises:
            ApiError: token ids for several tokenizers, or unknown ones; an empty prompt.
        """
        if isinstance(given, str):
            return self._checked([tokenizer(given)["input_ids"] for tokenizer in self.tokenizers])
        if len(self.tokenizers) > 1:
            raise invalid("token ids are of one tokenizer, and this model has several: send text", "prompt")
        size = len(self.tokenizers[0])
        if wrong := [token for token in given if not 0 <= token < size]:
            raise invalid(f"token {wrong[0]} is not one of the {size} of the tokenizer", "prompt")
        return self._checked([list(given)])

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """The token ids of a conversation, by the chat template of each tokenizer.

        Raises:
            ApiError: there is no template, or it refuses the messages.
        """
        prompts = []
        for tokenizer in self.tokenizers:
            if not tokenizer.chat_template:
                raise invalid(
                    "the model's tokenizer has no chat template: send a prompt to /v1/completions", "messages"
                )
            try:
                found = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
            except Exception as error:  # a template may raise anything
                raise invalid(f"the chat template refuses these messages: {first_line(error)}", "messages") from error
            prompts.append(found["input_ids"])
        return self._checked(prompts)

    def room(self, prompt: Sequence[Sequence[int]]) -> int | None:
        """The most tokens of an answer; None without a limit.

        Raises:
            ApiError: the prompt is too long.
        """
        if self.context is None:
            return None
        length = max(map(len, prompt))
        least = 0 if self.is_encoder_decoder else 1  # for the answer
        if length + least > self.context:
            raise invalid(
                f"the prompt has {length} tokens, and the model reads {self.context}"
                + (" with those of the answer" if least else ""),
                "messages",
                "context_length_exceeded",
            )
        return self.context if self.is_encoder_decoder else self.context - length

    def named(self, tokenizer: Any, token: int) -> tuple[str, list[int] | None]:
        """A token's text, and its bytes; None for a part of a character."""
        text = tokenizer.decode([token])
        return text, None if UNFINISHED in text else list(text.encode())

    def describe(self) -> dict[str, Any]:
        """What is known of the model, for `/v1/models`."""
        experts = [row["name"] for row in getattr(self.model.config, "experts", None) or []] if self.family else []
        return {"kind": self.kind, "method": self.family, "experts": experts, "max_model_len": self.context}

    @staticmethod
    def _checked(prompts: list[list[int]]) -> list[list[int]]:
        if not all(prompts):
            raise invalid("the prompt is empty: a model needs a token to go on from", "prompt")
        return prompts


def load_served(
    given: str,
    name: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    api: HfApi | None = None,
) -> ServedModel:
    """Loads a model to be served.

    Args:
        given: a folder, or an id on the Hub, ``owner/name@revision``; a fused model, a static merge or a plain model.
        name: by which requests name it; default: the folder's name, or the id.
        device: such as "cuda:1"; default: the accelerator, where there is one.
        dtype: "float32", "float16" or "bfloat16"; default: as stored.
        trust_remote_code: see `hf_fusion.fusion.load_fused`.
        api: the Hub's client.

    Raises:
        FusionError: it cannot be loaded, or is not served.
    """
    import torch

    source = resolve(given, api)
    if not source.is_local:
        download([(source, list(source.sizes))], api)
    folder = Path(source.folder or given)
    config = folder / "config.json"
    if config.is_file() and read_json(config, given).get("model_type") in FAMILIES:
        model: Any = load_fused(folder, trust_remote_code=trust_remote_code)[0]
        processor = model.processor
    else:
        [expert] = load_experts([given], gates=False, trust_remote_code=trust_remote_code, api=api)
        if expert.adapter is not None:
            raise FusionError(f"{given} is an adapter", "serve what it was fused into, or its base")
        model, processor = expert.model, expert.processor
    if dtype is not None:
        model.to(getattr(torch, dtype))
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model.to(device or accelerator)
    default = folder.resolve().name if source.is_local else given.partition("@")[0]
    return ServedModel.of(model, processor, name or default, pooling_of(folder, given))


def pooling_of(folder: Path, name: str) -> str:
    """How a folder of sentence-transformers says that token states become an embedding; "mean" for other folders.

    Raises:
        FusionError: by a module or in a way that is not served.
    """
    others = [path.parent.name for path in folder.glob("[2-9]_*/config.json") if "Normalize" not in path.parent.name]
    if others:
        raise FusionError(f"{name} has a module {others[0]}, which is not served", "use it with sentence-transformers")
    if not (folder / POOLING).is_file():
        return "mean"
    stored = read_json(folder / POOLING, name)
    modes = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}
    chosen = [
        mode for mode, key in modes.items() if stored.get(key) or stored.get("pooling_mode") in (mode, mode + "token")
    ]
    used = [key for key, value in stored.items() if key.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or len(used) > 1:
        raise FusionError(f"{name} pools in another way than mean, cls or last token", "use sentence-transformers")
    return chosen[0]


__all__ = ["ANSWERS", "CLASSES", "EMBEDDINGS", "ServedModel", "load_served", "pooling_of"]
