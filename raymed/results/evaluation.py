"""The end of a job that evaluates a classifier: figures, page, and what a paper is made of.

    evaluation.html    the page                      figures/*.png    its figures
    facts.json         what a paper tells of it      table.csv        every figure of every level

Pictures of patients are shown, and the page is logged, only of sets that are marked deidentified.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from raymed.bundle import Bundle
from raymed.report.clinical_figures import Level
from raymed.report.clinical_page import METRICS, write_clinical_page
from raymed.report.tables import comparison_csv, comparison_table
from raymed.results.clinical import clinical_record
from raymed.results.paper_facts import write_facts
from raymed.results.seen import knows_training_set, unseen
from raymed.storage import write_atomic
from raymed.tasks.predictor import Predictor
from raymed.tracking import environment
from raymed.train.runs.job import Job
from raymed.train.runs.openings import open_test

_PRINTED = ("sensitivity", "specificity", "ppv", "npv", "auroc", "auprc", "brier", "ece")


def report_evaluation(job: Job, model: str, bundle: Bundle, prevalences: Sequence[float] = ()) -> Path:
    """Evaluate a model on the test split of a job's data, report, and return the path of the summary.

    model: what it is called. Raises UserError where the model was trained on a patient, unless such are left out.
    """
    from rich import print as show

    notes: list[str] = []
    where = unseen({"the model": (bundle, job.data)}, job.data.splits["test"], job.recipe.data.on_problem, notes)
    if not knows_training_set(bundle):
        notes.append("The model does not say what it was trained on: whether it has seen these patients is not known.")
    predictor = Predictor.from_bundle(bundle, str(job.config.compute.resolved_device()))
    openings = open_test(job.storage, job.data, job.key)
    notes.append(f"Runs that have shown figures of these images: {openings}.")
    record = clinical_record(
        predictor,
        job.data,
        where,
        title=f"evaluation: {job.name}",
        pictures=job.recipe.data.deidentified,
        prevalences=prevalences,
    )
    record = replace(
        record,
        model={"model": model} | dict(record.model),
        command=job.command,
        config=job.config,
        environment=environment(),
        notes=[*record.notes, *notes, *job.data.notes],
    )
    page = write_clinical_page(job.folder, record)
    facts = write_facts(job.folder, record, bundle.provenance.get("run_key", ""))
    figures = {level.name: {"test": dict(level.figures)} for level in record.levels}
    for level in record.levels:
        show(comparison_table({f"by {level.unit}": level.figures}, _PRINTED, title=record.data))
    write_atomic(job.folder / "table.csv", _table(record.levels))
    _log(job, page, record.levels[0])
    kept = {"run": job.folder, "report": page, "figures": job.folder / "figures", "facts": facts}
    extra = {"sentence": record.sentence, "test_openings": openings, "operating_point": dict(record.operating)}
    summary = job.finish(figures, kept, best=record.levels[0].name, model=dict(record.model), **extra)
    print("\n".join([record.sentence, *record.more, *(f"{name}: {path}" for name, path in kept.items())]))
    print(f"MLflow: {job.where()}")
    return summary


def _table(levels: Sequence[Level]) -> str:
    """Every figure of every level, a line each; those of the first name the columns' order."""
    tables = [comparison_csv({level.name: level.figures}, list(_ordered(level))) for level in levels]
    header = tables[0].splitlines(keepends=True)[0].replace("method", "level", 1)
    return header + "".join(line for table in tables for line in table.splitlines(keepends=True)[1:])


def _ordered(level: Level) -> dict[str, None]:
    return dict.fromkeys([*(name for name in METRICS if name in level.figures), *level.figures])


def _log(job: Job, page: Path, level: Level) -> None:
    """Into MLflow; the page, which may show images of patients, only of sets that are marked deidentified."""
    job.outbox.artifact(job.folder / "table.csv")
    for picture in sorted((job.folder / "figures").glob("*.png")):
        job.outbox.artifact(picture, "figures")
    if job.recipe.data.deidentified:
        job.outbox.artifact(page)
    finite = {name: of["mean"] for name, of in level.figures.items() if np.isfinite(of["mean"])}
    job.outbox.metrics({f"test/{name}": value for name, value in finite.items()}, 0)
