"""summary.json: what a job did and found, in one file that any tool can read."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from raymed.config import to_dict
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
    summary = {"job": job, "config": to_dict(config), "figures": figures, "mlflow": mlflow, "paths": paths} | extra
    write_atomic(path, json.dumps(_strict(summary), indent=2, allow_nan=False) + "\n")
    return path


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(inner) for inner in value]
    if isinstance(value, np.generic):
        return _strict(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return os.fspath(value) if isinstance(value, os.PathLike) else value
