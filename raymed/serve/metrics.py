"""What the server measures of itself, for Prometheus: in a registry of its own, so that several servers may share a
process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from raymed.serve.engine import Engine
    from raymed.serve.models import Models

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64)
_SCORES = tuple(i / 20 for i in range(1, 21))
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
"""A client may make up others, without end."""


class Metrics:
    """Counters and histograms of one server. Labels are what the server was told, never what a client sent."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry}
        self._stages = Histogram(
            "raymed_stage_seconds",
            "decode, prepare: of a file; queue, network: of an image and a batch; total: of a request",
            ["stage", "model"],
            buckets=_SECONDS,
            **made,
        )
        self._batches = Histogram(
            "raymed_batch_images", "Images that went through a network at once", ["model"], buckets=_SIZES, **made
        )
        self._scores = Histogram(
            "raymed_score", "Probability of the positive class of a case", ["model", "alias"], buckets=_SCORES, **made
        )
        self._decisions = Counter(
            "raymed_decisions", "Answers by what they decide", ["model", "alias", "decision"], **made
        )
        self._undecoded = Counter("raymed_decode_errors", "Files that no image came of", ["model", "status"], **made)
        self._requests = Counter("raymed_requests", "Requests", ["method", "route", "status"], **made)
        self._refused = Counter("raymed_refused_versions", "Versions that were not used", ["model", "alias"], **made)
        self._loaded = Counter("raymed_loaded_versions", "Versions that came into use", ["model", "alias"], **made)
        self._unkept = Counter("raymed_not_kept", "Answers that should have been kept and were not", **made)

    def watch(self, models: Models, engine: Engine) -> None:
        """Show, whenever somebody looks, what is loaded and what waits."""
        self.registry.register(_State(models, engine))

    def observe(self, stage: str, model: str, seconds: float, size: int) -> None:
        """Time of a stage: decode, prepare, queue, network, total; size: of its batch."""
        self._stages.labels(stage, model).observe(seconds)
        if stage == "network":
            self._batches.labels(model).observe(size)

    def told(self, event: str, model: str, **what: Any) -> None:
        """A version was loaded or refused."""
        counter = {"loaded": self._loaded, "refused": self._refused}.get(event)
        if counter is not None:
            counter.labels(model, what.get("alias", "")).inc()

    def answered(self, model: str, alias: str, result: Any) -> None:
        """An answer left; alias: of the version that gave it, champion or challenger."""
        if result.decision is not None:
            self._decisions.labels(model, alias, result.decision).inc()
        probability = getattr(result, "probability", None)
        if probability is not None:
            self._scores.labels(model, alias).observe(probability)

    def undecoded(self, model: str, status: int) -> None:
        """A file was refused."""
        self._undecoded.labels(model, str(status)).inc()

    def counted(self, method: str, route: str, status: int) -> None:
        """A request ended; route: its template, or "" where there is none: the method then says
        nothing either."""
        self._requests.labels(method if route and method in _METHODS else "", route, str(status)).inc()

    def not_kept(self) -> None:
        """An answer could not be written down."""
        self._unkept.inc()

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)


class _State(Collector):
    """Read off the server when it is asked for, in whatever thread, so that it cannot be out of date."""

    def __init__(self, models: Models, engine: Engine):
        self.models, self.engine = models, engine

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Of every model: images that wait, whether it is ready, and its versions."""
        waiting = GaugeMetricFamily("raymed_queue_images", "Images that wait or are in a network", labels=["model"])
        ready = GaugeMetricFamily("raymed_ready", "1 where the model answers", labels=["model"])
        labels = ["model", "alias", "version", "bundle"]
        loaded = GaugeMetricFamily("raymed_model_info", "Versions in use", labels=labels)
        refused = GaugeMetricFamily("raymed_refused", "1 where a version is not used", labels=["model", "alias"])
        for name, served in self.models.served.items():  # which stays as it is; versions do not
            waiting.add_metric([name], self.engine.waiting.get(name, 0))
            ready.add_metric([name], float("champion" in served.versions and self.engine.computes))
            for alias, live in list(served.versions.items()):
                loaded.add_metric([name, alias, live.origin.version, live.origin.digest[:12]], 1)
            for alias in list(served.refused):
                refused.add_metric([name, alias], 1)
        yield from (waiting, ready, loaded, refused)
