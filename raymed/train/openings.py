"""How often a test split has been looked at: one line a run, in the storage, for every report that shows its figures.

A test split that is opened again and again becomes a validation split; the count stands beside the figures.
"""

import hashlib
import json
import time
from pathlib import Path

import numpy as np

from raymed.data.dataset import DataSet
from raymed.storage import Mirror, push_file


def open_test(storage: Path, data: DataSet, run: str) -> int:
    """Note that a run shows figures of the test split; returns how many runs have done so, this one included.

    The split is known by its images, whatever file or manifest they came from. A run that reports again counts once.
    """
    test = hashlib.sha256(np.sort(data.content[data.splits["test"]]).tobytes()).hexdigest()[:16]
    path = storage / "test_openings.jsonl"
    if mirror := Mirror.of(storage):
        mirror.pull([path.name])
    lines = path.read_text().splitlines() if path.is_file() else []
    runs = {entry["run"] for entry in map(json.loads, lines) if entry["test"] == test}
    if run not in runs:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps({"test": test, "run": run, "time": round(time.time())}) + "\n")
        push_file(path)
    return len(runs | {run})
