"""What is examined: this machine, the cluster that is up, or the one that the environment names."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from raymed.cluster import state
from raymed.config import check_range


@dataclass(frozen=True)
class Sweep:
    """Trainings that are to run at the same time."""

    trials: int = 0
    """How many at a time; 0: none is planned."""
    workers: int = 1
    """Of each training."""
    cpus_per_worker: int = 1
    gpus_per_worker: float = 0

    def __post_init__(self):
        check_range("--trials", self.trials, 0)
        check_range("--workers", self.workers, 1)
        check_range("--cpus-per-worker", self.cpus_per_worker, 1)
        check_range("--gpus-per-worker", self.gpus_per_worker, 0)


@dataclass(frozen=True)
class Place:
    """Where the checks look. None: there is none."""

    storage: str | None = None
    """A folder or s3://BUCKET/PREFIX; None is the default folder."""
    ray: str | None = None
    """HOST:PORT of a Ray cluster that this machine belongs to."""
    dashboard: str | None = None
    mlflow: str | None = None
    s3: str | None = None
    """URLs."""
    reach: tuple[str, ...] = ()
    """Further URLs that have to be reached."""
    nodes: bool = True
    """Whether to start something on every node."""
    sweep: Sweep = Sweep()
    has_storage: bool = True
    """Whether the storage is this machine's to look at; that of a cluster elsewhere is its head's."""
    has_way: bool = True
    """Whether the cluster's dashboard and MLflow can be asked from here."""

    def services(self) -> dict[str, str]:
        """URL by name of what has to answer."""
        far = {"dashboard": self.dashboard, "MLflow": self.mlflow} if self.has_way else {}
        named = {**far, "S3": self.s3}
        return {name: url for name, url in named.items() if url} | {url: url for url in self.reach}


def find(
    storage: str | None, reach: tuple[str, ...], nodes: bool, sweep: Sweep, cluster: state.Cluster | None
) -> tuple[Place, dict[str, str]]:
    """The place, and the environment that its checks run in: that of the cluster, where one is up, over this one's."""
    environment = dict(os.environ) | (cluster.environment if cluster else {})
    known = cluster.addresses if cluster else {}
    address = environment.get("RAY_ADDRESS") or ""
    is_url = address.startswith(("http://", "https://"))
    if is_url:
        environment.pop("RAY_ADDRESS")  # the jobs' client takes a URL, drivers do not
    is_far = cluster is not None and "ray" not in known
    if is_far:
        # What is set is another cluster's. This one, its sweeps, and its storage, which is a path on its nodes or has
        # keys that they alone know, are looked at on its head (`raymed.doctor.head`).
        address, sweep = "", Sweep()
        environment.pop("RAY_ADDRESS", None)
    has_storage = not is_far or storage is not None
    storage = storage or (None if is_far else environment.get("RAYMED_HOME"))
    place = Place(
        storage=storage,
        ray=known.get("ray") or (None if is_url else address) or None,
        dashboard=known.get("dashboard") or (address if is_url else environment.get("RAY_API_SERVER_ADDRESS")),
        mlflow=known.get("mlflow") or _url(environment.get("MLFLOW_TRACKING_URI")),
        s3=known.get("s3") or _s3(environment, storage),
        reach=reach,
        nodes=nodes,
        sweep=sweep,
        has_storage=has_storage,
    )
    if place.ray:
        environment["RAY_ADDRESS"] = place.ray
    return place, environment


def _url(uri: str | None) -> str | None:
    return uri.rstrip("/") if uri and uri.startswith("http") else None


def _s3(environment: Mapping[str, str], storage: str | None) -> str | None:
    if not (storage or "").startswith("s3://"):
        return None
    own = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    return own or "https://s3.amazonaws.com"
