"""Write a phantom hospital: HSG examinations of nobody as they come off a file share, with a sheet of labels.

    python jobs/write_hospital.py --to hospital

The whole way from a share to a paper can be tried on it. The command that imports it is printed last.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from raymed.command import command
from raymed.data.phantom_hospital import write_hospital


@dataclass(frozen=True)
class WriteHospital:
    """How large a hospital, and where to."""

    to: Path = Path("hospital")
    """A new folder."""
    num_studies: int = 60
    """Examinations, of two images each; at least 12."""
    size: int = 160
    """Height and width of the images in pixels."""
    seed: int = 0
    """Another number gives other patients."""


def write(config: WriteHospital) -> str:
    """Write the hospital; returns where it is, and how it is imported."""
    folder = write_hospital(config.to, num_studies=config.num_studies, seed=config.seed, size=config.size)
    columns = "--columns.label Result --columns.readers Reader1 Reader2 --columns.patient PatientID"
    labels = "--map occluded=폐쇄,occ. patent=개통 --unlabelled equivocal '판정 불가' --positive occluded"
    told = f"--patients {shlex.quote(str(folder / 'mapping.csv'))} --modalities RF XA --site InstitutionName"
    lines = [
        f"python jobs/import_data.py --images {shlex.quote(str(folder / 'images'))}",
        f"    --labels {shlex.quote(str(folder / 'labels.xlsx'))} --sheet Labels {columns}",
        f"    {labels}",
        f"    {told} --on-problem skip",
    ]
    return f"hospital: {folder.absolute()}\nimport with:\n  " + " \\\n  ".join(lines)


if __name__ == "__main__":
    command(WriteHospital, write)
