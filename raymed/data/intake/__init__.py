"""From a hospital's file share and a sheet of labels to a manifest that names nobody."""

from raymed.data.intake.importer import ImportReport, import_data
from raymed.data.intake.settings import ImportConfig, SheetColumns

__all__ = ["ImportConfig", "ImportReport", "SheetColumns", "import_data"]
