"""Starts and stops the server: in a thread for tests, blocking for the command line."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

import uvicorn

from hf_fusion.errors import FusionError
from hf_fusion.serving.app import Limits, build_app
from hf_fusion.serving.served import ServedModel

STOP_SECONDS = 30  # for running requests, once the server is to stop


class ModelServer:
    """A model's server in a thread of this process.

    Args:
        served: the model.
        host: address to listen on.
        port: 0 for any free one.
        limits: of requests.
        stop_seconds: how long running requests may take when the server is to stop.
    """

    def __init__(
        self,
        served: ServedModel,
        host: str = "127.0.0.1",
        port: int = 0,
        limits: Limits | None = None,
        stop_seconds: int = STOP_SECONDS,
    ) -> None:
        self.host, self.port = host, port
        config = uvicorn.Config(
            build_app(served, limits),
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=stop_seconds,
        )
        self._server = uvicorn.Server(config)
        self._thread: threading.Thread | None = None

    @property
    def endpoint(self) -> str:
        """The server's URL; OpenAI's clients take it with ``/v1``."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def start(self) -> ModelServer:
        """Starts the server; it accepts requests when this returns.

        Raises:
            FusionError: the port is in use.
        """
        listener = self._listen()
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        while not self._server.started:
            self._thread.join(0.005)
            if not self._thread.is_alive():
                raise FusionError("the server did not start", "see the log above")
        return self

    def stop(self) -> None:
        """Finishes running requests, and stops."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()

    def run(self, on_ready: Callable[[str], None] | None = None) -> None:
        """Serves in this thread until interrupted or terminated; running requests are finished first.

        Args:
            on_ready: called with the endpoint once the port is open.

        Raises:
            FusionError: the port is in use.
        """
        listener = self._listen()
        if on_ready:
            on_ready(self.endpoint)
        with suppress(KeyboardInterrupt):
            self._server.run([listener])

    def _listen(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            listener = socket.create_server((self.host, self.port), family=family, backlog=256)
        except OSError as error:
            raise FusionError(
                f"cannot listen on {self.host} port {self.port}: {error.strerror}",
                "let the server choose a free port: --port 0",
            ) from error
        # Accepted connections inherit it. asyncio does not set it here, and each chunk would wait for the one before.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port = listener.getsockname()[1]
        return listener

    def __enter__(self) -> ModelServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


__all__ = ["STOP_SECONDS", "ModelServer"]
