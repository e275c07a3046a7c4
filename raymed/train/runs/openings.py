"""How often a test split has been looked at: one file a run, in the storage, for every report that shows its figures.

A test split that is opened again and again becomes a validation split; the count stands beside the figures. A file for
each run, since two machines may report at the same time.
"""

import hashlib
import json
import time
from pathlib import Path

import numpy as np

from raymed.data.dataset import DataSet
from raymed.storage import Mirror, push_file, write_atomic

_FOLDER = "test_openings"


def open_test(storage: Path, data: DataSet, run: str) -> int:
    """Note that a run shows figures of the test split; returns how many runs have done so, this one included.

    The split is known by its images, whatever file or manifest they came from. A run that reports again counts once.
    """
    test = hashlib.sha256(np.sort(data.content[data.splits["test"]]).tobytes()).hexdigest()[:16]
    if mirror := Mirror.of(storage):
        mirror.pull([f"{_FOLDER}/{test}-*"])
    own = storage / _FOLDER / f"{test}-{hashlib.sha256(run.encode()).hexdigest()[:16]}.json"
    if not own.is_file():
        own.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(own, json.dumps({"test": test, "run": run, "time": round(time.time())}) + "\n")
        push_file(own)
    return len(list(own.parent.glob(f"{test}-*.json")))
