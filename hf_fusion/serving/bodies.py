"""The requests of OpenAI's API, and `/classify`: fields, bounds, and which fields are refused."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hf_fusion.serving.errors import ApiError, invalid

MOST_CHOICES, MOST_STOPS, MOST_LOGPROBS, MOST_INPUTS = 128, 16, 20, 2048
MOST_SEED = 2**63 - 1
# fields that would change the answer in ways that are not served → values that do not
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "dimensions": (),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "web_search_options": (),
}
# fields that say nothing of the answer
IGNORED = (
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "reasoning_effort",
    "safety_identifier", "service_tier", "store", "user", "verbosity",
)  # fmt: skip

Body = TypeVar("Body", bound="RequestBody")


class RequestBody(BaseModel):
    """What all requests have in common."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_unused(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, neutral in UNSUPPORTED.items():
            if name not in cls.model_fields and values.get(name) is not None and values[name] not in neutral:
                raise ValueError(f"{name} is not supported by this server: leave it out")
        unused = (*UNSUPPORTED, *IGNORED)
        return {name: value for name, value in values.items() if name in cls.model_fields or name not in unused}


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool = False


class GeneratingBody(RequestBody):
    """Options of a generated answer."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = 1
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    seed: Annotated[int, Field(ge=0, le=MOST_SEED)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    routing: bool = False

    @property
    def stops(self) -> tuple[str, ...]:
        """Its stop strings."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(filter(None, given))

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def bias(self, vocabulary: int) -> dict[int, float]:
        """Token → what is added to its score.

        Args:
            vocabulary: number of tokens.

        Raises:
            ApiError: something else than a token is named.
        """
        found = {}
        for name, value in (self.logit_bias or {}).items():
            if not name.isdecimal() or int(name) >= vocabulary:
                raise invalid(f"logit_bias names {name!r}, which is not one of the {vocabulary} tokens", "logit_bias")
            found[int(name)] = value
        return found


class CompletionBody(GeneratingBody):
    """`/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @property
    def prompts(self) -> list[Any]:
        """Its prompts, texts or token ids.

        Raises:
            ApiError: there are none, or too many.
        """
        prompts: list[Any] = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        if prompts and isinstance(prompts[0], int):
            prompts = [prompts]
        return _bounded(prompts, "prompt")


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: str
    content: str | list[dict[str, Any]] | None = None

    def plain(self) -> dict[str, str]:
        """Role and text, as chat templates read them.

        Raises:
            ApiError: it has a part that is not text.
        """
        if not isinstance(self.content, list):
            return {"role": self.role, "content": self.content or ""}
        texts = []
        for part in self.content:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise invalid(f"a message has a part of type {part.get('type')!r}: this model reads text", "messages")
            texts.append(part["text"])
        return {"role": self.role, "content": "".join(texts)}


class ChatBody(GeneratingBody):
    """`/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None


class EmbeddingBody(RequestBody):
    """`/v1/embeddings`."""

    input: str | list[str]
    encoding_format: str | None = "float"
    routing: bool = False

    @property
    def texts(self) -> list[str]:
        """Its texts.

        Raises:
            ApiError: there are none, or too many.
        """
        return _bounded([self.input] if isinstance(self.input, str) else self.input, "input")


class TextPair(BaseModel):
    """Two texts that are classified together."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: str
    text_pair: str


class ClassifyBody(RequestBody):
    """`/classify`, in vLLM's format: texts, pairs of texts, or images as data URLs."""

    input: str | TextPair | list[str | TextPair]
    task: str | None = None
    routing: bool = False

    @property
    def inputs(self) -> list[str | TextPair]:
        """Its inputs.

        Raises:
            ApiError: there are none, or too many.
        """
        return _bounded(self.input if isinstance(self.input, list) else [self.input], "input")


def _bounded(values: list[Any], param: str) -> list[Any]:
    if not 0 < len(values) <= MOST_INPUTS:
        raise invalid(f"{param} has {len(values)} entries, and takes 1 to {MOST_INPUTS}", param)
    return values


def read_body(kind: type[Body], content: bytes) -> Body:
    """Reads a request.

    Raises:
        ApiError: it is not JSON, or a field is missing, unknown or out of bounds; the message names it.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(str(each) for each in first["loc"])
        field = str(first["loc"][0]) if first["loc"] else None
        if first["type"] == "extra_forbidden":
            raise invalid(f"{path} is not a field of this request", field, "unknown_field") from None
        raise invalid(
            f"{path}: {first['msg']}" if path else first["msg"].removeprefix("Value error, "), field
        ) from None


__all__ = [
    "ApiError", "ChatBody", "ClassifyBody", "CompletionBody", "EmbeddingBody", "GeneratingBody", "RequestBody",
    "TextPair", "read_body",
]  # fmt: skip
