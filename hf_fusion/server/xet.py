"""The upload half of the Xet protocol (huggingface.co/docs/xet), which clients with hf_xet use for large files.

Such a client cuts files into chunks, packs those into *xorbs*, uploads these, then a *shard* that says which chunks
make up which file. The Hub needs files, not chunks: when the shard comes, each file is put together, checked against
its sha256 and kept like any other large file; xorbs are thrown away. Downloads go over plain HTTP.

Every token leads to an address of its own. A client remembers which chunks it has sent to an address and never sends
them twice; on a fresh address it takes nothing for granted that this Hub no longer has.
"""

from __future__ import annotations

import re
import secrets
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from hf_fusion.server.access import Endpoint, Kind, ReadableRepo, SignedIn, StoreDep
from hf_fusion.server.errors import HubError
from hf_fusion.server.files import IncomingFile, remove_tree
from hf_fusion.server.limits import MAX_XORB, stream
from hf_fusion.server.repo import Repo
from hf_fusion.server.store import Store

router = APIRouter()

SESSION = re.compile(r"[0-9a-f]{32}")
HASH = re.compile(r"[0-9a-f]{64}")
MAX_CHUNK = 1 << 20  # clients keep to 128 KiB
IDLE_SECONDS = 3600  # after which the xorbs of an upload are thrown away
TOKEN_SECONDS = 24 * 3600

ENTRY = 48  # every record of a shard
BOOKEND = b"\xff" * 32
WITH_VERIFICATION, WITH_SHA256 = 1 << 31, 1 << 30
PLAIN, LZ4, GROUPED_LZ4 = 0, 1, 2


@dataclass(frozen=True)
class Piece:
    """A run of chunks of one xorb."""

    xorb: str
    first: int
    last: int


@dataclass(frozen=True)
class ShardFile:
    """A file as a shard describes it."""

    sha256: str
    pieces: tuple[Piece, ...]


# --- routes ------------------------------------------------------------------------------------------------------


@router.get("/api/{kind}/{owner}/{name}/xet-{access}-token/{rev}")
def xet_token(
    access: str, repo: ReadableRepo, user: SignedIn, store: StoreDep, request: Request, endpoint: Endpoint
) -> JSONResponse:
    """An address for one upload, and the token it takes."""
    _forget_idle(store)
    url = f"{endpoint}/xet/{repo.kind}/{repo.name}/{secrets.token_hex(16)}"
    token = request.app.state.signer.sign(f"xet:{repo.kind}/{repo.name}")
    expires = int(time.time()) + TOKEN_SECONDS
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
    return JSONResponse({"casUrl": url, "accessToken": token, "exp": expires}, headers=headers)


@router.get("/xet/{kind}/{owner}/{name}/{session}/v1/chunks/{prefix}/{chunk}")
def known_chunk(kind: Kind, owner: str, name: str, session: str) -> None:
    """Clients ask for chunks of other uploads; there are none."""
    raise HubError(404, "no such chunk")


@router.post("/xet/{kind}/{owner}/{name}/{session}/v1/xorbs/default/{xorb}")
async def put_xorb(
    kind: Kind, owner: str, name: str, session: str, xorb: str, request: Request, store: StoreDep
) -> dict[str, bool]:
    """Store a xorb until its shard arrives."""
    repo = _authorised(store, request, kind, f"{owner}/{name}")
    if not HASH.fullmatch(xorb):
        raise HubError(400, f"{xorb!r} is not a hash")
    folder = _folder(store, repo, session)
    part = folder / f"{secrets.token_hex(8)}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            async for chunk in stream(request, MAX_XORB):
                file.write(chunk)
        part.replace(folder / xorb)
    except OSError:  # a full disk: the upload is over
        await run_in_threadpool(remove_tree, folder)
        raise
    finally:
        part.unlink(missing_ok=True)
    return {"was_inserted": True}


@router.post("/xet/{kind}/{owner}/{name}/{session}/v1/shards")
@router.post("/xet/{kind}/{owner}/{name}/{session}/shards")
async def put_shard(
    kind: Kind, owner: str, name: str, session: str, request: Request, store: StoreDep
) -> dict[str, int]:
    """Assemble the files of a shard from its xorbs."""
    repo = _authorised(store, request, kind, f"{owner}/{name}")
    shard = b"".join([chunk async for chunk in stream(request, MAX_XORB)])
    folder = _folder(store, repo, session)
    try:
        await run_in_threadpool(_assemble, shard, folder, repo, store.scratch)
    except (struct.error, IndexError, FileNotFoundError, pyarrow.ArrowException, ValueError) as error:
        raise HubError(400, f"the shard cannot be read or names xorbs that never arrived: {error!r}") from error
    except OSError:  # a full disk: the upload is over
        await run_in_threadpool(remove_tree, folder)
        raise
    return {"result": 1}


def _authorised(store: Store, request: Request, kind: str, name: str) -> Repo:
    repo = store.get(kind, name)
    token = request.headers.get("authorization", "").removeprefix("Bearer ")
    request.app.state.signer.check(f"xet:{repo.kind}/{repo.name}", token)
    return repo


# --- on disk -----------------------------------------------------------------------------------------------------


def _folder(store: Store, repo: Repo, session: str) -> Path:
    if not SESSION.fullmatch(session):
        raise HubError(400, f"{session!r} is not the id of an upload")
    return store.scratch / "xet" / f"{repo.kind}-{repo.name.replace('/', '-')}-{session}"


def _forget_idle(store: Store) -> None:
    """Remove uploads that were idle for an hour."""
    for folder in (store.scratch / "xet").glob("*"):
        if time.time() - folder.stat().st_mtime > IDLE_SECONDS:
            remove_tree(folder)


def _assemble(shard: bytes, folder: Path, repo: Repo, scratch: Path) -> None:
    indexes: dict[str, list[XorbChunk]] = {}
    for wanted in read_shard(shard):
        if repo.large_path(wanted.sha256).exists():
            continue
        with IncomingFile(scratch) as incoming:
            for piece in wanted.pieces:
                xorb = folder / piece.xorb
                if piece.xorb not in indexes:
                    indexes[piece.xorb] = index_xorb(xorb)
                for data in read_chunks(xorb, indexes[piece.xorb][piece.first : piece.last]):
                    incoming.write(data)
            repo.add_large(incoming, wanted.sha256)


# --- formats -----------------------------------------------------------------------------------------------------


def read_shard(shard: bytes) -> Iterator[ShardFile]:
    """The files a shard describes.

    Args:
        shard: header, then for each file a record of its own, its pieces, their check sums, its sha256; all records
            are 48 bytes, the last one starts with 32 times 0xff.
    """
    position = ENTRY
    while (record := shard[position : position + ENTRY])[:32] != BOOKEND:
        flags, count = struct.unpack_from("<II", record, 32)
        pieces = []
        for n in range(1, count + 1):
            start = position + n * ENTRY
            _, _, first, last = struct.unpack_from("<IIII", shard, start + 32)
            pieces.append(Piece(_hex(shard[start : start + 32]), first, last))
        position += ENTRY * (1 + count + (count if flags & WITH_VERIFICATION else 0))
        if not flags & WITH_SHA256:
            raise ValueError("a file without sha256")
        yield ShardFile(_hex(shard[position : position + 32]), tuple(pieces))
        position += ENTRY


def _hex(digest: bytes) -> str:
    """Xet writes a hash as four little-endian numbers of 64 bits."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


@dataclass(frozen=True)
class XorbChunk:
    """Position and compression of a chunk in a xorb."""

    start: int
    packed: int
    scheme: int
    size: int


def index_xorb(path: Path) -> list[XorbChunk]:
    """All chunks of a xorb, in order."""
    chunks = []
    with path.open("rb") as file:
        end = path.stat().st_size
        # a chunk's header: version 0, three bytes packed size, scheme, three bytes size; what follows is the footer
        while len(header := file.read(8)) == 8 and header[0] == 0:
            packed, size = int.from_bytes(header[1:4], "little"), int.from_bytes(header[5:8], "little")
            start = file.tell()
            if size > MAX_CHUNK or start + packed > end:
                raise ValueError("a chunk too large")
            chunks.append(XorbChunk(start, packed, header[4], size))
            file.seek(packed, 1)
    return chunks


def read_chunks(path: Path, chunks: list[XorbChunk]) -> Iterator[bytes]:
    """The content of some chunks."""
    with path.open("rb") as file:
        for chunk in chunks:
            file.seek(chunk.start)
            yield unpack(file.read(chunk.packed), chunk.scheme, chunk.size)


def unpack(data: bytes, scheme: int, size: int) -> bytes:
    """Decompress a chunk."""
    if scheme != PLAIN:
        data = pyarrow.decompress(data, decompressed_size=size, codec="lz4", asbytes=True)
    if len(data) != size:
        raise ValueError("a chunk of another size than announced")
    if scheme == GROUPED_LZ4:
        data = _ungroup(data)
    return data


def _ungroup(data: bytes) -> bytes:
    """Bytes 0, 4, 8 … come first, then 1, 5, 9 …, and so on: puts them back in order."""
    result = bytearray(len(data))
    position = 0
    for n in range(4):
        count = len(range(n, len(data), 4))
        result[n::4] = data[position : position + count]
        position += count
    return bytes(result)
