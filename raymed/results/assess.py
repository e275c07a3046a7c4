"""What a trained embedding of images and texts can do: retrieval, zero-shot findings, what its features hold, and how
far its cosines can be trusted.

Everything is a `Statistic` of rows, so that seeds and patients are resampled together (`Assessment.figures`). Rows are
those of one split; what needs fitting (probe, calibration) is fitted on training and validation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np

from raymed.bundle import Bundle
from raymed.config import UserError
from raymed.data.captioned import ATTRIBUTES, FOILS, PROMPTS, answers, foils, is_captioned
from raymed.data.captions import CaptionSet
from raymed.metrics.bootstrap import bootstrap_ci
from raymed.metrics.calibration import Calibration
from raymed.metrics.classification import Statistic
from raymed.metrics.probe import probe_findings
from raymed.metrics.retrieval import batch_protocol, recall_statistic, retrieval_ranks, retrieval_statistic
from raymed.metrics.similarity import PairScores, SimilarityCalibration, calibrate_similarity, pair_scores
from raymed.metrics.zero_shot import (
    class_embeddings,
    finding_scores,
    foil_statistic,
    multiclass_statistic,
    shuffled_control,
    told_findings,
    zero_shot_statistic,
)
from raymed.tasks.embedder import Embedder
from raymed.tasks.prompts import Prompts
from raymed.tasks.texts import case_of, picture_of, said_alike
from raymed.train.unit import Unit, predictions, unit_data

CURVE = (1, 2, 3, 5, 10, 20, 50, 100)
"""K of the curves of R@K."""


@dataclass(frozen=True)
class Embedded:
    """A split as a model sees it: image, text (N, D) of unit norm; groups (N, K), which pairs say the same; where (N,),
    indices of the data set."""

    image: np.ndarray
    text: np.ndarray
    groups: np.ndarray
    where: np.ndarray

    @classmethod
    def of(cls, embedder: Embedder, data: CaptionSet, split: str) -> "Embedded":
        """By a model in use: every image with its first caption."""
        where = data.splits[split]
        captions = [data.captions[i][0] for i in where]
        number: dict[str, int] = {}
        said = np.array([number.setdefault(text, len(number)) for text in captions], np.int64)
        return cls(
            embedder.embed_data(data, where),
            embedder.embed_texts(captions),
            said_alike(case_of(data)[where], picture_of(data)[where], said),
            where,
        )


@dataclass(frozen=True)
class Part:
    """A statistic, and which of a split's rows it is of; None = all."""

    statistic: Statistic
    rows: np.ndarray | None = None


@dataclass(frozen=True)
class Assessment:
    """One model on one split.

    parts: kind ("retrieval", "curve", "zero-shot", "shuffled labels", "linear probe", "attribute/NAME", "foil/KIND") ->
    its statistic. protocol: `batch_protocol`. pairs: matched and random pairs of the split with their calibration, None
    where there is no such pair.
    """

    embedded: Embedded
    parts: dict[str, Part]
    protocol: dict[str, Any]
    pairs: "Pairs | None"
    averaged: tuple[str, ...] = ()
    """Findings that are common enough for the average."""


@dataclass(frozen=True)
class Pairs:
    """Matched and random pairs, and what their cosines are worth as a probability."""

    scores: PairScores
    calibration: SimilarityCalibration
    before: SimilarityCalibration
    report: dict[str, Any] = field(default_factory=dict)


def assess(
    embedder: Embedder,
    data: CaptionSet,
    manifest: str,
    prompts: Prompts,
    embedded: Mapping[str, Embedded],
    split: str = "test",
) -> Assessment:
    """Assess a model on a split. embedded: what it makes of that split and of "val"; those of train are computed where
    a probe needs them. manifest: of the data; that of captioned phantoms tells what is true of each image."""
    seen = embedded[split]
    ranks = retrieval_ranks(seen.image, seen.text, seen.groups)
    parts = {
        "retrieval": Part(retrieval_statistic(seen.image, seen.text, seen.groups)),
        "curve": Part(recall_statistic(ranks, [k for k in CURVE if k <= len(seen.image)])),
    }
    found, averaged = _findings(embedder, data, prompts, embedded, split)
    parts |= found | _attributes(embedder, data.rows[seen.where] - 1, manifest, seen)
    protocol = batch_protocol(seen.image, seen.text, seen.groups)
    return Assessment(seen, parts, protocol, _pairs(embedder, embedded["val"], seen), averaged)


def assess_unit(unit: Unit, prompts: Prompts, split: str = "test") -> Assessment:
    """A finished training, by what it predicted."""
    data = cast(CaptionSet, unit_data(unit))
    embedder = Embedder.from_bundle(Bundle.load(unit.folder / "bundle"), str(unit.compute.resolved_device()))
    seen = {name: _predicted(unit, name) for name in ("val", split)}
    return assess(embedder, data, unit.recipe.data.manifest, prompts, seen, split)


def _predicted(unit: Unit, split: str) -> Embedded:
    arrays = predictions(unit, split)
    return Embedded(arrays["image"], arrays["text"], arrays["groups"], arrays["where"])


def figures(assessments: Sequence[Assessment], data: CaptionSet) -> dict[str, dict[str, Any]]:
    """Kind -> metric -> `Figure` over the seeds of a method, by patient where the data name patients."""
    groups = data.patients if data.has_patients else data.rows
    unit: Literal["patient", "image"] = "patient" if data.has_patients else "image"
    found = {}
    for kind in assessments[0].parts:
        parts = [assessment.parts[kind] for assessment in assessments]
        where = [
            a.embedded.where if part.rows is None else a.embedded.where[part.rows]
            for a, part in zip(assessments, parts, strict=True)
        ]
        found[kind] = bootstrap_ci([part.statistic for part in parts], [groups[i] for i in where], unit=unit)
    return found


def mean_protocol(assessments: Sequence[Assessment]) -> dict[str, Any]:
    """The protocol in small batches, averaged over seeds; the deviation is over repeats within a seed."""
    first = assessments[0].protocol
    return {
        name: {key: float(np.mean([a.protocol[name][key] for a in assessments])) for key in value}
        if isinstance(value, dict)
        else value
        for name, value in first.items()
    }


def _findings(
    embedder: Embedder, data: CaptionSet, prompts: Prompts, embedded: Mapping[str, Embedded], split: str
) -> tuple[dict[str, Part], tuple[str, ...]]:
    """Zero-shot and linear probe of the data's findings, with the control, where there are any."""
    seen, names = embedded[split], data.findings
    present = data.has_finding[seen.where]
    if not names or not present.any():
        return {}, ()
    positive, negative = (_ensembles(embedder, sentences) for sentences in prompts.of(names))
    scores = finding_scores(seen.image, positive, negative)
    train, val = data.splits["train"], embedded["val"]
    probed, _ = probe_findings(
        embedder.embed_data(data, train), data.has_finding[train], val.image, data.has_finding[val.where], seen.image
    )
    parts = {
        "zero-shot": Part(zero_shot_statistic(scores, present, names)),
        "shuffled labels": Part(zero_shot_statistic(scores, shuffled_control(present), names)),
        "linear probe": Part(zero_shot_statistic(probed, present, names)),
    }
    return parts, tuple(names[i] for i in told_findings(scores, present))


def _ensembles(embedder: Embedder, sentences: Sequence[Sequence[str]]) -> np.ndarray:
    """(F, D): of each finding the mean of its sentences."""
    flat = embedder.embed_texts([text for several in sentences for text in several])
    return class_embeddings(np.split(flat, np.cumsum([len(several) for several in sentences])[:-1]))


def _attributes(embedder: Embedder, rows: np.ndarray, manifest: str, seen: Embedded) -> dict[str, Part]:
    """Zero-shot accuracy of each attribute, and how often the true caption is nearer than a foil, of captioned
    phantoms, whose facts are known; nothing of other images. rows: of the manifest, from 0."""
    if not is_captioned(manifest):
        return {}
    parts = {}
    for attribute in ATTRIBUTES:
        values, of_all = list(PROMPTS[attribute]), answers(manifest, attribute)
        right = [of_all[row] for row in rows]
        known = np.array([i for i, value in enumerate(right) if value is not None])
        targets = np.array([values.index(value) for value in right if value is not None])
        if not len(known):
            continue
        scores = seen.image[known] @ embedder.embed_classes(PROMPTS[attribute]).T
        parts[f"attribute/{attribute}"] = Part(multiclass_statistic(scores, targets), known)
    for kind in FOILS:
        of_all = foils(manifest, kind)
        false = [of_all[row] for row in rows]
        asked = np.array([i for i, text in enumerate(false) if text is not None])
        if not len(asked):
            continue
        texts = embedder.embed_texts([text for text in false if text is not None])
        name = f"foil/{kind}"
        parts[name] = Part(foil_statistic(name, seen.image[asked], seen.text[asked], texts), asked)
    return parts


def _pairs(embedder: Embedder, val: Embedded, seen: Embedded) -> Pairs | None:
    scale = 1 / embedder.temperature
    try:
        fitted_on, scores = (pair_scores(e.image, e.text, e.groups) for e in (val, seen))
    except UserError:  # all pairs are of one case
        return None
    calibration, report = calibrate_similarity(fitted_on, scores, scale)
    return Pairs(scores, calibration, SimilarityCalibration(scale, 0.0, Calibration()), report)
