"""Measurements of a server in Prometheus' format, collected in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vlduet.serve.statistics import WorkerStatistics

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Upper bounds of the histograms of times."""


class ServerMetrics:
    """Counters, gauges and histograms of one server; two servers share nothing."""

    def __init__(self) -> None:
        """Start all counters at zero."""
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "vlduet_requests",
            "Requests that have ended, by route and status.",
            ["route", "status"],
            registry=self.registry,
        )
        self._in_progress = Gauge(
            "vlduet_requests_in_progress", "Requests in progress.", registry=self.registry
        )
        self._seconds = Histogram(
            "vlduet_request_seconds",
            "Time from the head of a request to the end of its response.",
            ["route"],
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self._first_byte_seconds = Histogram(
            "vlduet_first_byte_seconds",
            "Time from the head of a request to the first byte of its response's body.",
            ["route"],
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )

    def track_request(self) -> AbstractContextManager[None]:
        """Return a context during which a request counts as in progress."""
        return self._in_progress.track_inprogress()

    def count_request(
        self, *, route: str, status: int, seconds: float, first_byte_seconds: float | None
    ) -> None:
        """Count a request that has ended; without a response `first_byte_seconds` is None."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
        if first_byte_seconds is not None:
            self._first_byte_seconds.labels(route).observe(first_byte_seconds)

    def add_worker(
        self,
        read_statistics: Callable[[], WorkerStatistics],
        count_documents: Callable[[], int] | None = None,
    ) -> None:
        """Report a model's thread, and the documents of an index, at the time of each request."""
        self.registry.register(_WorkerCollector(read_statistics, count_documents))

    def format(self) -> bytes:
        """Return all measurements in Prometheus' text format."""
        return generate_latest(self.registry)


class _WorkerCollector(Collector):
    """Source of measurements that others count; it reads them when they are requested."""

    def __init__(
        self,
        read_statistics: Callable[[], WorkerStatistics],
        count_documents: Callable[[], int] | None,
    ):
        self.read_statistics, self.count_documents = read_statistics, count_documents

    def collect(self) -> Iterator[Metric]:
        """Yield the measurements as they are now."""
        now = self.read_statistics()
        chats = GaugeMetricFamily("vlduet_chats", "Chats, by state.", labels=["state"])
        chats.add_metric(["running"], now.running_chats)
        chats.add_metric(["waiting"], now.waiting_chats)
        yield chats
        yield GaugeMetricFamily(
            "vlduet_waiting_embedding_items",
            "Texts and images that wait for being embedded.",
            value=now.waiting_embedding_items,
        )
        for name, text, value in (
            ("generated_tokens", "Tokens of answers.", now.generated_tokens),
            ("retrieved_images", "Images of the index in answers.", now.retrieved_images),
            ("embedded_items", "Texts and images that were embedded.", now.embedded_items),
            (
                "refused_requests",
                "Requests refused because too many were waiting.",
                now.refused_requests,
            ),
        ):
            yield CounterMetricFamily(f"vlduet_{name}", text, value=value)
        if self.count_documents is not None:
            yield GaugeMetricFamily(
                "vlduet_index_documents", "Documents of the index.", value=self.count_documents()
            )
