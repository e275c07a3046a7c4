"""The model of a training, and its clinical page: what the median seed is worth on the test split, case by case."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from raymed.bundle import Bundle
from raymed.data.dataset import DataSet
from raymed.registry.config import RegisterConfig
from raymed.registry.register import Registered
from raymed.report.clinical_page import ClinicalRecord, write_clinical_page
from raymed.results.classifier_model import leave_classifier
from raymed.results.clinical import clinical_record
from raymed.results.model import median_unit
from raymed.results.paper_facts import write_facts
from raymed.tasks.predictor import Predictor
from raymed.tracking import environment
from raymed.train.runs.job import Job
from raymed.train.runs.results import summarise
from raymed.train.unit import Unit, unit_data


def leave_evaluated(
    job: Job, units: Sequence[Unit], config: RegisterConfig, monitored: str = "auprc"
) -> tuple[dict[str, Path], Registered | None]:
    """Leave the model of the median seed on validation, neither the luckiest nor the unluckiest, and write
    evaluation.html and facts.json of that very model on the test split.

    Returns what is where ("model", "evaluation") and the registered version; nothing where a seed is not finished.
    Pictures are shown, and the page is logged, only of sets that are marked deidentified.
    """
    if not all(unit.result() for unit in units):
        return {}, None
    unit = median_unit(units, monitored)
    model, registered = leave_classifier(job, unit, summarise(units), config)
    data, bundle = cast(DataSet, unit_data(unit)), Bundle.load(model)
    record = clinical_record(
        Predictor.from_bundle(bundle, str(job.config.compute.resolved_device())),
        data,
        data.splits["test"],
        title=f"{job.kind.replace('_', ' ')}: {job.name}",
        about=f"Test split, {unit.name} (the median of {len(units)})" if len(units) > 1 else "Test split",
        pictures=job.recipe.data.deidentified,
    )
    return {"model": model, "evaluation": keep_record(job, record, data, bundle.provenance["run_key"])}, registered


def keep_record(job: Job, record: ClinicalRecord, data: DataSet, run_key: str) -> Path:
    """Write evaluation/evaluation.html, with how to repeat the job, and facts.json; returns the page's path.

    The page is logged only where the data are marked deidentified. run_key: of the training that made the model.
    """
    record = replace(
        record, command=job.command, config=job.config, environment=environment(), notes=[*record.notes, *data.notes]
    )
    page = write_clinical_page(job.folder / "evaluation", record)
    write_facts(job.folder, record, run_key)
    if job.recipe.data.deidentified:
        job.outbox.artifact(page)
    return page
