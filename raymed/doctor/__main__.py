"""What is wrong with this machine or with the cluster that is up, before a job finds out.

Every check does what a job would do, and says what to do where it fails. Exit code 0, or 1 where a check failed.
"""

import sys
from dataclasses import dataclass, field

from raymed.cluster import state
from raymed.config import UserError, check_choice, to_dict, to_json
from raymed.doctor.checks import CHECKS
from raymed.doctor.finding import Finding
from raymed.doctor.head import on_head
from raymed.doctor.place import Sweep, find
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
    findings = examine(place, environment, config.only, tell)
    if place.ray is None:
        elsewhere = on_head(cluster, config) if cluster else [NO_CLUSTER]
        for finding in elsewhere:
            tell(finding)
        findings += elsewhere
    is_ok = all(finding.level != "failure" for finding in findings)
    if config.json:
        print(to_json({"ok": is_ok, "findings": [to_dict(finding) for finding in findings]}), end="")
    else:
        show(findings)
    return 0 if is_ok else 1


if __name__ == "__main__":
    import tyro

    try:
        code = main(tyro.cli(Doctor, description=__doc__))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
