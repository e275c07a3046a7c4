"""The figures of a replica among Ray's own, so that Prometheus has those of every replica apart.

Whoever asks Ray Serve's proxy for /metrics gets those of one replica, now of this and then of that, and starts one
where there was none. Ray's agent on each node is asked instead: it tells `raymed_NAME` of each replica as
`ray_raymed_serve_NAME`, with the label `replica`.
"""

import threading
from typing import Any

from prometheus_client import CollectorRegistry

EVERY_S = 5.0
"""Ray forgets what nobody has told it for two of its own periods, of 10 s."""
_OWN, _RAYS = "raymed_", "raymed_serve_"


class Mirror:
    """Tells Ray, time and again, what stands in a registry.

    Every sample is a gauge of Ray's, those of counters and the buckets of histograms too: they are cumulative already,
    and Ray's own counters of a replica that has ended would stay for ever.
    """

    def __init__(self, registry: CollectorRegistry, replica: str):
        self.registry, self.replica = registry, replica
        self._gauges: dict[str, Any] = {}
        self._told: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}

    def start(self) -> None:
        """In a thread, for as long as the process lives."""
        threading.Thread(target=self._work, name="raymed-metrics", daemon=True).start()

    def show(self) -> None:
        """Tell all of it now; what is no longer there, such as a version that was exchanged, is 0."""
        new = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
        }
        self._told = dict.fromkeys(self._told, 0.0) | new
        for (name, labels), value in self._told.items():
            self._gauge(name, labels).set(value, {**dict(labels), "replica": self.replica})

    def _gauge(self, name: str, labels: frozenset[tuple[str, str]]) -> Any:
        from ray.util.metrics import Gauge

        if name not in self._gauges:
            keys = tuple(sorted(key for key, _ in labels))
            self._gauges[name] = Gauge(_RAYS + name.removeprefix(_OWN), tag_keys=(*keys, "replica"))
        return self._gauges[name]

    def _work(self) -> None:
        wait = threading.Event()
        while not wait.wait(EVERY_S):
            self.show()
