"""What Prometheus sees of a service."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from replan.serve.engine import Health

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class Metrics:
    """Counters of one app, in a registry of its own, so that two apps in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "replan_requests", "Requests by route and HTTP status.", ("route", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "replan_request_seconds", "Seconds from the first byte to the answer.", ("route",),
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.stages = Histogram(
            "replan_stage_seconds", "Seconds per stage of finished work; queue is the wait before it.", ("stage",),
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.inside = Gauge("replan_inside", "Requests inside: read, waiting or under way.", registry=self.registry)
        self.waiting = Gauge("replan_waiting", "Requests in the queue.", registry=self.registry)
        self.running = Gauge("replan_running", "Batches under way.", registry=self.registry)
        self.workers = Gauge("replan_workers", "Workers that live.", registry=self.registry)
        self.ready = Gauge("replan_ready", "1 when the service is ready.", registry=self.registry)

    def done(self, route: str, status: int, seconds: float) -> None:
        """A request is over."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def worked(self, timings: Mapping[str, float]) -> None:
        """A piece of work is finished."""
        for stage, seconds in timings.items():
            self.stages.labels(stage).observe(seconds)

    def page(self, health: Health) -> bytes:
        """The text that Prometheus scrapes."""
        self.waiting.set(health.waiting)
        self.running.set(health.running)
        self.workers.set(health.workers)
        self.ready.set(health.state == "ready")
        return generate_latest(self.registry)
