"""A sweep in Ray Tune's own result format, written from its journal.

`ray.tune.ExperimentAnalysis(FOLDER)`, and whatever else reads Tune's results, opens it: params.json, result.json and
progress.csv a trial, and the state of the experiment.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from raymed.tune.journal import Journal, TrialRecord


def write_tune_results(folder: Path, journal: Journal, metric: str) -> Path:
    """Write, or write again, the folder of a whole sweep; returns it. Needs Ray's library, and no Ray running."""
    from ray.train._internal.storage import StorageContext
    from ray.tune.execution.tune_controller import TuneController

    shutil.rmtree(folder, ignore_errors=True)
    storage = StorageContext(str(folder.parent), experiment_dir_name=folder.name)
    states = [_write_trial(folder, record, storage, metric) for record in journal.trials.values()]
    state = {"trial_data": states, "runner_data": {}, "stats": {}}
    (folder / TuneController.CKPT_FILE_TMPL.format("sweep")).write_text(json.dumps(state))
    return folder


def _write_trial(folder: Path, record: TrialRecord, storage: Any, metric: str) -> Any:
    """The trial's files; returns its part of the experiment's state."""
    import pandas as pd
    from ray.tune.experiment.trial import Trial

    name = f"trial-{record.number:04d}"
    (folder / name).mkdir(parents=True)
    results = [
        {"training_iteration": rung, metric: value, "trial_id": name, "done": rung == max(record.rungs)}
        for rung, value in sorted(record.rungs.items())
    ]
    (folder / name / "params.json").write_text(json.dumps(record.params, indent=2))
    (folder / name / "result.json").write_text("".join(json.dumps(result) + "\n" for result in results))
    pd.DataFrame(results).to_csv(folder / name / "progress.csv", index=False)
    trial = Trial("raymed", config=record.params, trial_id=name, stub=True, storage=storage)
    trial.create_placement_group_factory()
    trial.storage.trial_dir_name = name  # type: ignore[union-attr]
    trial.set_status(Trial.ERROR if record.status == "failed" else Trial.TERMINATED)
    for result in results:
        trial.update_last_result(result)
    return trial.get_json_state()
