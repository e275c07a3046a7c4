"""What finished units say together: figures with intervals, curves, and a heat-map panel."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from raymed.bundle import Bundle
from raymed.data.dataset import DataSet
from raymed.explain.gradcam import grad_cam, laterality_hit_rate
from raymed.metrics.bootstrap import Prediction, summarise_difference, summarise_seeds
from raymed.metrics.levels import Level, LevelTable
from raymed.report import figures as draw
from raymed.report.tables import Figures, comparison_csv, comparison_markdown, comparison_table, difference_table
from raymed.storage import write_atomic
from raymed.tasks.classifier import ClassifierRecipe, load_classifier
from raymed.train.runs.job import Job
from raymed.train.runs.openings import open_test
from raymed.train.timing import speeds, time_spent
from raymed.train.unit import SPLITS, Unit, predictions, unit_data

PANEL = 8  # images
METRICS = ("auroc", "auprc", "accuracy", "accuracy_at_0.5", "precision", "recall", "f1", "ece")


def summarise(units: Sequence[Unit], level: Level | None = None) -> dict[str, Any]:
    """One method's units (its seeds) -> {"val": {metric: figure}, "test": ...}, at the level that `prediction` says."""
    grouped_by = unit_data(units[0]).grouped_by
    return {split: summarise_seeds([prediction(unit, split, level) for unit in units], grouped_by) for split in SPLITS}


def difference(units: Sequence[Unit], baseline: Sequence[Unit]) -> dict[str, Any]:
    """Paired difference of two methods over the same seeds, like `summarise`."""
    grouped_by = unit_data(units[0]).grouped_by

    def of(split: str) -> dict[str, Any]:
        ours, theirs = ([prediction(unit, split) for unit in method] for method in (units, baseline))
        return summarise_difference(ours, theirs, grouped_by)

    return {split: of(split) for split in SPLITS}


def prediction(unit: Unit, split: str, level: Level | None = None) -> Prediction:
    """A finished unit's scores, targets, patients (cases where the data name no patients, None where no cases either)
    and threshold; level: what a row is, None = what is decided about."""
    table, figures = decided(unit, split, level), (unit.result() or {})[split]
    threshold = figures["image/threshold" if level == "image" and "image/threshold" in figures else "threshold"]
    patients = None if unit_data(unit).grouped_by == "image" else table.patients
    return table.scores, table.targets, patients, threshold


def decided(unit: Unit, split: str, level: Level | None = None) -> LevelTable:
    """The units of a split that a finished training decides about, or those of another level."""
    arrays = predictions(unit, split)
    recipe = cast(ClassifierRecipe, unit.recipe)
    return recipe.decide.table(unit_data(unit), arrays["where"], arrays["scores"], level, arrays.get("energies"))


def best_on_validation(figures: Mapping[str, Any], metric: str = "auprc") -> str:
    """Name of the method with the highest mean on the validation split; the test split has no say."""
    return max(figures, key=lambda method: figures[method]["val"][metric]["mean"])


def draw_curves(folder: Path, methods: Mapping[str, Sequence[Unit]], figures: Mapping[str, Any]) -> list[Path]:
    """PR, ROC and reliability of the test split, as PNG files."""
    curves = {name: [prediction(unit, "test")[:2] for unit in units] for name, units in methods.items()}
    of_test = {name: figures[name]["test"] for name in methods}
    folder.mkdir(parents=True, exist_ok=True)
    draw.pr_roc(folder / "pr_roc.png", curves, of_test)
    draw.calibration(folder / "calibration.png", curves, of_test)
    return [folder / "pr_roc.png", folder / "calibration.png"]


def draw_losses(folder: Path, methods: Mapping[str, Sequence[Unit]]) -> Path:
    """Training losses and validation metrics of every unit, from its own records."""
    history: dict[str, dict[str, list]] = {}
    for name, units in methods.items():
        for record in units[0].outbox.records():
            if record["op"] != "metrics":
                continue
            for metric, value in record["values"].items():
                if metric.endswith("/loss") or metric in ("val/auprc", "val/auroc", "val/centroid_auroc"):
                    history.setdefault(metric, {}).setdefault(name, []).append((record["step"], value))
    draw.training_curves(folder / "training.png", history)
    return folder / "training.png"


def draw_heat_maps(folder: Path, unit: Unit) -> tuple[list[Path], dict[str, Any]]:
    """Grad-CAM of the most confident positive test images; where the side of the finding is known, how often the map
    lies on it (`laterality_hit_rate`, over all positive test images), or {}. Nothing for networks without feature maps.
    """
    import torch

    data = unit_data(unit)
    classifier, preprocess = load_classifier(Bundle.load(unit.folder / "bundle"))
    arrays = predictions(unit, "test")
    rows = arrays["where"][arrays["targets"] == 1]
    scores = arrays["scores"][arrays["targets"] == 1]
    image = data.batch(rows).unit_image()
    with torch.no_grad():
        if classifier.encoder.maps(preprocess.normalise(image[:1])).ndim != 4:
            print("no heat maps: the encoder has tokens in place of feature maps")
            return [], {}
    cams = torch.cat([grad_cam(classifier.encoder, classifier.head, preprocess.normalise(x)) for x in image.split(64)])
    sides = None if data.seen_sides is None else data.seen_sides[rows]
    known: list[int] = [] if sides is None else [i for i, side in enumerate(sides) if side in ("left", "right")]
    shown = np.argsort(-scores, kind="stable")[:PANEL]
    draw.cam_panel(
        folder / "grad_cam.png",
        [image[i].mean(0).numpy() for i in shown],
        [cams[i].numpy() for i in shown],
        [f"p = {scores[i]:.2f}" for i in shown],
        [(_side_of(cams[i].numpy()), str(sides[i])) if sides is not None and i in known else None for i in shown],
    )
    rate = laterality_hit_rate(cams[known], [sides[i] for i in known]) if sides is not None and known else {}
    return [folder / "grad_cam.png"], rate


def _side_of(cam: np.ndarray) -> str:
    half = cam.shape[1] // 2
    return "left" if cam[:, :half].sum() >= cam[:, -half:].sum() else "right"


def report(
    job: Job,
    methods: Mapping[str, Sequence[Unit]],
    baseline: str | None = None,
    artifacts: Sequence[Path] = (),
    best: str | None = None,
    pages: Mapping[str, Path] | None = None,
    **extra: Any,
) -> Path:
    """End a job: print and write the table, draw the figures, log them, write the summary. Returns its path.

    baseline: method that the others are compared with, seed by seed. artifacts: further files to log. pages: name ->
    path, told beside the others. best: the method to name so; None = by the validation split. Methods of which a
    seed is not finished, as when the budget is used up, are left out.
    """
    from rich import print as show

    methods = {name: units for name, units in methods.items() if units and all(unit.result() for unit in units)}
    extra |= {"ended_early": job.budget.exhausted()}
    if not methods:
        print(f"no method is finished: {job.budget.exhausted()}. The same command goes on, with a larger budget")
        return job.finish({}, {"run": job.folder}, best=None, **extra)
    baseline = baseline if baseline in methods else None
    best = best if best in methods else None
    extra |= {"test_openings": open_test(job.storage, unit_data(next(iter(methods.values()))[0]), job.key)}
    figures = {name: summarise(units) for name, units in methods.items()}
    best = best or best_on_validation(figures)
    folder = job.folder / "figures"
    pictures = [*draw_curves(folder, methods, figures), draw_losses(folder, methods), *artifacts]
    panels, laterality = draw_heat_maps(folder, methods[best][0])
    of_test = {name: figure["test"] for name, figure in figures.items()}
    level = cast(ClassifierRecipe, job.recipe).decide.level(unit_data(methods[best][0]))
    show(comparison_table(of_test, METRICS, title=_title(job, methods[best], level)))
    if level != "image":
        images = {name: summarise(units, "image") for name, units in methods.items()}
        tell_images(job, {name: figure["test"] for name, figure in images.items()})
        extra |= {"image_figures": images}
    differences = {
        name: difference(units, methods[baseline]) for name, units in methods.items() if baseline and name != baseline
    }
    if differences:
        show(difference_table({name: d["test"] for name, d in differences.items()}, METRICS, f"minus {baseline}, test"))
    write_atomic(job.folder / "table.csv", comparison_csv(of_test, METRICS))
    write_atomic(job.folder / "table.md", comparison_markdown(of_test, METRICS))
    for picture in pictures + (panels if job.recipe.data.deidentified else []):
        job.outbox.artifact(picture, "figures")
    for table in ("table.csv", "table.md"):
        job.outbox.artifact(job.folder / table)
    final = {f"test/{name}": of_test[best][name]["mean"] for name in METRICS}
    job.outbox.metrics(final | ({"laterality_hit_rate": laterality["hit_rate"]} if laterality else {}), 0)
    paths = {"run": job.folder, "figures": folder, "model": methods[best][0].folder / "bundle", **(pages or {})}
    extra |= {"time": {unit.name: time_spent(unit.outbox) for units in methods.values() for unit in units}}
    extra |= {"speed": speeds(methods[best][0].outbox, job.costs())}
    extra |= {"differences": {"baseline": baseline, **differences}} if differences else {}
    summary = job.finish(figures, paths, best=best, laterality=laterality, **extra)
    told = "".join(f"{name}: {path}\n" for name, path in paths.items())
    print(f"best on validation: {best}\n{told}MLflow: {job.where()}")
    return summary


def over(data: DataSet) -> str:
    """What intervals are over, in words."""
    return f"{data.grouped_by}s" + " (no patient column)" * (not data.has_patients)


def tell_images(job: Job, figures: Figures) -> None:
    """Print and write the table of figures by image, where what is decided about is something else."""
    from rich import print as show

    show(comparison_table(figures, METRICS, title="the same by image, as other work counts"))
    write_atomic(job.folder / "table_images.csv", comparison_csv(figures, METRICS))
    job.outbox.artifact(job.folder / "table_images.csv")


def _title(job: Job, units: Sequence[Unit], level: str) -> str:
    data = unit_data(units[0])
    unit = over(data)
    kind = "seed" if units[0].fold is None else "fold"
    seeds = f"{len(units)} {kind}{'s' * (len(units) > 1)}"
    rows = {"image": "images", "patient": "patients"}.get(level, f"{level}s")
    how = cast(ClassifierRecipe, job.recipe).decide.aggregate
    rows = rows if level == "image" else f"{rows} (scores of images: {how})"
    return f"test split, by {rows}, positive = {data.positive}, {seeds}, 95 % intervals over {unit}"
