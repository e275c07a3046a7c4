"""The end of a sweep: verdict, page, tables and figures, the model and its place in the registry, summary.json.

Validation is judged first and names the winner; the test split is opened once, for the finalists and the default.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from raymed.bundle import Bundle
from raymed.config import to_dict
from raymed.data.dataset import DataSet
from raymed.explain.inside import look_inside
from raymed.metrics.bootstrap import bootstrap_ci, mean_statistic
from raymed.metrics.verdict import best_finalist, judge, overall
from raymed.registry.config import RegisterConfig
from raymed.report.sweep import write_sweep_report
from raymed.report.sweep_record import SweepRecord, Trial
from raymed.report.tables import comparison_table
from raymed.results.classifier_model import leave_classifier
from raymed.results.model import median_unit
from raymed.tasks.classifier import load_classifier
from raymed.tracking import environment
from raymed.train.runs.job import Job
from raymed.train.runs.openings import open_test
from raymed.train.runs.results import METRICS, draw_heat_maps, draw_losses, prediction, summarise
from raymed.train.unit import SPLITS, Unit, load_data, unit_data
from raymed.tune.config import Finals, SweepConfig, search_space
from raymed.tune.finals import DEFAULT
from raymed.tune.journal import Journal, TrialRecord
from raymed.tune.trials import Trials

_LOOKED_AT = 200  # images a network: counting places takes a fraction of a second for each of its channels
NO_FINALS = "cannot tell: the budget was used up before the best trials were trained on fresh seeds"

SHARED = "The concept count is of the encoder, which all heads of a seed share."
NO_FINALIST = "cannot tell: no configuration but the default has finished"


@dataclass(frozen=True)
class Outcome:
    """What the finals say. Without finals: nothing, and why."""

    methods: Mapping[str, Sequence[Unit]] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    chosen: str = DEFAULT
    """The method with the best mean on validation, of the finalists and the default."""
    verdicts: Mapping[str, Any] = field(default_factory=dict)
    openings: int = 0
    sentence: str = NO_FINALS


def judge_finals(job: Job, sweep: SweepConfig, journal: Journal, methods: Mapping[str, Sequence[Unit]]) -> Outcome:
    """Name the winner and judge every finalist, once on validation and then once on test."""
    figures = {name: summarise(units) for name, units in methods.items()}
    sign = 1 if job.recipe.metrics[sweep.metric] == "max" else -1
    chosen = max(figures, key=lambda method: sign * figures[method]["val"][sweep.metric]["mean"])
    openings = open_test(job.storage, unit_data(methods[DEFAULT][0]), job.key)
    verdicts = {}
    for split in SPLITS:
        predicted = {name: [prediction(unit, split) for unit in units] for name, units in methods.items()}
        default = predicted.pop(DEFAULT)
        verdicts[split] = judge(predicted, default, sweep.metric) if predicted else {}
    sentence = NO_FINALIST
    if verdicts["val"]:
        sentence = overall(
            verdicts["val"],
            verdicts["test"],
            best_finalist(verdicts["val"], sweep.metric),
            num_configurations=len(journal.trials),
            num_openings=openings,
        )
    return Outcome(methods, figures, chosen, verdicts, openings, sentence)


def report_sweep(
    job: Job,
    sweep: SweepConfig,
    finals: Finals,
    registering: RegisterConfig,
    foreign: Sequence[str],
    journal: Journal,
    trials: Trials,
    methods: Mapping[str, Sequence[Unit]],
) -> Path:
    """Report a sweep; returns the path of its summary. methods: the finals' units; {} where there were none."""
    from rich import print as show

    outcome = judge_finals(job, sweep, journal, methods) if methods else Outcome()
    (job.folder / "figures").mkdir(exist_ok=True)
    inside, heat_maps, laterality = _look(job, outcome) if methods else ({}, [], {})
    pictures = [(draw_losses(job.folder / "figures", methods), "Training, of the first seed.")] if methods else []
    record = _record(job, sweep, finals, journal, trials, outcome, inside, heat_maps, pictures)
    page = write_sweep_report(job.folder, record)
    paths = {"run": job.folder, "report": page, "figures": job.folder / "figures", "tune": job.folder / "tune"}
    registered = None
    if methods:
        unit = median_unit(outcome.methods[outcome.chosen], sweep.metric)
        shown = outcome.figures[outcome.chosen]
        paths["model"], registered = leave_classifier(job, unit, shown, registering, foreign)
        of_test = {method: figure["test"] for method, figure in outcome.figures.items()}
        show(comparison_table(of_test, METRICS, title=f"test split, {len(finals.seeds)} fresh seeds"))
        job.outbox.metrics({f"test/{name}": of_test[outcome.chosen][name]["mean"] for name in METRICS}, 0)
    _log(job, paths)
    best = journal.best(trials.mode)
    extra = {
        "sweep": {
            "num_trials": len(journal.trials),
            "best_trial": best and best.number,
            "best_params": best and best.params,
        },
        "verdicts": outcome.verdicts,
        "sentence": outcome.sentence,
        "test_openings": outcome.openings,
        "inside": inside,
        "laterality": laterality,
        "registered": registered and to_dict(registered),
        "ended_early": job.budget.exhausted(),
    }
    summary = job.finish(dict(outcome.figures), paths, best=outcome.chosen if methods else None, **extra)
    print(f"{outcome.sentence}\n" + "\n".join(f"{name}: {path}" for name, path in paths.items()))
    print(f"MLflow: {job.where()}")
    return summary


def _look(job: Job, outcome: Outcome) -> tuple[dict[str, Any], list[tuple[Path, str]], dict[str, Any]]:
    """Look-inside figures a method, where regions are known; heat maps of the winner's first seed."""
    inside = {name: found for name, units in outcome.methods.items() if (found := inside_figures(units))}
    panels, laterality = draw_heat_maps(job.folder / "figures", outcome.methods[outcome.chosen][0])
    caption = f"Grad-CAM of {outcome.chosen}: the test images it is most sure are positive."
    shown = panels if job.recipe.data.deidentified else []
    return inside, [(panel, caption) for panel in shown], laterality


def inside_figures(units: Sequence[Unit]) -> dict[str, Any]:
    """Box alignment and concept count of a method over its seeds, on positive test images whose region is known; {}
    where none is, or where the network has no feature maps."""
    statistics, groups = [], []
    data = unit_data(units[0])
    for unit in units:
        indices = data.splits["test"][data.labels[data.splits["test"]] == 1]
        regions = data.regions(indices)
        known = [i for i, region in enumerate(regions) if region is not None][:_LOOKED_AT]
        classifier, preprocess = load_classifier(Bundle.load(unit.folder / "bundle"))
        if not known or classifier.encoder.maps(_images(data, preprocess, indices[:1])).ndim != 4:
            return {}
        images = _images(data, preprocess, indices[known])
        inside = [region for region in (regions[i] for i in known) if region is not None]
        statistics.append(_means(look_inside(classifier.encoder, classifier.head, images, inside)))
        groups.append(data.patients[indices[known]])
    return bootstrap_ci(statistics, groups, unit="patient" if data.has_patients else "image")


def _images(data: Any, preprocess: Any, indices: np.ndarray) -> Any:
    return preprocess.normalise(data.batch(indices).unit_image())


def _means(found: dict[str, np.ndarray]) -> Any:
    shown = {"box_alignment": "energy_inside", "chance": "area", "concept_count": "concepts"}
    parts = [mean_statistic(name, found[key]) for name, key in shown.items()]
    return lambda counts: {name: value for part in parts for name, value in part(counts).items()}


def _record(
    job: Job,
    sweep: SweepConfig,
    finals: Finals,
    journal: Journal,
    trials: Trials,
    outcome: Outcome,
    inside: dict[str, Any],
    heat_maps: list[tuple[Path, str]],
    pictures: list[tuple[Path, str]],
) -> SweepRecord:
    data = load_data(job.recipe, trials.template.cache)
    batched = sweep.batched and job.recipe.two_stage
    return SweepRecord(
        title=f"Sweep of {job.recipe.label}: {job.name}",
        command=job.command,
        metric=sweep.metric,
        mode=trials.mode,
        figures=outcome.figures,
        baseline=DEFAULT,
        chosen=outcome.chosen,
        trial_of={m: 0 if m == DEFAULT else int(m.split()[1]) for m in outcome.methods},
        trials=[trial_of(trial) for trial in journal.trials.values()],
        space=search_space(job.recipe, sweep),
        predictions={name: {s: _scores(units, s) for s in SPLITS} for name, units in outcome.methods.items()},
        thresholds={name: [prediction(u, "test")[3] for u in units] for name, units in outcome.methods.items()},
        verdicts=outcome.verdicts,
        sentence=outcome.sentence,
        num_configurations=len(journal.trials),
        num_generations=-(-len(journal.trials) // sweep.generation),
        generation_size=sweep.generation if batched else None,
        num_test_openings=outcome.openings,
        search_seeds=[replicate.seed for replicate in trials.replicates],
        final_seeds=finals.seeds,
        data=f"{images_of(data)}, {data.labels.mean():.0%} {data.positive}.",
        positive=data.positive,
        negative=" or ".join(name for name in data.classes if name != data.positive),
        config=job.config,
        environment=environment(),
        inside=inside or None,
        heat_maps=heat_maps,
        pictures=pictures,
        notes=[*([SHARED] if inside and job.recipe.two_stage else []), *data.notes],
    )


def images_of(data: DataSet) -> str:
    """How many images of how many patients there are, by split."""
    parts = ", ".join(f"{len(indices)} {name}" for name, indices in data.splits.items())
    patients = f" of {len(np.unique(data.patients))} patients" if data.has_patients else ""
    return f"{len(data)} images{patients} ({parts})"


def _scores(units: Sequence[Unit], split: str) -> list[tuple[np.ndarray, np.ndarray]]:
    return [prediction(unit, split)[:2] for unit in units]


def trial_of(trial: TrialRecord) -> Trial:
    """A journaled trial as a report has it."""
    return Trial(
        number=trial.number,
        params=trial.params,
        value=trial.value,
        status=trial.status,
        rungs=trial.rungs,
        per_seed=trial.values,
    )


def _log(job: Job, paths: dict[str, Path]) -> None:
    """Into MLflow; pictures of patients only from sets that are marked deidentified. A sweep whose budget was used up
    before its first trial has no journal."""
    files = [job.folder / name for name in ("report.html", "trials.csv", "table.csv", "sweep.jsonl")]
    for file in filter(Path.is_file, files):
        job.outbox.artifact(file)
    for picture in sorted(paths["figures"].glob("*.png")):
        if picture.name != "grad_cam.png" or job.recipe.data.deidentified:
            job.outbox.artifact(picture, "figures")
