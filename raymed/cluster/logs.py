"""What the cluster's jobs and parts have written."""

import sys

from raymed.cluster import jobs, providers
from raymed.cluster.state import Cluster
from raymed.config import UserError


def logs(cluster: Cluster, name: str | None = None, *, follow: bool = False) -> int:
    """Print the log of a job, the last one unless it is named, or the last lines of a part of the cluster.

    follow: of a job, go on until it ends.

    Returns 0; with `follow`, the job's exit code. Raises UserError for a name that neither has, and for a part that is
    to be followed.
    """
    of_a_job = name is None or jobs.NAME.fullmatch(name)
    parts = {} if of_a_job else dict(providers.provider(cluster.provider).logs(cluster))
    if name is not None and name in parts:
        if follow:
            raise UserError(f"{name} is a part of the cluster: only a job is followed until it ends")
        sys.stdout.write(_whole_lines(parts[name]))
        return 0
    with jobs.client(cluster) as ray:
        found = jobs.found(ray, name, others=list(parts))
        if follow:
            return jobs.followed(ray, found)
        print(f"{found}: {ray.get_job_status(found).lower()}", file=sys.stderr, flush=True)
        sys.stdout.write(_whole_lines(ray.get_job_logs(found)))
        return 0


def stop(cluster: Cluster, name: str | None = None) -> int:
    """Ask a job, the last one that runs unless it is named, to stop; a training does so after a checkpoint, and what
    has not ended after a minute is killed. Returns 0, also where it had ended already."""
    with jobs.client(cluster) as ray:
        found = jobs.found(ray, name, prefer_running=True)
        was_running = ray.stop_job(found)
        print(f"{found} {'is asked to stop' if was_running else 'had ended already'}", flush=True)
    return 0


def _whole_lines(text: str) -> str:
    return text if not text or text.endswith("\n") else f"{text}\n"
