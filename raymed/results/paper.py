"""What is known of a study for its paper: of a training and, where there are such, a cross-validation on the same data
and an evaluation on an external test set.

Everything comes from what the runs have written down: config, data.json, summary.json, facts.json, the model's bundle,
and the manifest with the import.json beside it. What stands nowhere is a blank in the text.
"""

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from raymed.bundle import Bundle
from raymed.config import UserError
from raymed.data.folds import CrossValidation
from raymed.data.locations import Location, as_location, below, folder_of, near
from raymed.data.manifest import read_table
from raymed.report.paper import (
    Curves,
    Flow,
    Group,
    OperatingPoint,
    PaperRecord,
    Recalibration,
    Split,
    Statistics,
    Study,
    Training,
    cohort_of,
    config_facts,
)
from raymed.results.finished import FinishedRun
from raymed.results.paper_facts import FACTS, read_facts
from raymed.storage import exists
from raymed.tasks.decide import ATTENTION
from raymed.tracking.outbox import Outbox

IMPORT = "import.json"
_BESIDE = ("site", "scanner", "modality", "sex", "age", "year")
_LEVEL, _RESAMPLES = 0.95, 2000  # of `raymed.metrics.bootstrap.bootstrap_ci`
_KINDS = {"platt": "Platt scaling"}
_PLACES = {"val": "the validation set"}
_OUT_OF_FOLD = "the out-of-fold scores of the other folds"
_INNER = "the validation scores of the inner folds"
_SECOND_NAMES = {"recall": "sensitivity", "precision": "ppv"}


def paper_of(
    training: FinishedRun,
    evaluation: FinishedRun | None = None,
    folds: FinishedRun | None = None,
    study: Study | None = None,
) -> PaperRecord:
    """Put together what the runs say.

    The headline is what the training found on images that were held out, where it wrote facts.json, and otherwise what
    the evaluation found; the others stand beside it. The training may be a cross-validation itself: then no
    model left it, and there is nothing to evaluate.

    Raises:
        UserError: the evaluation is of another model, or of images that the training has used; the cross-validation is
            none, or of other images; a manifest has changed since.
    """
    bundle, unit = _bundle(training), _unit(training)
    known = config_facts(training.record.config)
    known["training"] = _unmirrored(known["training"], unit)
    cohort, blanked = _cohort(training, unit)
    found, _ = read_facts(training.folder)
    if found:
        point = found["operating_point"]
        found["operating_point"] = replace(point, chosen_on=_PLACES.get(point.chosen_on, point.chosen_on))
        found["performance"] = found["performance"] | _over_seeds(training, unit)
    record = PaperRecord(
        **known
        | {
            "study": study or Study(),
            "unit": unit,
            "cohort": cohort,
            "flow": _flow(training),
            "split": _split(training),
            "preprocessing": replace(known["preprocessing"], num_blanked=blanked),
            "model": replace(
                known["model"], aggregate=_aggregate(training, bundle), num_parameters=_num_parameters(bundle)
            ),
            "operating_point": _operating_point(training, bundle),
            "recalibration": _recalibration(training, bundle),
            "statistics": _statistics(training, bool(found)),
            "performance": _performance(training, unit),
            "comparison": _comparison(training),
            "software": _software(training),
            "hardware": _hardware(training),
            "command": _command(training),
        }
        | found
    )
    record = record if folds is None else _with_folds(record, training, folds)
    return record if evaluation is None else _with_external(record, training, evaluation)


def missing(run: FinishedRun) -> list[str]:
    """What of a run's data could not be found, one line each."""
    path = _manifest(run)
    if path is None or exists(path):
        return []
    return [
        f"{path}, the manifest of {run.record.name}, is not here: the cohort is told without what stands only there"
    ]


def _with_folds(record: PaperRecord, training: FinishedRun, run: FinishedRun) -> PaperRecord:
    """The record with the figures of a cross-validation on the same data."""
    cv = _folds(run)
    if cv is None:
        raise UserError(f"{run.record.name} is no cross-validation (--cv)")
    if set(run.images["content"]) != set(training.images["content"]):
        raise UserError(f"{run.record.name} and {training.record.name} are of different images: one study has one set")
    performance = {f"{name}, cross-validation": found for name, found in _performance(run, record.unit).items()}
    return replace(
        record,
        performance=dict(record.performance) | performance,
        split=replace(record.split, folds=cv.folds, repeats=cv.repeats),
    )


def _with_external(record: PaperRecord, training: FinishedRun, evaluation: FinishedRun) -> PaperRecord:
    """The record with what an evaluation found on an external test set."""
    found, run_key = read_facts(evaluation.folder)
    if not found:
        raise UserError(f"{evaluation.folder} holds no evaluation of a classifier ({FACTS})")
    trained_by = run_key.partition("/")[0]
    if trained_by not in ("", training.key):
        raise UserError(
            f"{evaluation.record.name} evaluates a model of the run {trained_by}, not of {training.key}: give the run "
            "that trained it"
        )
    shared = set(evaluation.images["content"]) & set(training.images["content"])
    if shared:
        raise UserError(
            f"{len(shared)} images of {evaluation.record.name} are among those of {training.record.name}: an external "
            "test set shares none with the data that the model comes from"
        )
    cohort, _ = _cohort(evaluation, record.unit, external=True)
    inside, outside = dict(record.performance), _external(found["performance"])
    # Curves, readers and subgroups are drawn and told beside the headline: all of them are of its test set.
    if record.curves.roc:
        changes: dict[str, Any] = {
            "performance": inside | outside,
            "curves": _both_curves(record.curves, found["curves"]),
        }
    else:
        changes = {name: found[name] for name in ("subgroups", "readers", "agreement")}
        changes |= {"performance": outside | inside, "curves": _both_curves(Curves(), found["curves"])}
    return replace(
        record,
        **changes,
        cohort=dict(record.cohort) | {"external": cohort["all"]},
        explanation=record.explanation or found["explanation"],
        statistics=replace(record.statistics, analytic=True),
    )


def _both_curves(internal: Curves, external: Curves) -> Curves:
    return Curves(
        dict(internal.roc) | _external(external.roc),
        dict(internal.precision_recall) | _external(external.precision_recall),
        dict(internal.calibration) | _external(external.calibration),
        internal.decision or external.decision,
    )


def _external(named: Mapping[str, Any]) -> dict[str, Any]:
    return {f"External test, {name.lower()}": value for name, value in named.items()}


def _unit(run: FinishedRun) -> str:
    """What the run decides about, in the words of a paper."""
    bundle = _bundle(run)
    decided = run.record.config["recipe"].get("decide", {}).get("unit")
    recorded = bundle.operating_point.get("unit") if bundle else None
    unit = str(recorded or decided or run.summary.get("level", "image"))
    return {"case+side": "side"}.get(unit, unit)


def _bundle(training: FinishedRun) -> Bundle | None:
    """The model that left the run, or None."""
    stated = training.summary.get("paths", {}).get("model")
    here = [Path(stated)] if stated else []
    if stated and training.record.name in Path(stated).parts:  # a run that was moved takes its model along
        parts = Path(stated).parts
        here.append(training.folder.joinpath(*parts[parts.index(training.record.name) + 1 :]))
    folder = next((folder for folder in here if (folder / "bundle.json").is_file()), None)
    return Bundle.load(folder) if folder else None


def _cohort(run: FinishedRun, unit: str, external: bool = False) -> tuple[dict[str, Group], int | None]:
    """The parts of a run's data, and how many of its images were blanked in parts; None = not recorded.

    Of a cross-validation only the whole is told: every image was held out, and trained on in other folds.
    """
    table, config = run.images.astype({"split": object}), run.data_config
    raw = _manifest_rows(run)
    beside = {name: config.get(name) or name for name in ("patient", "case", "side")} | {n: n for n in _BESIDE}
    if not run.record.data["has_patients"]:
        table = table.drop(columns="patient")
        del beside["patient"]
    if raw is not None:
        table = table.assign(**{name: raw[column].to_numpy() for name, column in beside.items() if column in raw})
    if external or _folds(run):
        table["split"] = ""
    if unit not in ("image", "patient") and "case" not in table:
        # The manifest is gone, and with it what a case is: images must not be told as if they were cases.
        return {"all": Group(cohort_of(table, "image")["all"].counts)}, None
    blank = config.get("blank") or "blank_boxes"
    return cohort_of(table, unit), None if raw is None or blank not in raw else sum(map(bool, raw[blank].tolist()))


def _manifest_rows(run: FinishedRun) -> pd.DataFrame | None:
    """The rows of the run's manifest that it used, or None where that is no table, or gone."""
    path = _manifest(run)
    if path is None or not exists(path):
        return None
    images, raw = run.images, read_table(path)
    label = run.data_config.get("label", "label")
    rows = images["row"].to_numpy() - 1
    if label in raw and (rows.max() >= len(raw) or (raw[label].iloc[rows].to_numpy() != images["label"]).any()):
        raise UserError(f"{path} has changed since {run.record.name} was made of it: run it anew, or restore the file")
    return raw.iloc[rows] if rows.max() < len(raw) else None


def _manifest(run: FinishedRun) -> Location | None:
    path = as_location(run.data_config["manifest"])
    return path if str(path).lower().endswith((".csv", ".tsv", ".parquet")) else None


def _flow(run: FinishedRun) -> Flow | None:
    """What the import beside the manifest had counted when the run began, and what was left out after it."""
    path = _manifest(run)
    record = below(folder_of(path), IMPORT) if path else None
    if record is None or not exists(record):
        return None
    now = json.loads(near(record).read_text())
    before = [told for told in (*now.get("earlier", ()), now) if told.get("time", 0) <= _began(run)]
    if not before:
        return None
    told = before[-1]
    (what, assessed), *steps = told["flow"]
    excluded = Counter(dict(steps[:-1]))
    left = told["counts"]["images"] - len(run.images)
    if left > 0 and told["counts"]["images"] == steps[-1][1]:  # one image a file: both count the same
        excluded["not used: duplicate or unusable"] += left
    return Flow(what.removesuffix("s"), assessed, dict(excluded), assessed - excluded.total())


def _began(run: FinishedRun) -> float:
    """When the run was first opened, in seconds since 1970; 0 where that is not recorded."""
    records = Outbox(run.folder / "tracking.jsonl").records()
    return min((record["time"] / 1000 for record in records if record["op"] == "open"), default=0.0)


def _folds(run: FinishedRun) -> CrossValidation | None:
    stated = run.record.config.get("cv")
    return CrossValidation.parse(stated) if isinstance(stated, str) and stated else None


def _split(run: FinishedRun) -> Split:
    data, cv = run.data_config, _folds(run)
    unit = "patient" if run.record.data["has_patients"] else "image"
    if cv:
        return Split("random", unit, cv.seed, None, cv.folds, cv.repeats)
    if _is_given(run):
        return Split(unit=unit)
    how = data.get("split_how", "random")
    test = {"by_time": data.get("test_from") or None, "by_site": ", ".join(data.get("test_sites", ())) or None}
    return Split(how, unit, data.get("split_seed"), test.get(how))


def _is_given(run: FinishedRun) -> bool:
    """Whether the manifest says itself which image is in which split."""
    stated, path = run.data_config.get("split"), _manifest(run)
    if stated == "" or path is None or not exists(path):
        return bool(stated)
    return bool(stated) or "split" in read_table(path)


def _num_parameters(bundle: Bundle | None) -> int | None:
    from raymed.tasks.classifier import load_classifier

    if bundle is None or bundle.kind != "classifier":
        return None
    return sum(parameter.numel() for parameter in load_classifier(bundle)[0].parameters())


def _unmirrored(training: Training, unit: str) -> Training:
    """What `ClassifierRecipe` does where sides are decided about: a mirrored image would be of the other side."""
    if unit != "side" or not training.augmentation:
        return training
    return replace(training, augmentation=dict(training.augmentation) | {"flip": 0.0})


def _aggregate(run: FinishedRun, bundle: Bundle | None) -> str | None:
    """The rule. Attention is used only where it helped; of a cross-validation every fold has its own answer."""
    rule = run.record.config["recipe"].get("decide", {}).get("aggregate")
    if rule != ATTENTION:
        return rule
    if bundle is None:
        return "attention_or_mean"
    return rule if bundle.operating_point.get("attention", {}).get("applied") else "mean_of_logits"


def _operating_point(run: FinishedRun, bundle: Bundle | None) -> OperatingPoint:
    """The model's; of a cross-validation the rule, since every fold has a threshold of its own."""
    if bundle is None:
        rule = run.record.config["recipe"].get("decide", {}).get("operating_point")
        source = _INNER if run.summary.get("nested") else _OUT_OF_FOLD
        return OperatingPoint(rule, None, source if _folds(run) else None)
    point = bundle.operating_point
    return OperatingPoint(point.get("criterion"), point.get("threshold"), _chosen_on(point))


def _chosen_on(point: Mapping[str, Any]) -> str | None:
    on = point.get("chosen_on")
    return _PLACES.get(str(on), on)


def _recalibration(run: FinishedRun, bundle: Bundle | None) -> Recalibration | None:
    if bundle is None:
        return Recalibration("none") if _folds(run) else None
    if not bundle.calibration.get("applied"):
        return Recalibration("none")
    kind = str(bundle.calibration.get("kind", "platt"))
    return Recalibration(_KINDS.get(kind, kind), _chosen_on(bundle.operating_point))


def _statistics(run: FinishedRun, analytic: bool) -> Statistics:
    return Statistics(_LEVEL, _RESAMPLES, "patient" if run.record.data["has_patients"] else "image", analytic)


def _performance(run: FinishedRun, unit: str) -> dict[str, Any]:
    """Figures of the best method on the images that were held out, by unit and by image."""
    best = run.summary.get("best")
    found = {unit.capitalize(): run.summary["figures"].get(best, {}).get("test")}
    if unit != "image":
        found["Image"] = run.summary.get("image_figures", {}).get(best, {}).get("test")
    return {name: _quoted(figures) for name, figures in found.items() if figures}


def _over_seeds(run: FinishedRun, unit: str) -> dict[str, Any]:
    """What facts.json, which is of one seed's model, does not tell of a training with several."""
    num = len(run.record.config.get("seeds", ()))
    return {f"{name}, mean of {num} seeds": of for name, of in _performance(run, unit).items()} if num > 1 else {}


def _comparison(run: FinishedRun) -> dict[str, Any]:
    methods = {name: of["test"] for name, of in run.summary["figures"].items() if "test" in of}
    return {name: _quoted(figures) for name, figures in methods.items()} if len(methods) > 1 else {}


def _quoted(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Without the second name of one and the same figure."""
    double = {second for second, first in _SECOND_NAMES.items() if first in figures}
    return {name: figure for name, figure in figures.items() if name not in double | {"threshold"}}


def _command(run: FinishedRun) -> str | None:
    """The command that repeats the run, of whose paths the last two parts are left: the rest is one machine's."""
    command = run.summary.get("command")
    if command is None:
        return None
    flags = [word.partition("=") for word in shlex.split(command)]
    return shlex.join("".join((_shortened(flag), sign, _shortened(value))) for flag, sign, value in flags)


def _shortened(text: str) -> str:
    is_path = re.match(r"/|~|[a-z0-9]+://", text)
    return "/".join([part for part in text.split("/") if part][-2:]) if is_path else text


def _software(run: FinishedRun) -> dict[str, str | None]:
    environment = run.record.environment
    return {"Python": environment.get("python")} | environment.get("versions", {})


def _hardware(run: FinishedRun) -> str | None:
    gpus = Counter(run.record.environment.get("gpus", ()))
    if gpus:
        return ", ".join(f"{num} × {name}" for name, num in gpus.items())
    cores = run.record.environment.get("num_cpus")
    return f"{cores} CPU cores" if cores else None
