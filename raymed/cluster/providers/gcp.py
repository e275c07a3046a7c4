"""On Google Cloud: an on-demand head, spot GPU workers, Cloud Storage. What a project needs once: cluster/gcp-once.sh

No machine has an address of its own outside: SSH, dashboard and MLflow come through Identity-Aware Proxy.
"""

import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from raymed.cluster.providers import Line, launcher
from raymed.cluster.providers.launcher import PROJECT, Launch
from raymed.cluster.state import Cluster
from raymed.config import UserError

_PROGRAMS = {
    "ssh": "apt install openssh-client",
    "rsync": "apt install rsync",
    "gcloud": "the Google Cloud command line",
}
_MOUNT = "/mnt/raymed"  # of the bucket, on every machine


@dataclass(frozen=True)
class Config:
    """Flags of `up gcp`.

    bucket: of Cloud Storage, without gs://; every machine mounts it.
    project: default: that of the credentials.
    zone: where, such as europe-west4-a.
    max_workers: at most so many worker machines; default: as before, at first what the file says.
    file: the cluster's file.
    """

    bucket: str
    zone: str
    project: str | None = None
    max_workers: int | None = None
    file: Path = PROJECT / "cluster" / "gcp.yaml"


def up(config: Config) -> Cluster:
    """See `launcher.up`. Raises UserError, before anything starts, for missing credentials or programs."""
    return launcher.up(prepare(config))


def prepare(config: Config) -> Launch:
    """Everything that can be known before a machine is started. Raises UserError."""
    if not config.bucket or ":" in config.bucket or "/" in config.bucket:
        raise UserError(f"--bucket must be a bucket's plain name, without gs://, got {config.bucket!r}")
    region, dash, letter = config.zone.rpartition("-")
    if not (dash and len(letter) == 1 and "-" in region):
        raise UserError(f"--zone must be one such as europe-west4-a, got {config.zone!r}")
    project = _project(config.project)
    if find_spec("googleapiclient") is None:
        raise UserError(
            "`ray up` on Google Cloud needs a package: pip install --editable '.[gcp]' in the project folder"
        )
    launcher.need(*_PROGRAMS, by=_PROGRAMS)
    values = {"google_project": project, "region": region, "zone": config.zone}
    variables = {"RAYMED_HOME": _MOUNT, "RAYMED_BUCKET": config.bucket}
    place = {"project": project, "zone": config.zone}
    return Launch(
        "gcp",
        config.file,
        values,
        variables,
        place,
        machines=lambda: machines(project, config.zone),
        end=lambda names: _end(names, project, config.zone),
        max_workers=config.max_workers,
    )


def status(cluster: Cluster) -> Sequence[Line]:
    """See `launcher.status`."""
    return launcher.status(cluster)


def down(cluster: Cluster) -> None:
    """End all of it. Raises UserError where machines are left, or cannot be looked for; it is then still remembered."""

    def check() -> None:
        project, zone = _place(cluster)
        left = machines(project, zone)
        if left:
            raise UserError(
                f"machines are left, and cost: {_end(left, project, zone)}, then take the cluster down again"
            )

    launcher.down(cluster, check)


def reached(cluster: Cluster) -> AbstractContextManager[str]:
    """See `launcher.reached`."""
    return launcher.reached(cluster)


def logs(cluster: Cluster) -> Mapping[str, Callable[[], str]]:
    """See `launcher.logs`."""
    return launcher.logs(cluster)


def machines(project: str, zone: str) -> list[str]:
    """Names of the cluster's machines that run or will, and of those that are stopped. One that is being deleted is not
    among them. Raises UserError where gcloud cannot say."""
    words = ["gcloud", "--quiet", "compute", "instances", "list", f"--project={project}", f"--zones={zone}"]
    words += ["--filter=labels.ray-cluster-name=raymed AND status!=STOPPING", "--format=value(name)"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"gcloud could not look for the cluster's machines ({done.stderr.strip()[-500:]}), and they cost: mend "
            "that and try again"
        )
    return done.stdout.split()


def _end(names: Sequence[str], project: str, zone: str) -> str:
    return f"gcloud compute instances delete {' '.join(names)} --project={project} --zone={zone}"


def _place(cluster: Cluster) -> tuple[str, str]:
    """Project and zone. One that an earlier version brought up has them in the launcher's file alone."""
    import yaml

    if place := cluster.facts.get("place"):
        return place["project"], place["zone"]
    provider = yaml.safe_load(Path(cluster.facts["file"]).read_text())["provider"]
    return provider["project_id"], provider["availability_zone"]


def _project(given: str | None) -> str:
    """The project, with credentials that Google takes. Raises UserError for none, or others."""
    import google.auth
    from google.auth.exceptions import GoogleAuthError
    from google.auth.transport.requests import Request

    how = "gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS"
    try:
        credentials, project = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
        credentials.refresh(Request())
    except (GoogleAuthError, ValueError, OSError) as error:
        raise UserError(f"Google Cloud has no credentials of this machine ({error}): {how}") from None
    if not (given or project):
        raise UserError("no Google Cloud project: give --project")
    return given or str(project)
