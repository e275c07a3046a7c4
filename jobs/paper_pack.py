"""Write the publication pack of a study: tables, figures, methods and checklists, made of what its runs wrote down.

    python jobs/paper_pack.py --run RUN
    python jobs/paper_pack.py --run RUN --cross-validation FOLDS --evaluation EVALUATION --to paper

RUN is a training, FOLDS one with --cv on the same data, EVALUATION an `evaluate_classifier.py` of RUN's model on an
external test set: folders, or names of runs in the storage. The cohort is counted from the manifest, the flow of
exclusions from the import.json beside it. What only people know goes into study.toml in the same folder, and the same
command fills the blanks.
"""

from dataclasses import dataclass
from pathlib import Path

from raymed.command import command
from raymed.report.paper import paper_pack
from raymed.results.finished import find_run
from raymed.results.paper import missing, paper_of
from raymed.results.paper_study import read_study


@dataclass(frozen=True)
class PaperPack:
    """Which runs, and where to."""

    run: str
    """A finished training: its folder, or its name in the storage."""
    cross_validation: str | None = None
    """A finished cross-validation on the same data."""
    evaluation: str | None = None
    """A finished evaluation of its model on an external test set."""
    to: Path = Path("paper")
    """Folder for the pack."""
    storage: str | None = None
    """Where raymed keeps things; None = $RAYMED_HOME, else ~/.raymed."""


def write(config: PaperPack) -> str:
    """Write the pack; returns what is in it, and what is still to be filled in."""
    training = find_run(config.run, config.storage)
    evaluation, folds = (
        find_run(run, config.storage) if run else None for run in (config.evaluation, config.cross_validation)
    )
    record = paper_of(training, evaluation, folds, read_study(config.to / "study.toml"))
    pack = paper_pack(record, config.to)
    lines = [f"{len(pack.files)} files in {pack.folder.absolute()}"]
    lines += [note for run in (training, evaluation) if run for note in missing(run)]
    if pack.blanks:
        lines += [f"to fill in, most of it in {config.to / 'study.toml'}:", *(f"  {blank}" for blank in pack.blanks)]
    return "\n".join([*lines, f"methods: {(pack.folder / 'methods.md').absolute()}"])


if __name__ == "__main__":
    command(PaperPack, write)
