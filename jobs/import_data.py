"""Make a manifest of your own images and a sheet of labels, with pseudonyms in place of patients.

    python jobs/import_data.py --images DIR --labels sheet.xlsx --key AccessionNumber
    python jobs/import_data.py --images DIR --labels sheet.xlsx --columns.label Result --map occluded=occ patent=open
    python jobs/import_data.py --images DIR --labels table.csv --key path --columns.key file --columns.patient pid

Images are found below DIR by their content and linked to rows by a tag of DICOM or by their path. What does not match,
or cannot be used, is counted and listed. Pixels are copied without headers, and what looks like text in them is
blanked. The key of the pseudonyms lies outside the project (--key-file): `jobs/whois.py` takes them back where it is.
The command that trains on the manifest is printed last.
"""

from raymed.command import command
from raymed.data.intake import ImportConfig, import_data


def work(config: ImportConfig) -> str:
    """Import; returns what was done."""
    return import_data(config).text()


if __name__ == "__main__":
    command(ImportConfig, work)
