"""The end of a contest: which differences exceed noise, page, tables and figures, the model, summary.json.

What is compared is retrieval over each whole split, under seeds and patients as samples (`raymed.metrics.verdict`).
Validation chose the configurations; the test split, opened once, decides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymed.config import flatten, to_dict
from raymed.metrics.bootstrap import bootstrap_ci
from raymed.metrics.classification import Statistic
from raymed.metrics.retrieval import retrieval_statistic
from raymed.metrics.verdict import judge_statistics
from raymed.registry.config import RegisterConfig
from raymed.report.sweep_contest import ContestRecord, contest_sentence, write_contest_report
from raymed.report.sweep_record import SearchRecord, short_names
from raymed.report.tables import comparison_table
from raymed.results.assess import assess_unit
from raymed.results.model import MODEL, leave, median_unit
from raymed.tasks.prompts import Prompts
from raymed.tracking import environment
from raymed.train.runs.job import Job
from raymed.train.runs.openings import open_test
from raymed.train.runs.results import draw_losses
from raymed.train.unit import SPLITS, Unit, predictions, unit_data
from raymed.tune.config import FinalSeeds, SweepConfig, search_space
from raymed.tune.finals import DEFAULT
from raymed.tune.report import images_of, trial_of

if TYPE_CHECKING:
    from raymed.tune.contest import Contender

NO_FINALS = "cannot tell: the budget was used up before the best of each loss were trained on fresh seeds"
_SEARCH_LEFT = "no trial of it has finished"


@dataclass(frozen=True)
class Judged:
    """What the finals say. Without finals: nothing, and why."""

    methods: Mapping[str, Sequence[Unit]] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Method -> split -> metric -> Figure."""
    chosen: str = ""
    """The method with the best mean on validation, the baseline included."""
    verdicts: Mapping[str, Any] = field(default_factory=dict)
    """Split -> method -> Verdict."""
    openings: int = 0
    sentence: str = NO_FINALS


def judge_contest(
    job: Job, methods: Mapping[str, Sequence[Unit]], baseline: str, metric: str, num_configurations: int
) -> Judged:
    """Judge every method against the baseline, once on validation and then once on test."""
    openings = open_test(job.storage, unit_data(methods[baseline][0]), job.key)
    lower_is_better = job.recipe.metrics[metric] == "min"
    figures: dict[str, Any] = {method: {} for method in methods}
    verdicts = {}
    for split in SPLITS:
        statistics = {method: _statistics(units, split) for method, units in methods.items()}
        sampled = _groups(methods[baseline], split)
        for method, of_method in statistics.items():
            figures[method][split] = bootstrap_ci(of_method, **sampled)
        theirs, words = statistics.pop(baseline), {"lower_is_better": lower_is_better, "baseline": baseline}
        verdicts[split] = judge_statistics(statistics, theirs, metric=metric, **sampled, **words)
    sign = -1 if lower_is_better else 1
    chosen = max(figures, key=lambda method: sign * figures[method]["val"][metric]["mean"])
    sentence = contest_sentence(
        verdicts, metric, baseline, num_configurations=num_configurations, num_openings=openings
    )
    return Judged(methods, figures, chosen, verdicts, openings, sentence)


def _statistics(units: Sequence[Unit], split: str) -> list[Statistic]:
    arrays = [predictions(unit, split) for unit in units]
    return [retrieval_statistic(of["image"], of["text"], of["groups"]) for of in arrays]


def _groups(units: Sequence[Unit], split: str) -> dict[str, Any]:
    """{"groups": who each row of each unit is of, "unit": what that is}."""
    unit = "patient" if unit_data(units[0]).has_patients else "image"
    column = "patients" if unit == "patient" else "rows"
    return {"groups": [predictions(each, split)[column] for each in units], "unit": unit}


def report_contest(
    job: Job,
    sweep: SweepConfig,
    seeds: Sequence[int],
    finals: FinalSeeds,
    registering: RegisterConfig,
    contenders: "Sequence[Contender]",
    methods: Mapping[str, Sequence[Unit]],
) -> Path:
    """Report a contest; returns the path of its summary. methods: the finals' units; {} where there were none."""
    from rich import print as show

    judged = Judged()
    if methods:
        judged = judge_contest(job, methods, contenders[0].method, sweep.metric, sweep.num_trials)
    (job.folder / "figures").mkdir(exist_ok=True)
    page = write_contest_report(job.folder, _record(job, sweep, seeds, finals, contenders, judged))
    paths = {"run": job.folder, "report": page, "figures": job.folder / "figures"}
    registered = None
    if methods:
        unit = median_unit(methods[judged.chosen], sweep.metric)
        shown = judged.figures[judged.chosen]
        registered = leave(job, unit, assess_unit(unit, Prompts()), shown["test"], registering)
        paths["model"] = job.folder / MODEL
        of_test = {method: figure["test"] for method, figure in judged.figures.items()}
        columns = list(dict.fromkeys((sweep.metric, *unit.recipe.shown)))
        show(comparison_table(of_test, columns, title=f"test split, {len(finals.seeds)} fresh seeds"))
        job.outbox.metrics({f"test/{name}": figure["mean"] for name, figure in shown["test"].items()}, 0)
    _log(job, contenders, paths)
    extra = {
        "searches": {c.method: _found(c) for c in contenders},
        "baseline": contenders[0].method,
        "verdicts": judged.verdicts,
        "sentence": judged.sentence,
        "test_openings": judged.openings,
        "registered": registered and to_dict(registered),
        "ended_early": job.budget.exhausted(),
    }
    summary = job.finish(dict(judged.figures), paths, best=judged.chosen or None, **extra)
    print(f"{judged.sentence}\n" + "\n".join(f"{name}: {path}" for name, path in paths.items()))
    print(f"MLflow: {job.where()}")
    return summary


def _found(contender: "Contender") -> dict[str, Any]:
    """What a search has found, for summary.json."""
    best = contender.journal.best(contender.trials.mode)
    found = {"best_trial": best and best.number, "best_params": best and best.params, "value": best and best.value}
    return {"num_trials": len(contender.journal.trials)} | found


def _record(
    job: Job,
    sweep: SweepConfig,
    seeds: Sequence[int],
    finals: FinalSeeds,
    contenders: "Sequence[Contender]",
    judged: Judged,
) -> ContestRecord:
    pictures = []
    if judged.methods:
        pictures = [(draw_losses(job.folder / "figures", judged.methods), "Training, of the first seed.")]
    origin = {c.method: _origin(c) for c in contenders}
    return ContestRecord(
        title=f"Contest of {', '.join(c.method for c in contenders)}: {job.name}",
        command=job.command,
        metric=sweep.metric,
        searches={c.method: _search_record(c, seeds) for c in contenders},
        figures=judged.figures,
        params={method: _params(units[0], contenders) for method, units in judged.methods.items()},
        origin={method: origin.get(method, "not searched") for method in judged.methods},
        chosen=judged.chosen,
        verdicts=judged.verdicts,
        sentence=judged.sentence,
        num_test_openings=judged.openings,
        search_seeds=seeds,
        final_seeds=finals.seeds,
        num_pairs={split: len(job.data.splits[split]) for split in SPLITS},
        data=f"{images_of(job.data)}.",
        config=job.config,
        environment=environment(),
        pictures=pictures,
        notes=job.data.notes,
    )


def _search_record(contender: "Contender", seeds: Sequence[int]) -> SearchRecord:
    journal, trials = contender.journal, contender.trials
    best = journal.best(trials.mode)
    chosen = f"trial {best.number}" if best and best.number else DEFAULT
    return SearchRecord(
        metric=trials.metric,
        mode=trials.mode,
        baseline=DEFAULT,
        chosen=chosen,
        trial_of={DEFAULT: 0} | ({chosen: best.number} if best else {}),
        trials=[trial_of(trial) for trial in journal.trials.values()],
        space=search_space(trials.template.recipe, contender.sweep),
        num_configurations=len(journal.trials),
        num_generations=0,
        generation_size=None,
        search_seeds=seeds,
    )


def _origin(contender: "Contender") -> str:
    best = contender.journal.best(contender.trials.mode)
    return f"trial {best.number}, {best.value:.4f}" if best else _SEARCH_LEFT


def _params(unit: Unit, contenders: "Sequence[Contender]") -> dict[str, Any]:
    """The value of all that was searched of this unit's method, under names that methods share."""
    contender = next(c for c in contenders if c.method == unit.recipe.label)
    names = short_names(list(search_space(contender.trials.template.recipe, contender.sweep)))
    fields = flatten(unit.recipe)
    return {short: fields[name] for name, short in names.items()}


def _log(job: Job, contenders: "Sequence[Contender]", paths: Mapping[str, Path]) -> None:
    """Into MLflow. None of the figures shows a patient."""
    for file in ("report.html", "table.csv"):
        if (job.folder / file).is_file():
            job.outbox.artifact(job.folder / file)
    for contender in contenders:
        for file in ("sweep.jsonl", "trials.csv"):
            if (contender.folder / file).is_file():
                job.outbox.artifact(contender.folder / file, contender.method)
    for picture in sorted(paths["figures"].glob("*.png")):
        job.outbox.artifact(picture, "figures")
