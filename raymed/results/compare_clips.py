"""Two CLIPs on one set of images and captions that neither has seen: which finds the right one more often.

Both look up the same images and captions among all of the set, and every resample of patients is the same for both, as
in `raymed.results.compare`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from raymed.bundle import Bundle
from raymed.config import UserError, from_dict, replace
from raymed.data.captions import CaptionConfig, CaptionSet
from raymed.data.preprocess import Preprocess
from raymed.data.problems import rows_text
from raymed.metrics.bootstrap import Figure, paired_bootstrap_difference
from raymed.metrics.retrieval import retrieval_statistic
from raymed.results.assess import Embedded
from raymed.results.seen import knows_training_set, unseen
from raymed.storage import local_folder
from raymed.tasks.embedder import Embedder
from raymed.tasks.external import CaptionedPairs
from raymed.train.compute import Compute
from raymed.train.runs.job import Job, RunConfig, open_job
from raymed.train.runs.openings import open_test
from raymed.train.unit import load_data


@dataclass(frozen=True)
class ClipComparison:
    """Two models and a data set."""

    recipe: CaptionedPairs = CaptionedPairs()
    models: tuple[str, ...] = ()
    """Two: models:/NAME/VERSION of the registry."""
    compute: Compute = Compute()
    run: RunConfig = RunConfig()


def compare_clips(config: ClipComparison, bundles: Sequence[Bundle]) -> Path:
    """Embed with both, each of which reads the images as it was trained to, and subtract; returns the path of the
    summary, whose `differences` are figures of (first model - second) of `retrieval_statistic`.

    bundles: of config.models, in their order. Raises UserError where a model was trained on a patient (unless such are
    left out) or does not say on whom, or cannot read an image that the other can.
    """
    first, second = (_read_by(bundle, config.recipe.data) for bundle in bundles)
    with open_job("compare_clips", replace(config, {"recipe.data": first})) as job:
        other = CaptionedPairs(dataclasses.replace(second, manifest=job.recipe.data.manifest))
        sets = [cast(CaptionSet, data) for data in (job.data, load_data(other, local_folder(job.storage, "cache")))]
        differences, notes = _differences(job, bundles, sets)
        openings = open_test(job.storage, job.data, job.key)
        job.outbox.metrics({f"difference/{name}": figure["mean"] for name, figure in differences.items()}, 0)
        extra = {"models": config.models, "differences": differences, "test_openings": openings}
        return job.finish({}, {"run": job.folder}, notes=[*notes, *job.data.notes], **extra)


def _read_by(bundle: Bundle, data: CaptionConfig) -> CaptionConfig:
    if bundle.kind != "clip":
        raise UserError(f"the model is a {bundle.kind}, not a CLIP")
    return dataclasses.replace(data, preprocess=from_dict(Preprocess, bundle.preprocess))


def _differences(
    job: Job, bundles: Sequence[Bundle], sets: Sequence[CaptionSet]
) -> tuple[dict[str, Figure], list[str]]:
    """Over the images that are new to both models, and which are not."""
    names, data, notes = ("the first model", "the second model"), sets[0], []
    if differing := sorted(set(data.rows.tolist()) ^ set(sets[1].rows.tolist())):
        raise UserError(f"only one of the models can use {rows_text(differing)}: leave them out of the manifest")
    if unknown := [name for name, bundle in zip(names, bundles, strict=True) if not knows_training_set(bundle)]:
        raise UserError(f"{' and '.join(unknown)} does not say what it was trained on: it may have seen these patients")
    models = dict(zip(names, zip(bundles, sets, strict=True), strict=True))
    where = unseen(models, data.splits["test"], job.recipe.data.on_problem, notes)
    device = str(job.config.compute.resolved_device())
    statistics = []
    for bundle, of_model in zip(bundles, sets, strict=True):
        kept = dataclasses.replace(of_model, splits={"test": where})
        seen = Embedded.of(Embedder.from_bundle(bundle, device), kept, "test")
        statistics.append(retrieval_statistic(seen.image, seen.text, seen.groups))
    groups = (data.patients if data.has_patients else data.rows)[where]
    unit = "patient" if data.has_patients else "image"
    return paired_bootstrap_difference(statistics[:1], statistics[1:], [groups], unit=unit), notes
