"""Nothing of a user's work leaves the machine unasked."""

import os


def telemetry_off() -> None:
    """Ask every library not to report its use; what the user has set in the environment stays.

    To be called before the libraries are imported; processes started later inherit it.
    """
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
