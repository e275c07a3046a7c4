"""The variables of an on-prem cluster's services, and so of jobs: those that raymed sets, those that reach the bucket,
and those that the user adds (`--environment`).

The last ones are meant for the hosts: paths, proxies and interfaces there. Clients on this machine do not get them.
"""

import dataclasses
import os
import secrets
from collections.abc import Collection, Mapping
from pathlib import Path

from raymed.cluster.services import mlflow
from raymed.cluster.state import Cluster
from raymed.cluster.variables import read_variables
from raymed.config import UserError

GCS, MLFLOW = 6379, 5000
BUNDLES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
_OF_BUCKET = (  # what belongs together in a line
    ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    ("AWS_ENDPOINT_URL",),
    ("AWS_REGION", "AWS_DEFAULT_REGION"),
)
_OF_UNITS = ("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "MLFLOW_DISABLE_TELEMETRY")  # an EnvironmentFile would come first


def of_clients(storage: str, addresses: Mapping[str, str], token: Path, before: Cluster | None) -> dict[str, str]:
    """The environment of whoever talks to the cluster from this machine. The password stays what it was."""
    password = before.environment["MLFLOW_TRACKING_PASSWORD"] if before else secrets.token_urlsafe(24)
    return {
        "RAYMED_HOME": storage.rstrip("/"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_API_SERVER_ADDRESS": addresses["dashboard"],
        "MLFLOW_TRACKING_URI": addresses["mlflow"],
        "MLFLOW_TRACKING_USERNAME": mlflow.USER,
        "MLFLOW_TRACKING_PASSWORD": password,
    } | _of_bucket(storage, before)


def _of_bucket(storage: str, before: Cluster | None) -> dict[str, str]:
    """What reaches the bucket, if that is the storage: this shell's or, where it has none, what the cluster has for
    it. A profile of this machine's means nothing to others."""
    if not storage.startswith("s3://"):
        return {}
    known = before.environment if before else {}
    if known.get("RAYMED_HOME") != storage.rstrip("/"):
        known = {}
    found: dict[str, str] = {}
    for names in _OF_BUCKET:
        source = os.environ if any(os.environ.get(name) for name in names) else known
        found |= {name: source[name] for name in names if source.get(name)}
    return found


def of_user(path: Path | None, before: Cluster | None) -> dict[str, str]:
    """What a file adds or, where none is given, what the cluster has of an earlier one. Raises UserError for a file
    that cannot be read, and for a bundle that each host would look for elsewhere."""
    if path is None:
        return dict(before.facts.get("variables", {})) if before else {}
    found = read_variables(path, "--environment")
    for name, bundle in bundles(found).items():
        if not os.path.isabs(bundle):
            raise UserError(f"--environment {path}: {name} must be an absolute path on the hosts, got {bundle!r}")
    return found


def bundles(variables: Mapping[str, str]) -> dict[str, str]:
    """Those that name certificates on the hosts."""
    return {name: variables[name] for name in BUNDLES if variables.get(name)}


def check_free(variables: Collection[str], cluster: Cluster) -> None:
    """Raises UserError for names that raymed sets itself: two values would be worse than none."""
    own = {*cluster.environment, *_of_raymed("", cluster), *_OF_UNITS}
    if cluster.environment["RAYMED_HOME"].startswith("s3://"):
        own |= {name for names in _OF_BUCKET for name in names}
    if taken := sorted(own.intersection(variables)):
        raise UserError(
            f"--environment may not set {', '.join(taken)}: raymed does so itself, for a bucket from this shell's "
            "variables; leave these lines out"
        )


def untried(cluster: Cluster, before: Cluster) -> Cluster:
    """The cluster with the environment of before, until hosts have found the new one good."""
    facts = cluster.facts | {"variables": before.facts.get("variables", {})}
    return dataclasses.replace(cluster, environment=before.environment, facts=facts)


def of_services(venv: str, cluster: Cluster) -> dict[str, str]:
    """The environment of all services, and so of jobs."""
    return cluster.facts.get("variables", {}) | _of_raymed(venv, cluster)


def _of_raymed(venv: str, cluster: Cluster) -> dict[str, str]:
    """What clients have, as it is seen from a host, and where things lie there."""
    client = {name: value for name, value in cluster.environment.items() if name != "RAY_API_SERVER_ADDRESS"}
    return client | {
        "PATH": f"{venv}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "RAYMED_LOCAL": "/var/lib/raymed/local",
        "RAY_AUTH_TOKEN_PATH": "/etc/raymed/token",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "raymed.serve.on_ray:around_proxy",
        "MLFLOW_TRACKING_URI": f"http://{cluster.facts['head']}:{MLFLOW}",
    }
