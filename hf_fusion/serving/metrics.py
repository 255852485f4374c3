"""What `/metrics` shows, in Prometheus' format."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        at: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("hf_fusion_requests", "Requests", ("endpoint", "status"), **at)
        self.seconds = Histogram(
            "hf_fusion_request_seconds", "Until the last byte", ("endpoint",), buckets=SECONDS, **at
        )
        self.prompt_tokens = Counter("hf_fusion_prompt_tokens", "Tokens read", **at)
        self.generated_tokens = Counter("hf_fusion_generated_tokens", "Tokens generated", **at)
        self.waiting = Gauge("hf_fusion_waiting_rows", "Rows in the queue", **at)
        self.running = Gauge("hf_fusion_running_rows", "Rows in the running batch", **at)
        self.batches = Histogram("hf_fusion_batch_rows", "Rows of a batch", buckets=SIZES, **at)

    def text(self) -> bytes:
        """The current values."""
        return generate_latest(self.registry)


__all__ = ["Metrics"]
