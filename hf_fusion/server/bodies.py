"""The JSON bodies of requests, with the protocol's names; other bodies get 400."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Base64Bytes, BaseModel, Field

Size = Annotated[int, Field(ge=0, lt=1 << 53)]


class RepoBody(BaseModel):
    """A repo to create or to delete."""

    name: str
    organization: str | None = None
    type: Literal["model", "dataset", "space"] = "model"
    visibility: str | None = None
    private: bool = False
    sdk: str | None = None


class MoveBody(BaseModel):
    """A repo's old and new name."""

    fromRepo: str  # noqa: N815 - the protocol's name
    toRepo: str  # noqa: N815
    type: Literal["model", "dataset", "space"] = "model"


class SettingsBody(BaseModel):
    """Settings to change; what is absent stays."""

    gated: Literal["auto", "manual", False] | None = None
    visibility: str | None = None
    private: bool | None = None


class VariableBody(BaseModel):
    """A variable of a Space to set."""

    key: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    value: str
    description: str | None = None


class KeyBody(BaseModel):
    """A variable of a Space by name."""

    key: str


class UserBody(BaseModel):
    """A user by name."""

    user: str


class BranchBody(BaseModel):
    """Where a new branch starts."""

    startingPoint: str = "main"  # noqa: N815


class TagBody(BaseModel):
    """A new tag, annotated if it has a message."""

    tag: str
    message: str | None = None


class CardBody(BaseModel):
    """A card to check."""

    content: str = ""


class PreuploadFile(BaseModel):
    """A file about to be pushed, and how it begins."""

    path: str
    size: Size
    sample: Base64Bytes = b""


class PreuploadBody(BaseModel):
    """The files of a push, and its .gitignore if it brings one."""

    files: list[PreuploadFile]
    gitIgnore: str | None = None  # noqa: N815


class LfsObject(BaseModel):
    """A large file by its sha256."""

    oid: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    size: Size


class LfsBatchBody(BaseModel):
    """Large files to send or to fetch."""

    operation: Literal["upload", "download"] = "upload"
    objects: list[LfsObject]


class CollectionBody(BaseModel):
    """A new collection."""

    title: Annotated[str, Field(min_length=1, max_length=200)]
    namespace: str | None = None
    description: str | None = None
    private: bool = False


class CollectionChange(BaseModel):
    """Properties of a collection to change; what is absent stays."""

    title: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    description: str | None = None
    private: bool | None = None
    theme: str | None = None
    position: int | None = None


class Item(BaseModel):
    """A repo, as collections name it."""

    id: str
    type: Literal["model", "dataset", "space", "paper", "collection"]


class ItemBody(BaseModel):
    """A repo to put into a collection."""

    item: Item
    note: str | None = None


class ItemChange(BaseModel):
    """What to change about an item; what is absent stays."""

    note: str | None = None
    position: int | None = None
