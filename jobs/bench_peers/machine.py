"""What the figures of a benchmark depend on."""

import os
import platform
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Processors, load before the measurement, and versions."""
    return {
        "cpus": os.cpu_count(),
        "load of the last minute": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
