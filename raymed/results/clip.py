"""The end of a job that trained or evaluated embeddings of images and texts: tables, page, pictures, index, summary."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raymed.bundle import Bundle
from raymed.config import to_dict
from raymed.data.captioned import PROMPTS
from raymed.data.captions import CaptionSet
from raymed.metrics.bootstrap import bootstrap_ci
from raymed.metrics.classification import binary_statistic
from raymed.metrics.retrieval import nearest, share_group
from raymed.metrics.zero_shot import finding_metric
from raymed.registry.config import RegisterConfig
from raymed.report.clip_figures import ImageQuery, TextQuery
from raymed.report.clip_page import ClipRecord, PairCalibration, write_clip_report
from raymed.report.tables import RETRIEVAL, comparison_csv, comparison_markdown, comparison_table
from raymed.results.assess import Assessment, Embedded, Pairs, assess, assess_unit, figures, mean_protocol
from raymed.results.model import MODEL, leave, median_unit
from raymed.storage import write_atomic
from raymed.tasks.embedder import Embedder, index_data
from raymed.tasks.index import write_index
from raymed.tasks.prompts import Prompts
from raymed.tracking import environment
from raymed.train.runs.job import Job
from raymed.train.runs.openings import open_test
from raymed.train.runs.results import draw_losses
from raymed.train.unit import Unit

_MATRIX, _QUERIES, _NEAREST = 32, 4, 5  # pairs, queries and neighbours that are shown
METRICS = tuple(RETRIEVAL)
INDEX = "index.parquet"

Assessed = Mapping[str, Sequence[Assessment]]
"""Method -> one a seed. The first is what the others are compared with, and what the figures show."""


def report_trained(
    job: Job, methods: Mapping[str, Sequence[Unit]], prompts: Prompts, registering: RegisterConfig
) -> Path:
    """Report trained models, a method's seeds together. Of the first method the seed with the median validation score
    is the model that leaves, and is registered. Methods of which a seed is not finished are left out."""
    methods = {name: units for name, units in methods.items() if all(unit.result() for unit in units)}
    if not methods:
        print(f"no method is finished: {job.budget.exhausted()}. The same command goes on, with a larger budget")
        return job.finish({}, {"run": job.folder}, best=None, ended_early=job.budget.exhausted())
    first = next(iter(methods))
    unit = median_unit(methods[first], "mean_recall")
    assessed = {name: [assess_unit(unit, prompts) for unit in units] for name, units in methods.items()}
    embedder = Embedder.from_bundle(Bundle.load(unit.folder / "bundle"), str(unit.compute.resolved_device()))
    return report_clip(job, assessed, embedder, methods, unit, registering)


def report_bundle(job: Job, bundle: Bundle, prompts: Prompts) -> Path:
    """Report a model that was trained elsewhere, on this job's data."""
    data: CaptionSet = job.data  # type: ignore[assignment]
    embedder = Embedder.from_bundle(bundle, str(job.config.compute.resolved_device()))
    seen = {split: Embedded.of(embedder, data, split) for split in ("val", "test")}
    found = assess(embedder, data, job.recipe.data.manifest, prompts, seen)
    return report_clip(job, {bundle.model["method"]: [found]}, embedder)


def report_clip(
    job: Job,
    assessed: Assessed,
    embedder: Embedder,
    units: Mapping[str, Sequence[Unit]] | None = None,
    leaving: Unit | None = None,
    registering: RegisterConfig | None = None,
) -> Path:
    """End a job: print and write the tables, draw the figures, write page and index, log them, write the summary.
    Returns its path.

    embedder: of the first method, in use. units: of each method, where it was trained here. leaving: the one whose
    bundle leaves, with its card, and is registered.
    """
    from rich import print as show

    data: CaptionSet = job.data  # type: ignore[assignment]
    openings = open_test(job.storage, data, job.key)
    found = {method: figures(of_seeds, data) for method, of_seeds in assessed.items()}
    retrieval = {method: kinds["retrieval"] for method, kinds in found.items()}
    first = next(iter(assessed))
    folder = job.folder
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    record = _record(job, data, assessed, found, embedder, units or {})
    page = write_clip_report(folder, record)
    show(comparison_table(retrieval, METRICS, title=_title(data, assessed[first])))
    write_atomic(folder / "table.csv", comparison_csv(retrieval, METRICS))
    write_atomic(folder / "table.md", comparison_markdown(retrieval, METRICS))
    write_index(folder / INDEX, index_data(embedder, data, data.splits["test"]))
    _log(job, page)
    job.outbox.metrics({f"test/{name}": retrieval[first][name]["mean"] for name in METRICS}, 0)
    kept = {"run": folder, "report": page, "figures": folder / "figures", "index": folder / INDEX}
    extra: dict[str, Any] = {"identity": embedder.identity}
    if leaving and registering:
        kept["model"] = folder / MODEL
        found_of_it = assessed[first][units[first].index(leaving)] if units else assessed[first][0]
        registered = leave(job, leaving, found_of_it, found[first]["retrieval"], registering)
        extra["registered"] = registered and to_dict(registered)
    extra |= {"sentence": record.sentence, "test_openings": openings, "ended_early": job.budget.exhausted()}
    extra |= {"protocol": {method: mean_protocol(of_seeds) for method, of_seeds in assessed.items()}}
    summary = job.finish({method: {"test": kinds} for method, kinds in found.items()}, kept, best=first, **extra)
    print(f"{record.sentence}\n" + "\n".join(f"{name}: {path}" for name, path in kept.items()))
    print(f"MLflow: {job.where()}")
    return summary


def _title(data: CaptionSet, assessments: Sequence[Assessment]) -> str:
    unit = "patients" if data.has_patients else "images (no patient column)"
    num = len(assessments)
    return f"test split, {len(assessments[0].embedded.where)} pairs, {num} seed{'s' * (num > 1)}, 95 % over {unit}"


def _record(
    job: Job,
    data: CaptionSet,
    assessed: Assessed,
    found: Mapping[str, Mapping[str, Any]],
    embedder: Embedder,
    units: Mapping[str, Sequence[Unit]],
) -> ClipRecord:
    first = next(iter(assessed))
    shown, kinds = assessed[first][0], found[first]
    seen = shown.embedded
    findings = _findings(found)
    names = [name for name in data.findings if finding_metric(name) in kinds.get("zero-shot", {})]
    pictures = [(draw_losses(job.folder / "figures", units), "Training, of the first seed.")] if units else []
    return ClipRecord(
        title=f"{job.kind.replace('_', ' ')}: {job.name}",
        command=job.command,
        data=f"{len(data)} images with captions; {len(seen.where)} in the test split.",
        sentence=_sentence(found, len(seen.where)),
        num_pairs=len(seen.where),
        retrieval={method: of["retrieval"] for method, of in found.items()},
        curves={method: of["curve"] for method, of in found.items()},
        protocol={method: mean_protocol(of_seeds) for method, of_seeds in assessed.items()},
        findings=findings,
        num_positive={
            finding_metric(n): int(data.has_finding[seen.where, data.findings.index(n)].sum()) for n in names
        },
        averaged=[finding_metric(name) for name in shown.averaged],
        attributes={k.removeprefix("attribute/"): of for k, of in kinds.items() if k.startswith("attribute/")},
        num_classes={attribute: len(values) for attribute, values in PROMPTS.items()},
        foils=_foils(found),
        similarity=_matrix(seen),
        text_queries=_text_queries(data, seen) if job.recipe.data.deidentified else (),
        image_queries=_image_queries(data, seen) if job.recipe.data.deidentified else (),
        pairs=shown.pairs and _pair_record(data, seen, shown.pairs),
        tone="neutral",
        pictures=pictures,
        model=_about(embedder),
        config=job.config,
        environment=environment(),
        notes=data.notes,
    )


def _findings(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Zero-shot of every method; of the first also the control and the probe."""
    rows = {method: of["zero-shot"] for method, of in found.items() if "zero-shot" in of}
    first = next(iter(found.values()))
    return rows | {kind: first[kind] for kind in ("shuffled labels", "linear probe") if kind in first}


def _foils(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Method -> which fact is wrong -> figure."""
    rows = {
        method: {kind.removeprefix("foil/"): of[kind][kind] for kind in of if kind.startswith("foil/")}
        for method, of in found.items()
    }
    return {method: kinds for method, kinds in rows.items() if kinds}


def _sentence(found: Mapping[str, Mapping[str, Any]], num_pairs: int) -> str:
    """What the first method reaches."""
    method, kinds = next(iter(found.items()))
    parts = [
        f"{words} R@1 {_with_interval(kinds['retrieval'][metric])}"
        for metric, words in (("i2t_recall_1", "image to text"), ("t2i_recall_1", "text to image"))
    ]
    text = f"{method} finds the right one of {num_pairs}: {', '.join(parts)}."
    if "zero-shot" in kinds:
        zero, control = (kinds[kind]["macro_auroc"] for kind in ("zero-shot", "shuffled labels"))
        text += f" Zero-shot AUROC, mean over findings: {_with_interval(zero)}; "
        text += f"with shuffled labels {_with_interval(control)}."
    return text


def _with_interval(figure: Mapping[str, Any]) -> str:
    return f"{figure['mean']:.3f} ({figure['ci_low']:.3f} to {figure['ci_high']:.3f})"


def _matrix(seen: Embedded) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of a few pairs drawn at random, and which belong together."""
    some = np.random.default_rng(0).permutation(len(seen.where))[:_MATRIX]
    return seen.image[some] @ seen.text[some].T, share_group(seen.groups[some], seen.groups[some])


def _text_queries(data: CaptionSet, seen: Embedded) -> list[TextQuery]:
    some = _drawn(seen)
    rows, cosines = nearest(seen.text[some], seen.image, _NEAREST)
    hits = [share_group(seen.groups[[i]], seen.groups[found])[0] for i, found in zip(some, rows, strict=True)]
    return [
        TextQuery(data.captions[seen.where[i]][0], _pictures(data, seen.where[found]), hit.tolist(), cosine.tolist())
        for i, found, hit, cosine in zip(some, rows, hits, cosines, strict=True)
    ]


def _image_queries(data: CaptionSet, seen: Embedded) -> list[ImageQuery]:
    some = _drawn(seen)
    rows, cosines = nearest(seen.image[some], seen.text, _NEAREST)
    queries = []
    for i, found, cosine in zip(some, rows, cosines, strict=True):
        captions = [data.captions[seen.where[j]][0] for j in found]
        hits = share_group(seen.groups[[i]], seen.groups[found])[0].tolist()
        queries.append(ImageQuery(_pictures(data, seen.where[[i]])[0], captions, hits, cosine.tolist()))
    return queries


def _drawn(seen: Embedded) -> np.ndarray:
    return np.random.default_rng(1).permutation(len(seen.where))[:_QUERIES]


def _pictures(data: CaptionSet, where: np.ndarray) -> list[np.ndarray]:
    """(H, W) grey or (H, W, 3) in [0, 1]."""
    images = data.batch(where).unit_image().numpy()
    return [image[0] if len(image) == 1 else image.transpose(1, 2, 0) for image in images]


def _pair_record(data: CaptionSet, seen: Embedded, pairs: Pairs) -> PairCalibration:
    scores = pairs.scores
    grid = np.linspace(scores.cosines.min(), scores.cosines.max(), 100)
    probabilities = {"before": pairs.before(scores.cosines), "after": pairs.calibration(scores.cosines)}
    groups = (data.patients if data.has_patients else data.rows)[seen.where][scores.rows]
    of_pairs = {
        when: bootstrap_ci(
            [binary_statistic(values, scores.targets, 0.5)], [groups], unit="patient" if data.has_patients else "image"
        )
        for when, values in probabilities.items()
    }
    return PairCalibration(scores.cosines, scores.targets, probabilities, of_pairs, (grid, pairs.calibration(grid)))


def _about(embedder: Embedder) -> dict[str, Any]:
    model = embedder.bundle.model
    licences = {f"licence of {part}": what["name"] for part, what in embedder.bundle.licences.items()}
    return {"method": model["method"], "temperature": model["temperature"], "dimension": embedder.dimension} | licences


def _log(job: Job, page: Path) -> None:
    """Into MLflow; pictures and captions of patients only from sets that are marked deidentified."""
    job.outbox.artifact(job.folder / "table.csv")
    job.outbox.artifact(job.folder / "table.md")
    for picture in sorted((job.folder / "figures").glob("*.png")):
        job.outbox.artifact(picture, "figures")
    if job.recipe.data.deidentified:
        job.outbox.artifact(page)
        job.outbox.artifact(job.folder / INDEX)
