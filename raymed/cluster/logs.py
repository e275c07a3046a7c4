"""What the cluster's jobs and parts have written."""

import sys

from raymed.cluster import jobs, providers
from raymed.cluster.state import Cluster
from raymed.config import UserError


def logs(cluster: Cluster, name: str | None = None, *, follow: bool = False) -> int:
    """Print the log of a job, the last one unless it is named, or the last lines of a part of the cluster.

    name: of a job or a part; of parts that several hosts have, PART@HOST is one, PART and HOST are all of that name.
    follow: of a job, go on until it ends.

    Returns 0; with `follow`, the job's exit code. Raises UserError for a part that is to be followed and, with the
    names of all parts, for a name that neither has and where the dashboard does not answer.
    """
    parts = providers.provider(cluster.provider).logs(cluster)
    named = [part for part in parts if name in _names(part)]
    if named and follow:
        raise UserError(f"{name} is a part of the cluster: only a job is followed until it ends")
    for part in named:
        if len(named) > 1:
            print(f"==> {part} <==")
        sys.stdout.write(_whole_lines(parts[part]()))
    if named:
        return 0
    try:
        return _of_job(cluster, name, follow)
    except UserError as error:
        if not parts:
            raise
        raise UserError(f"{error}\nparts that have a log: {', '.join(parts)}") from None


def _names(part: str) -> set[str]:
    """All that a part answers to: PART@HOST, PART, without "raymed-" too, and HOST."""
    service, _, host = part.partition("@")
    return {part, service, service.removeprefix("raymed-"), host or part}


def _of_job(cluster: Cluster, name: str | None, follow: bool) -> int:
    with jobs.client(cluster) as ray:
        found = jobs.found(ray, name)
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
