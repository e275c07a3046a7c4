"""summary.json: what a job did and found, in one file that any tool can read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raymed.config import to_json
from raymed.storage import write_atomic


def write_summary(
    path: Path,
    job: str,
    config: Any,
    figures: Mapping[str, Any],
    mlflow: Mapping[str, Any],
    paths: Mapping[str, Any],
    **extra: Any,
) -> Path:
    """Write summary.json, whole or not at all, and return its path.

    Args:
        path: of the file; its folder exists.
        job: name of the job, such as "compare_losses".
        config: the resolved config, a dataclass.
        figures: metric -> figure {mean, std, n, ci_low, ci_high, num_patients, ...}, nested under as many names as the
            job needs: `figures[METHOD]["test"]["auroc"]["mean"]`.
        mlflow: tracking URI, experiment and run ids.
        paths: what the job wrote, by name.
        extra: further top-level keys, such as best="supcon_asl".

    The file is strict JSON: a number that is not finite, such as the standard deviation of one seed, is null.
    """
    summary = {"job": job, "config": config, "figures": figures, "mlflow": mlflow, "paths": paths} | extra
    write_atomic(path, to_json(summary))
    return path
