"""What is wrong with this machine or with the cluster that is up, before a job finds out.

Every check does what a job would do, and says what to do where it fails. Exit code 0, or 1 where a check failed.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from raymed.cluster import state
from raymed.command import exit_code
from raymed.config import check_choice, to_dict, to_json
from raymed.doctor.checks import CHECKS
from raymed.doctor.finding import Finding
from raymed.doctor.head import on_head, way
from raymed.doctor.place import Place, Sweep, find
from raymed.doctor.report import row, show
from raymed.doctor.runner import examine

NO_CLUSTER = Finding("ok", "no cluster is up, or named by RAY_ADDRESS: this machine alone was looked at", name="Ray")


@dataclass(frozen=True)
class Doctor(Sweep):
    """--trials with --workers, --cpus-per-worker and --gpus-per-worker ask whether so many trainings have room."""

    json: bool = False
    """Print JSON for scripts."""
    nodes: bool = True
    """Start something on every node of the cluster too."""
    storage: str | None = None
    """A folder or s3://BUCKET/PREFIX; default: that of the cluster (of one elsewhere on its head alone), else
    $RAYMED_HOME."""
    reach: tuple[str, ...] = ()
    """Further URLs that have to be reached, and whose certificates have to be believed."""
    only: tuple[str, ...] = field(default=())
    """Names of checks, where not all are wanted."""


def main(config: Doctor) -> int:
    """Run the checks, print what they find and return the exit code."""
    for name in config.only:
        check_choice("--only", name, [check.name for check in CHECKS])
    sweep = Sweep(config.trials, config.workers, config.cpus_per_worker, config.gpus_per_worker)
    cluster = state.load()
    place, environment = find(config.storage, config.reach, config.nodes, sweep, cluster)
    tell = (lambda finding: None) if config.json else row
    if cluster is not None and place.ray is None:
        findings = _far(cluster, place, environment, config, tell)
    else:
        findings = examine(place, environment, config.only, tell)
        findings += _told([NO_CLUSTER] if place.ray is None else [], tell)
    is_ok = all(finding.level != "failure" for finding in findings)
    if config.json:
        print(to_json({"ok": is_ok, "findings": [to_dict(finding) for finding in findings]}), end="")
    else:
        show(findings)
    return 0 if is_ok else 1


def _far(
    cluster: state.Cluster,
    place: Place,
    environment: Mapping[str, str],
    config: Doctor,
    tell: Callable[[Finding], None],
) -> list[Finding]:
    """Of this machine beside a cluster elsewhere, and of that one's head, unless there is no way to it."""
    with way(cluster) as problem:
        if problem is not None:
            alone = replace(place, has_way=False)
            return [*_told([problem], tell), *examine(alone, environment, config.only, tell)]
        here = examine(place, environment, config.only, tell)
        reopened = state.load() or cluster
        return [*here, *_told(on_head(reopened, config), tell)]


def _told(findings: list[Finding], tell: Callable[[Finding], None]) -> list[Finding]:
    for finding in findings:
        tell(finding)
    return findings


if __name__ == "__main__":
    import tyro

    sys.exit(exit_code(lambda: main(tyro.cli(Doctor, description=__doc__))))
