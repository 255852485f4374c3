"""The HTTP server: OpenAI's endpoints, `/classify`, `/health` and `/metrics`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from hf_fusion.io.pictures import PictureError, open_picture
from hf_fusion.serving.answers import AnswerFormat, classes, embeddings
from hf_fusion.serving.batcher import Batcher
from hf_fusion.serving.bodies import (
    ChatBody,
    ClassifyBody,
    CompletionBody,
    EmbeddingBody,
    GeneratingBody,
    RequestBody,
    TextPair,
    read_body,
)
from hf_fusion.serving.engine import engine_of
from hf_fusion.serving.errors import ApiError, invalid
from hf_fusion.serving.metrics import Metrics
from hf_fusion.serving.rows import AnswerRow, Delta, Inbox, ReadRow, Row, Sampling
from hf_fusion.serving.served import ANSWERS, CLASSES, EMBEDDINGS, ServedModel

MOST_TEXT_BYTES, MOST_IMAGE_BYTES = 8_000_000, 64_000_000  # of a request
UNKNOWN = "unknown"  # endpoint of requests to other paths, in the metrics


@dataclass(frozen=True)
class Limits:
    """What a server takes; more is refused.

    Attributes:
        rows: of a batch.
        waiting: rows in the queue.
        tokens: of an answer; the default of a chat.
        seconds: from a request to its whole answer.
    """

    rows: int = 16
    waiting: int = 256
    tokens: int = 2048
    seconds: float = 300.0


class Api:
    """The endpoints of one model.

    Args:
        served: the model.
        limits: of requests.
    """

    def __init__(self, served: ServedModel, limits: Limits) -> None:
        self.served, self.limits, self.metrics = served, limits, Metrics()
        shares_weights = bool(getattr(served.model.config, "batch_reduce", False))  # rows would change each other
        self.batcher = Batcher(engine_of(served), 1 if shares_weights else limits.rows, limits.waiting, self.metrics)
        self.created = int(time.time())

    # ---------------------------------------------------------------- endpoints

    def models(self) -> dict[str, Any]:
        """`/v1/models`."""
        return {"object": "list", "data": [self._card()]}

    def model(self, name: str) -> dict[str, Any]:
        """`/v1/models/{name}`."""
        self._check_model(name)
        return self._card()

    async def complete(self, request: Request) -> Response:
        """`/v1/completions`."""
        body = await self._read(request, CompletionBody, ANSWERS)
        prompts = [self.served.prompt(given) for given in body.prompts]
        form = AnswerFormat(self.served.name, False, body.logprobs, body.with_usage)
        return await self._generate(request, body, prompts, body.max_tokens, body.logprobs, form)

    async def chat(self, request: Request) -> Response:
        """`/v1/chat/completions`."""
        body = await self._read(request, ChatBody, ANSWERS)
        if body.top_logprobs is not None and not body.logprobs:
            raise invalid("top_logprobs goes with logprobs: true", "top_logprobs")
        prompt = self.served.chat([message.plain() for message in body.messages])
        alternatives = (body.top_logprobs or 0) if body.logprobs else None
        form = AnswerFormat(self.served.name, True, alternatives, body.with_usage)
        most = body.max_completion_tokens or body.max_tokens
        return await self._generate(request, body, [prompt], most, alternatives, form)

    async def embed(self, request: Request) -> Response:
        """`/v1/embeddings`."""
        body = await self._read(request, EmbeddingBody, EMBEDDINGS)
        if body.encoding_format not in ("float", "base64", None):
            raise invalid(f"encoding_format is {body.encoding_format!r}, not float or base64", "encoding_format")
        inbox = Inbox()
        rows = [
            ReadRow(inbox, index, self._size(text), {"text": text}, routing=body.routing)
            for index, text in enumerate(body.texts)
        ]
        await self._finished(request, inbox, rows)
        return JSONResponse(embeddings(self.served.name, rows, body.encoding_format == "base64"))

    async def classify(self, request: Request) -> Response:
        """`/classify`."""
        body = await self._read(request, ClassifyBody, CLASSES)
        config: Any = self.served.model.config
        if body.task is not None:
            known = [row["name"] for row in config.experts] if self.served.family == "wemoe" else []
            if body.task not in known:
                which = f"it has {', '.join(known)}" if known else "it has one head"
                raise invalid(f"the model has no task {body.task!r}: {which}", "task")
        inbox = Inbox()
        rows: list[ReadRow] = []
        for index, given in enumerate(body.inputs):
            inputs = await asyncio.to_thread(self._inputs_of, given)
            size = 0 if "images" in inputs else self._size(*inputs.values())
            rows.append(ReadRow(inbox, index, size, inputs, body.task, body.routing))
        await self._finished(request, inbox, rows)
        return JSONResponse(classes(self.served.name, rows, config.problem_type))

    def health(self) -> dict[str, str]:
        """`/health`: that the server answers."""
        return {"status": "ok", "model": self.served.name}

    # ---------------------------------------------------------------- requests

    async def _read(self, request: Request, kind: type[Any], what: str) -> Any:
        """The body of a request to an endpoint that gives `what`."""
        most, content = MOST_IMAGE_BYTES if self.served.reads_images else MOST_TEXT_BYTES, b""
        async for part in request.stream():
            content += part
            if len(content) > most:
                raise ApiError(413, f"the request is larger than {most:,} bytes", "too_large")
        body: RequestBody = read_body(kind, content)
        if body.model is not None:
            self._check_model(body.model)
        if self.served.kind != what:
            raise invalid(f"{self.served.name} gives {self.served.kind}, and this endpoint {what}", "model")
        return body

    def _check_model(self, name: str) -> None:
        if name != self.served.name:
            raise ApiError(404, f"there is no model {name!r}; there is {self.served.name}", "model_not_found", "model")

    def _card(self) -> dict[str, Any]:
        head = {"id": self.served.name, "object": "model", "created": self.created, "owned_by": "hf_fusion"}
        return {**head, **self.served.describe()}

    def _size(self, *texts: str) -> int:
        """Tokens of a text, or of a pair; too many are refused, not cut off."""
        size = max(len(tokenizer(*texts)["input_ids"]) for tokenizer in self.served.tokenizers)
        if not size:
            raise invalid("a text is empty", "input")
        if self.served.context is not None and size > self.served.context:
            message = f"an input has {size} tokens, and the model reads {self.served.context}"
            raise invalid(message, "input", "context_length_exceeded")
        return size

    def _inputs_of(self, given: str | TextPair) -> dict[str, Any]:
        if isinstance(given, TextPair):
            if self.served.reads_images:
                raise invalid("the model reads images, not texts", "input")
            return {"text": given.text, "text_pair": given.text_pair}
        if not self.served.reads_images:
            return {"text": given}
        if not given.startswith("data:"):
            raise invalid("the model reads images: send data:image/png;base64,…", "input")
        try:
            return {"images": open_picture(given).convert("RGB")}
        except PictureError as error:
            raise invalid(str(error), "input") from error

    async def _generate(
        self,
        request: Request,
        body: GeneratingBody,
        prompts: Sequence[list[list[int]]],
        most: int | None,
        alternatives: int | None,
        form: AnswerFormat,
    ) -> Response:
        if most is not None and most > self.limits.tokens:
            raise invalid(f"{most} tokens were asked for; this server gives at most {self.limits.tokens}", "max_tokens")
        inbox, answers = Inbox(), body.n or 1
        rows: list[AnswerRow] = []
        sampling = Sampling(
            max_tokens=0,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            stops=body.stops,
            logprobs=alternatives,
            presence=body.presence_penalty or 0.0,
            frequency=body.frequency_penalty or 0.0,
            bias=body.bias(min(map(len, self.served.tokenizers))),
            routing=body.routing,
            streams=bool(body.stream),
        )
        for prompt in prompts:
            room = self.served.room(prompt)
            if room is not None and most is not None and most > room:
                raise invalid(
                    f"{most} tokens were asked for, and the model has room for {room} after the prompt",
                    "max_tokens",
                    "context_length_exceeded",
                )
            tokens = most or min(self.limits.tokens, room or self.limits.tokens)
            for number in range(answers):
                seed = None if body.seed is None else body.seed + number
                options = replace(sampling, max_tokens=tokens, seed=seed)
                rows.append(AnswerRow(inbox, len(rows), max(map(len, prompt)), prompt, options))
        if not body.stream:
            await self._finished(request, inbox, rows)
            return JSONResponse(form.whole(rows, answers))
        self.batcher.submit(rows)
        return StreamingResponse(self._streamed(inbox, rows, answers, form), media_type="text/event-stream")

    async def _finished(self, request: Request, inbox: Inbox, rows: Sequence[Row]) -> None:
        """Waits until all rows are done; gives up if the client has gone."""
        self.batcher.submit(rows)
        waiting = asyncio.ensure_future(_all_done(inbox, rows))
        leaving = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait((waiting, leaving), timeout=self.limits.seconds, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise ApiError(499, "the client has gone", "gone") if leaving.done() else self._late()
            waiting.result()
        finally:
            waiting.cancel()
            leaving.cancel()
            for row in rows:
                row.cancelled = True

    async def _streamed(
        self, inbox: Inbox, rows: Sequence[AnswerRow], answers: int, form: AnswerFormat
    ) -> AsyncIterator[str]:
        """Server-sent events. The status was sent before: an error is the last event."""
        end = time.monotonic() + self.limits.seconds
        try:
            for row in rows:
                if first := form.first(row):
                    yield _event(first)
            left = len(rows)
            while left:
                try:
                    news: tuple[Row, Any] = await asyncio.wait_for(inbox.get(), max(0.0, end - time.monotonic()))
                except asyncio.TimeoutError:
                    raise self._late() from None
                sender, grown = news
                row = rows[sender.index]
                if row.error is not None:
                    raise row.error
                if isinstance(grown, Delta):
                    yield _event(form.part(row, grown.text, grown.scores))
                else:
                    left -= 1
                    yield _event(form.last(row))
            if form.with_usage:
                yield _event(form.usage(rows, answers))
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body())
        finally:
            for row in rows:
                row.cancelled = True

    def _late(self) -> ApiError:
        return ApiError(503, f"the answer was not ready after {self.limits.seconds:g} seconds", "timeout")


def build_app(served: ServedModel, limits: Limits | None = None) -> FastAPI:
    """The application that serves a model; its lifespan starts and stops the thread of the model.

    Args:
        served: the model.
        limits: of requests.
    """
    api = Api(served, limits or Limits())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        api.batcher.start()
        yield
        await asyncio.to_thread(api.batcher.stop)

    app = FastAPI(title="hf_fusion", lifespan=lifespan, openapi_url=None)
    app.state.api = api
    for path, endpoint in (("/v1/models", api.models), ("/v1/models/{name:path}", api.model), ("/health", api.health)):
        app.add_api_route(path, endpoint, methods=["GET"])
    posts: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/v1/completions": api.complete,
        "/v1/chat/completions": api.chat,
        "/v1/embeddings": api.embed,
        "/classify": api.classify,
    }
    for path, answer in posts.items():
        app.add_api_route(path, answer, methods=["POST"], response_model=None)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(api.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(ApiError)
    def refuse(request: Request, error: ApiError) -> Response:
        headers = {"Retry-After": "1"} if error.status == 503 else None
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(404)
    @app.exception_handler(405)
    def no_endpoint(request: Request, error: Any) -> Response:
        known = ", ".join(["/v1/models", *posts, "/health", "/metrics"])
        return refuse(request, ApiError(error.status_code, f"there is no {request.method} {request.url.path}: {known}"))

    app.add_middleware(_Counting, metrics=api.metrics)
    return app


class _Counting:
    """Counts requests by endpoint and status, and measures them until the last byte."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.monotonic(), 500

        async def observed(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, observed)
        finally:
            route = scope.get("route")
            endpoint = getattr(route, "path", UNKNOWN)
            self.metrics.requests.labels(endpoint, str(status)).inc()
            self.metrics.seconds.labels(endpoint).observe(time.monotonic() - begin)


async def _all_done(inbox: Inbox, rows: Sequence[Row]) -> None:
    for _ in rows:
        row, _ = await inbox.get()
        if row.error is not None:
            raise row.error


async def _gone(request: Request) -> None:
    """Returns when the client closes the connection; its whole body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(content: Any) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


__all__ = ["Api", "Limits", "build_app"]
