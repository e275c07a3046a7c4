"""Checks on every node of a cluster before workers start: what is amiss there becomes one clear message here.

One Ray task a node, on none of its CPUs, all at once. A node that does not answer in time is named: nothing waits for
ever. On a cluster of one node, which the driver is on too, there is nothing to compare. Nodes without CPUs for work, as
some heads are, are left out.
"""

import hashlib
import shlex
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from raymed.config import UserError
from raymed.data.locations import Location, as_location, near
from raymed.data.manifest import DataConfig, read_manifest
from raymed.storage import remote_of, resolve_storage
from raymed.tracking.mlflow import artifacts_of, resolve_uri

PATIENCE = 120.0
"""Seconds that a node may take to answer; the first task there starts a process and imports what it needs."""
SAMPLE = 20
_SHARE_SECONDS = 10.0  # a network share may show a new file late
_DATA_ADVICE = (
    "put the data on a folder that every node sees under the same absolute path, or in a bucket (--data.manifest "
    "s3://BUCKET/FOLDER/manifest.csv)"
)
_STORAGE_ADVICE = (
    "give a folder that every node sees under the same path, as on a network share, or a bucket (--storage "
    "s3://BUCKET/FOLDER)"
)
T = TypeVar("T")


@dataclass(frozen=True)
class _Seen:
    """What the driver sees, for every node to compare."""

    storage: Path
    remote: str | None
    """The bucket's folder that it is the working copy of."""
    token: Path
    """A new file in it."""
    manifest: Location
    digest: str
    images: tuple[Location, ...]


def check_versions(patience: float = PATIENCE) -> None:
    """Raise UserError where a node has another Python, torch, Ray or raymed than this process; of raymed its files
    count, not only its version. Needs a connected Ray, as all checks here."""
    if len(_nodes()) < 2:
        return
    found = _ask(_described(), patience)
    lines = []
    for name, mine in _described()().items():
        others = [f"{theirs[name]} on {node}" for node, theirs in found.items() if theirs[name] != mine]
        lines += [f"  {name}: {mine} here, {', '.join(others)}"] if others else []
    if lines:
        advice = "install the same on every node, or start the job with a runtime environment that brings it"
        raise UserError("\n".join(["the nodes of this cluster do not run the same:", *lines, advice]))


def check_nodes(storage: Path, data: DataConfig, patience: float = PATIENCE) -> None:
    """Check that every node sees what the driver sees: the manifest, a sample of its images, and one storage.

    Where the storage is a working copy of a bucket, every node must reach the bucket; its own working copy may be
    anywhere.

    Args:
        storage: as `raymed.storage.resolve_storage` gives it.

    Raises:
        UserError: what is amiss on which node, and what to do; a node does not answer within `patience` seconds.
    """
    if len(_nodes()) < 2:
        return
    with _token(storage) as token:
        manifest = as_location(data.manifest)
        seen = _Seen(storage, remote_of(storage), token, manifest, _digest(manifest), _sample(data))
        found = _ask(_look, patience, seen)
    lines = []
    for part, advice in (("data", _DATA_ADVICE), ("storage", _STORAGE_ADVICE)):
        amiss = [f"  node {node}: {problem}" for node, problems in found.items() for problem in problems[part]]
        lines += [*amiss, advice] if amiss else []
    if lines:
        raise UserError("\n".join(["not every node of this cluster sees what this one sees:", *lines]))


def check_tracking(tracking: str | None, storage: Path) -> None:
    """Raise UserError where the runs of a cluster of several machines would be kept in an sqlite file.

    Only the driver writes MLflow, but the next job's driver may be on another machine: it would not see the file, and
    over a network share sqlite must not be written. Several nodes on one machine may have one.

    tracking, storage: as `raymed.tracking.Tracker` has them.
    """
    uri = resolve_uri(tracking, storage)
    machines = {node["NodeManagerAddress"] for node in _nodes()}
    if len(machines) < 2 or not uri.startswith("sqlite"):
        return
    place = artifacts_of(storage).removeprefix("file://")
    server = f"http://{_address()}:5000"
    raise UserError(
        f"a cluster of {len(machines)} machines needs an MLflow server: a job whose driver is on another machine would "
        f"not see the runs in {uri}, and sqlite must not be written over a network share. Start one here:\n"
        f"  mlflow server --backend-store-uri {shlex.quote(uri)} --artifacts-destination {shlex.quote(place)} "
        "--host 0.0.0.0 --port 5000\n"
        f"and name it: --tracking {server}, or MLFLOW_TRACKING_URI={server}. Whoever reaches the port can read and "
        "change the runs; with --app-name basic-auth (pip install 'mlflow[auth]') it asks for a name and a password, "
        "which jobs take from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    )


def _nodes() -> list[dict[str, Any]]:
    """The live nodes that work can be placed on."""
    import ray

    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


def _address() -> str:
    """Of this machine, as the cluster knows it."""
    import ray.util

    return ray.util.get_node_ip_address()


def _ask(look: Callable[..., T], patience: float, *arguments: Any) -> dict[str, T]:
    """What a function returns on each node, by the node's name.

    Raises UserError that names the nodes that cannot run it, or do not answer in time.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote = ray.remote(num_cpus=0, max_retries=0)(look)
    asked = {}
    for node in _nodes():
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[remote.options(scheduling_strategy=strategy).remote(*arguments)] = node
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=patience)
    amiss = [f"  node {_name(asked[reference])}: no answer within {patience:g} s" for reference in late]
    answers = {}
    for reference in late:
        ray.cancel(reference, force=True)
    for reference in done:
        node = asked[reference]
        try:
            answers[_name(node)] = ray.get(reference)
        except RayError as error:
            if node["NodeID"] in {
                other["NodeID"] for other in _nodes()
            }:  # an autoscaler may have taken an idle one away
                amiss.append(f"  node {_name(node)}: {_cause(error)}")
    if amiss:
        raise UserError("\n".join(["not every node of this cluster can be asked:", *amiss]))
    return answers


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']}, {node['NodeID'][:8]})"


def _cause(error: Exception) -> str:
    """The last line of a remote error, which says what it was."""
    return str(error).strip().splitlines()[-1][:300]


def _described() -> Callable[[], dict[str, str]]:
    """A function that says which versions a process has. As an inner function it travels whole: it runs also where
    raymed is missing, or another one."""

    def versions() -> dict[str, str]:
        import hashlib
        import importlib.metadata
        import importlib.util
        import platform
        from pathlib import Path

        found = {"python": platform.python_version()}
        for name in ("torch", "ray"):
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = "none"
        found["torch"] = found["torch"].partition("+")[0]  # a head without a GPU has the build for processors
        spec = importlib.util.find_spec("raymed")
        if spec is None or not spec.submodule_search_locations:
            return found | {"raymed": "none"}
        folder = Path(spec.submodule_search_locations[0])
        digest = hashlib.sha256()
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
        return found | {"raymed": f"files {digest.hexdigest()[:8]}"}

    return versions


@contextmanager
def _token(storage: Path) -> Iterator[Path]:
    """A new file in the storage, while the nodes look for it."""
    path = storage / f".nodes-{uuid.uuid4().hex}"
    path.touch()
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _sample(data: DataConfig) -> tuple[Location, ...]:
    """Files of images that are there for the driver: first, last, and evenly between."""
    paths = list(dict.fromkeys(source.path for source in read_manifest(data).table["source"]))
    chosen = np.unique(np.linspace(0, len(paths) - 1, SAMPLE).round().astype(int))
    return tuple(paths[i] for i in chosen if _is_there(paths[i]))


def _digest(manifest: Location) -> str:
    return hashlib.sha256(near(manifest).read_bytes()).hexdigest()


def _look(seen: _Seen) -> dict[str, list[str]]:
    """Runs on a node: what is amiss there."""
    return {"data": _told_by(_look_at_data, seen), "storage": _told_by(_look_at_storage, seen)}


def _told_by(look: Callable[[_Seen], list[str]], seen: _Seen) -> list[str]:
    try:
        return look(seen)
    except (UserError, OSError) as error:
        return [str(error)]


def _look_at_data(seen: _Seen) -> list[str]:
    if not _is_there(seen.manifest):
        return [f"there is no manifest {seen.manifest}"]
    if _digest(seen.manifest) != seen.digest:
        return [f"the manifest {seen.manifest} is another one"]
    missing = [path for path in seen.images if not _is_there(path)]
    if not missing:
        return []
    return [f"{len(missing)} of {len(seen.images)} sampled images are missing or empty, such as {missing[0]}"]


def _look_at_storage(seen: _Seen) -> list[str]:
    if seen.remote is not None:
        resolve_storage(seen.remote)  # wherever its own working copy is
        return []
    until = time.monotonic() + _SHARE_SECONDS
    while not seen.token.is_file():
        if time.monotonic() > until:
            return [f"the storage {seen.storage} is not this one's"]
        time.sleep(0.2)
    tempfile.TemporaryFile(dir=seen.storage).close()
    return []


def _is_there(location: Location) -> bool:
    """Whether a file is not empty, here or in its bucket."""
    if isinstance(location, Path) and location.is_file():
        return location.stat().st_size > 0
    url = location if isinstance(location, str) else remote_of(location)
    if url is None:
        return False
    from raymed.storage.s3 import stat

    found = stat(url)
    return found is not None and found.size > 0
