"""Batches of waiting rows, one after the other, in the one thread that uses the model."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from hf_fusion.errors import first_line
from hf_fusion.serving.errors import ApiError
from hf_fusion.serving.metrics import Metrics
from hf_fusion.serving.rows import AnswerRow, Row

logger = logging.getLogger(__name__)

GATHER = 0.01  # seconds that a batch waits for rows of the clients that were just answered


class Batcher:
    """A bounded queue of rows, and the thread that runs them.

    A batch takes what waits. After a batch of several rows the next one waits `GATHER` seconds for as many: their
    clients send the next requests at nearly the same time. A client that is alone never waits.

    Args:
        run: runs a batch; afterwards all its rows are done.
        most_rows: of a batch.
        most_waiting: rows in the queue; more are refused.
        metrics: of the server.
    """

    def __init__(
        self, run: Callable[[Sequence[Row]], None], most_rows: int, most_waiting: int, metrics: Metrics
    ) -> None:
        self._run, self.most_rows, self.most_waiting, self.metrics = run, most_rows, most_waiting, metrics
        self._waiting: deque[Row] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._running: Sequence[Row] = ()
        self._last = 1  # rows of the last batch
        self._thread = threading.Thread(target=self._loop, name="model", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, rows: Sequence[Row]) -> None:
        """Puts all rows of a request into the queue, or none.

        Raises:
            ApiError: 400 for more than the queue can ever hold, 503 if it is full or the server stops.
        """
        if len(rows) > self.most_waiting:
            raise ApiError(
                400, f"{len(rows)} answers were asked for, and the queue holds {self.most_waiting}", "too_large"
            )
        with self._changed:
            if self._stopping:
                raise ApiError(503, "the server is stopping", "stopping")
            if len(self._waiting) + len(rows) > self.most_waiting:
                self._waiting = deque(row for row in self._waiting if not row.ended)
            if len(self._waiting) + len(rows) > self.most_waiting:
                raise ApiError(503, f"{len(self._waiting)} rows are waiting already: try again later", "queue_full")
            self._waiting.extend(rows)
            self.metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    def stop(self) -> None:
        """Refuses what waits, ends what runs, and ends the thread."""
        with self._changed:
            self._stopping = True
            for row in self._waiting:
                row.finish(ApiError(503, "the server is stopping", "stopping"))
            self._waiting.clear()
            for row in self._running:
                row.cancelled = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _take(self) -> list[Row]:
        """The next batch; empty when the thread is to end."""
        with self._changed:
            while not self._waiting and not self._stopping:
                self._changed.wait()
            end = time.monotonic() + GATHER
            while len(self._waiting) < min(self._last, self.most_rows) and not self._stopping:
                if (left := end - time.monotonic()) <= 0 or not self._changed.wait(left):
                    break
            rows: list[Row] = []
            while self._waiting and len(rows) < self.most_rows:
                if not (row := self._waiting.popleft()).ended:
                    rows.append(row)
            self.metrics.waiting.set(len(self._waiting))
            self._running = rows
            return rows

    def _loop(self) -> None:
        while not self._stopping:
            if not (rows := self._take()):
                continue
            self._last = len(rows)
            self.metrics.batches.observe(len(rows))
            self.metrics.running.set(len(rows))
            try:
                self._run(rows)
            except Exception as error:  # the next batch may be better
                logger.exception("a batch of %d rows failed", len(rows))
                self._fail(rows, first_line(error))
            except BaseException as error:
                self._fail(rows, first_line(error))
                raise
            finally:
                self.metrics.running.set(0)
            self._count(rows)

    @staticmethod
    def _fail(rows: Sequence[Row], reason: str) -> None:
        for row in rows:
            row.finish(ApiError(500, f"the model failed: {reason}", "model_error"))

    def _count(self, rows: Sequence[Row]) -> None:
        self.metrics.prompt_tokens.inc(sum(row.size for row in rows))
        self.metrics.generated_tokens.inc(sum(len(row.tokens) for row in rows if isinstance(row, AnswerRow)))


__all__ = ["Batcher"]
