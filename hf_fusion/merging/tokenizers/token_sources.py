"""What a recipe's ``tokenizer`` asks for: a tokenizer, and where the embeddings of its tokens come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from hf_fusion.errors import FusionError
from hf_fusion.schema import Before, Expected, KeyPath, Range, read_class

_GIVEN = Expected("a token", lambda value: value is not None)


@dataclass(frozen=True)
class TokenSource:
    """Where a token's row comes from: from a token of a model, by its text or its number, or zeros.

    Attributes:
        kind: "model_token" or "zero".
        model: as the recipe names it.
        token: its text; token_id: or its number.
    """

    kind: Literal["model_token", "zero"]
    model: Annotated[str | None, Expected("a model", bool)] = None
    token: Annotated[Any, _GIVEN] = None
    token_id: Annotated[Any, _GIVEN] = None

    def check(self, where: KeyPath) -> None:
        """Raises a `FusionError` where it is not clear which row is meant."""
        if self.kind == "zero" and (self.model, self.token, self.token_id) != (None, None, None):
            raise FusionError(f"{where} is zero: it takes no token of a model", "kind: model_token")
        if self.kind == "model_token" and (self.token is None) == (self.token_id is None):
            raise FusionError(f"{where} needs either token or token_id")


@dataclass(frozen=True)
class TokenRequest:
    """A token of the merged tokenizer.

    Attributes:
        source: the model whose row of this token is taken, or another token.
        force: whether models that have the token take that row as well.
    """

    source: Annotated[str | TokenSource, Expected("a model, {kind: model_token, model: …, token: …} or {kind: zero}")]
    force: bool = False


@dataclass(frozen=True)
class TokenizerRequest:
    """A tokenizer.

    Attributes:
        source: "union", "base", or the model whose tokenizer it is.
        tokens: its tokens that come from elsewhere, or that it lacks.
        pad_to_multiple_of: what the number of rows of the embeddings is a multiple of.
    """

    source: Annotated[str, Expected("union, base or a model", bool)] = "union"
    tokens: Annotated[
        dict[Annotated[str, Expected("a string", bool)], TokenRequest], Before(lambda value, where: value or {})
    ] = field(default_factory=dict)
    pad_to_multiple_of: Annotated[int, Range(1, 1 << 16), Before(lambda value, where: value or 1)] = 1


def tokenizer_request(wanted: str | dict[Any, Any], file: str = "") -> TokenizerRequest:
    """What a recipe's ``tokenizer`` says.

    Args:
        wanted: the recipe's.
        file: that it was read from, for errors.

    Raises:
        FusionError: naming the key that is unknown, or whose value is not valid.
    """
    where = KeyPath(file, "tokenizer")
    found = read_class(TokenizerRequest, {"source": wanted} if isinstance(wanted, str) else wanted, where)
    for token, request in found.tokens.items():
        if isinstance(request.source, TokenSource):
            request.source.check(where.inner("tokens", token, "source"))
    return found
