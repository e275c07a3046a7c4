"""What this machine remembers of the cluster that it uses: one folder, for one cluster at a time.

$RAYMED_CLUSTER, else ~/.raymed/cluster
  cluster.json     the provider, addresses, processes and what whoever talks to it needs; for its owner's eyes alone
  logs/            of each process that was started here
  data/            what outlives a cluster, where its provider keeps that here
"""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raymed.config import UserError, from_dict, to_json
from raymed.storage import write_private

FILE = "cluster.json"


@dataclass(frozen=True)
class Process:
    """A process that was started here.

    created: seconds since 1970, of its start (`psutil.Process.create_time`): a PID alone may be somebody else's later.
    """

    name: str
    pid: int
    created: float


@dataclass(frozen=True)
class Cluster:
    """A cluster that is up, or half of one that was being brought up."""

    provider: str
    addresses: dict[str, str] = field(default_factory=dict)
    """For people and programs on this machine: dashboard, mlflow, s3, serve (URLs), ray (HOST:PORT)."""
    environment: dict[str, str] = field(default_factory=dict)
    """Of whoever talks to it from this machine: RAYMED_*, MLFLOW_*, AWS_*, RAY_*, with tokens and passwords."""
    processes: tuple[Process, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    """What its provider needs to know again."""


def folder() -> Path:
    """Where the state lies. It need not exist."""
    return Path(os.environ.get("RAYMED_CLUSTER") or "~/.raymed/cluster").expanduser().absolute()


def load() -> Cluster | None:
    """The cluster that is up, or None. Raises UserError for a file that cannot be read."""
    path = folder() / FILE
    if not path.is_file():
        return None
    try:
        return from_dict(Cluster, json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}): end what it started by hand, then remove it") from None


def required() -> Cluster:
    """`load`, where one must be up. Raises UserError where there is none."""
    cluster = load()
    if cluster is None:
        raise UserError(f"no cluster is up ({folder() / FILE} is not there): make cluster-up PROVIDER=local")
    return cluster


def save(cluster: Cluster) -> None:
    """Remember a cluster, whole or not at all."""
    write_private(folder() / FILE, to_json(dataclasses.asdict(cluster)))


def forget() -> None:
    """No cluster is up any more. Logs stay."""
    (folder() / FILE).unlink(missing_ok=True)
