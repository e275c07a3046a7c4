"""Send a job to the cluster: the project folder is uploaded, and the job runs there on the head node.

The job is run by the cluster's own `python`, with the environment that Ray's nodes were started with: storage, MLflow
and keys are the cluster's, and nothing of them travels with the job. Its working directory is a copy that goes with it;
whatever should last belongs in the storage.
"""

import logging
import re
import secrets
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raymed.cluster import jobs
from raymed.cluster.state import Cluster
from raymed.config import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

LIMIT = 100 * 2**20
"""Bytes of a project folder: every node fetches all of it, from the memory of the head."""
_STOP_SECONDS = 60  # from SIGTERM, at which a training stops after a checkpoint, to SIGKILL
_SHOWN = 5


def submit(cluster: Cluster, job: str, flags: Sequence[str] = (), *, wait: bool = True) -> int:
    """Run a job on the cluster.

    job: its file, in the project folder, which is the current one. flags: of the job.
    wait: print what it writes until it ends; else return at once.

    Returns the job's own exit code; 0 where it is not waited for. Raises UserError for a job that is not there, a
    folder that is too large, a cluster that cannot be reached and a token that is refused; nothing runs then.
    """
    project = Path.cwd()
    script = _script(project, job)
    with jobs.settled(cluster):
        size = checked_size(project)
    with jobs.client(cluster) as ray:
        name = _sent(ray, project, script, flags)
        print(f"{name} is submitted, with {size / 1e6:.1f} MB of files", flush=True)
        if wait:
            return jobs.followed(ray, name)
        print(f"to follow it: python -m raymed.cluster logs {name} --follow", flush=True)
        return 0


def _script(project: Path, job: str) -> Path:
    """The job's file, relative to the project folder."""
    path = (project / job).resolve()
    if not path.is_file():
        there = sorted(str(found.relative_to(project)) for found in project.glob("jobs/*.py"))
        raise UserError(f"there is no job {job!r} in {project}; there are {', '.join(there) or 'no jobs/*.py'}")
    if not path.is_relative_to(project.resolve()):
        raise UserError(f"{job} lies outside {project}, which is what the cluster gets: go to its project folder")
    return path.relative_to(project.resolve())


def checked_size(project: Path) -> int:
    """Bytes of what would be uploaded. Raises UserError above LIMIT, naming the largest folders."""
    sizes: Counter[str] = Counter()
    for path, size in _files(project):
        sizes[_shown(path)] += size
    total = sizes.total()
    if total > LIMIT:
        largest = "\n".join(f"  {size / 2**20:8.0f} MiB  {place}" for place, size in sizes.most_common(_SHOWN))
        raise UserError(
            f"{project} is too large to be sent to every node: {total / 2**20:.0f} MiB, at most {LIMIT / 2**20:.0f}. "
            f"The largest places in it:\n{largest}\n"
            f"Name what a job does not need in {project / '.rayignore'}, which is written as a .gitignore is. Data "
            "belong in the cluster's storage, or in a folder that all nodes see, given with its absolute path."
        )
    return total


def _shown(path: Path) -> str:
    """The folder that a file is counted with: at most two levels deep."""
    return f"{Path(*path.parts[: min(2, len(path.parts) - 1)])}/" if len(path.parts) > 1 else str(path)


def _files(project: Path) -> list[tuple[Path, int]]:
    """What Ray would upload, by its own rules (.gitignore, .rayignore, its defaults): relative paths and bytes."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env import packaging

    found = []

    def visit(path: Path) -> None:
        if path.is_file():
            found.append((path.relative_to(project), path.stat().st_size))

    left_out = packaging._get_excludes(project, get_runtime_env_default_excludes())
    packaging._dir_travel(project, [left_out], visit, include_gitignore=True, logger=logging.getLogger(__name__))
    return found


def _sent(ray: "JobSubmissionClient", project: Path, script: Path, flags: Sequence[str]) -> str:
    """Upload the folder and start the job; its name. `exec`: signals and exit code are the job's, not a shell's."""
    name = f"{re.sub(r'[^A-Za-z0-9_]+', '-', script.stem)}-{secrets.token_hex(3)}"
    environment = {
        "working_dir": str(project),
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_SECONDS)},
    }
    command = f"exec python -u {shlex.join([str(script), *flags])}"
    return ray.submit_job(entrypoint=command, runtime_env=environment, submission_id=name)
