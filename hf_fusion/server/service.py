"""Starts and stops the Hub: in a thread for tests and the demo, blocking for the command line."""

from __future__ import annotations

import logging
import socket
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import uvicorn

from hf_fusion.errors import FusionError
from hf_fusion.server.app import Record, build_app
from hf_fusion.server.store import Store, refuse_foreign
from hf_fusion.server.users import Users

logger = logging.getLogger(__name__)
KEPT_REQUESTS = 10_000
STOP_SECONDS = 2


class HubServer:
    """The embedded Hub in a thread of this process.

    Args:
        root: the Hub's folder; created if missing.
        host: address to listen on.
        port: 0 for any free one.
    """

    def __init__(self, root: Path | str, host: str = "127.0.0.1", port: int = 0) -> None:
        self.root = Path(root)
        self.host = host
        self.port = port
        self.requests: deque[Record] = deque(maxlen=KEPT_REQUESTS)
        self._users = Users(self.root)
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._store: Store | None = None

    @property
    def endpoint(self) -> str:
        """The server's URL, for `HfApi(endpoint=…)` and HF_ENDPOINT."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def token(self, user: str) -> str:
        """Creates a token for a user, who is created if new."""
        return self._users.new_token(user)

    def org(self, name: str, members: list[str]) -> None:
        """Creates an organisation, or adds members to one."""
        self._users.new_org(name, members)

    def start(self) -> HubServer:
        """Starts the server; it accepts requests when this returns.

        Returns:
            This server.

        Raises:
            FusionError: the folder or the port is in use.
        """
        listener = self._open()
        assert self._server is not None
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        while not self._server.started:
            self._thread.join(0.005)
            if not self._thread.is_alive():
                raise FusionError(f"the Hub in {self.root} did not start", hint="see the log above")
        return self

    def stop(self) -> None:
        """Finishes running requests and stops; does nothing if the server is not running."""
        if self._server is not None:
            self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()
        self._close()

    def run(self, on_ready: Callable[[str], None] | None = None) -> None:
        """Serves in this thread until interrupted; ``on_ready`` is called with the endpoint once the server listens."""
        listener = self._open()
        assert self._server is not None
        try:
            if on_ready:
                on_ready(self.endpoint)
            with suppress(KeyboardInterrupt):
                self._server.run([listener])
        finally:
            self._close()

    def _open(self) -> socket.socket:
        self._store = Store(self.root)
        try:
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
            listener = socket.create_server((self.host, self.port), family=family, backlog=256)
        except OSError as error:
            self._close()
            raise FusionError(
                f"cannot listen on {self.host} port {self.port}: {error.strerror}",
                hint="let the Hub choose a free port: --port 0",
            ) from error
        # Accepted connections inherit it. asyncio does not set it here, and each response would take 40 ms longer.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            build_app(self._store, self.requests),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=STOP_SECONDS,
        )
        self._server = uvicorn.Server(config)
        return listener

    def _close(self) -> None:
        if self._store is not None:
            self._store.close()
        self._server = self._thread = self._store = None

    def __enter__(self) -> HubServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def serve(
    root: Path | str,
    host: str = "127.0.0.1",
    port: int = 0,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serves a Hub folder until interrupted.

    Args:
        root: the folder; created if missing.
        host: address to listen on.
        port: 0 for any free one.
        on_ready: called with the endpoint once it listens.

    Raises:
        FusionError: the folder or the port is in use.
    """
    HubServer(root, host, port).run(on_ready)


def add_user(root: Path | str, name: str) -> str:
    """Creates a token for a user of a Hub folder, also while a server uses the folder.

    Args:
        root: the Hub's folder.
        name: of the user, who is created if new.

    Returns:
        The token. Only its hash is stored, so it cannot be shown again.

    Raises:
        FusionError: the folder is not a Hub's.
    """
    refuse_foreign(Path(root))
    return Users(Path(root)).new_token(name)
