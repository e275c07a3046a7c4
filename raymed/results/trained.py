"""The clinical page of a training: what the model of its best seed is worth on the test split, case by case."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from raymed.bundle import Bundle
from raymed.data.dataset import DataSet
from raymed.report.clinical_page import write_clinical_page
from raymed.results.clinical import clinical_record
from raymed.results.model import median_unit
from raymed.results.paper_facts import write_facts
from raymed.tasks.predictor import Predictor
from raymed.tracking import environment
from raymed.train.runs.job import Job
from raymed.train.unit import Unit, unit_data


def write_evaluation(job: Job, units: Sequence[Unit], monitored: str = "auprc") -> Path | None:
    """Write evaluation.html and facts.json of the median seed on validation, neither the luckiest nor the unluckiest;
    returns the page's path, or None where a seed is not finished.

    Pictures are shown, and the page is logged, only of sets that are marked deidentified.
    """
    if not all(unit.result() for unit in units):
        return None
    unit = median_unit(units, monitored)
    data, bundle = cast(DataSet, unit_data(unit)), Bundle.load(unit.folder / "bundle")
    record = clinical_record(
        Predictor.from_bundle(bundle, str(job.config.compute.resolved_device())),
        data,
        data.splits["test"],
        title=f"{job.kind.replace('_', ' ')}: {job.name}",
        about=f"Test split, {unit.name} (the median of {len(units)})" if len(units) > 1 else "Test split",
        pictures=job.recipe.data.deidentified,
    )
    record = replace(
        record, command=job.command, config=job.config, environment=environment(), notes=[*record.notes, *data.notes]
    )
    page = write_clinical_page(job.folder / "evaluation", record)
    write_facts(job.folder, record, unit.key)
    if job.recipe.data.deidentified:
        job.outbox.artifact(page)
    return page
