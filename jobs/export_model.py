"""Write a trained model as a file that other programs run: ONNX, torch.export, or a MONAI bundle.

    python jobs/export_model.py --bundle RUN/model
    python jobs/export_model.py --model models:/hsg-supcon-asl@champion --format torch --to model.pt2

The file goes from pixels to probabilities. It is written only if it gives the bundle's own probabilities.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from raymed.bundle import Bundle
from raymed.command import command
from raymed.config import UserError
from raymed.data.readers import read
from raymed.registry.export import Format, export, export_monai
from raymed.registry.store import fetch_bundle
from raymed.storage import local_folder_copy, resolve_storage
from raymed.tracking import connect


@dataclass(frozen=True)
class ExportModel:
    """Which model, as what, where to."""

    bundle: str | None = None
    """Folder of a bundle, or its s3:// location."""
    model: str | None = None
    """A registered model in its place: models:/NAME@ALIAS or models:/NAME/VERSION."""
    format: Format = "onnx"
    """onnx, torch (torch.export, .pt2) or monai (a folder)."""
    to: Path = Path("model")
    """File to write, the format's ending added; a new folder for monai."""
    images: tuple[Path, ...] = ()
    """Image files to check the exported network with; none = noise."""
    storage: str | None = None
    """Where raymed keeps things; None = $RAYMED_HOME, else ~/.raymed."""
    tracking: str | None = None
    """MLflow tracking URI; None = $MLFLOW_TRACKING_URI, else the sqlite store in the storage."""

    def __post_init__(self) -> None:
        if (self.bundle is None) == (self.model is None):
            raise UserError("give either --bundle FOLDER or --model models:/NAME@ALIAS")


def write(config: ExportModel) -> str:
    """Export; returns where it is and how well it agrees."""
    with TemporaryDirectory() as temporary:
        if config.bundle is not None:
            folder = local_folder_copy(config.bundle)
        else:
            client = connect(config.tracking, resolve_storage(config.storage))
            folder = fetch_bundle(client, str(config.model), Path(temporary))
        if config.format == "monai":
            return f"exported: {export_monai(folder, config.to).absolute()}"
        bundle = Bundle.load(folder)
        images = [read(path, window=bundle.preprocess.get("window")) for path in config.images]
        done = export(bundle, config.to, config.format, images)
    checked = f"{done.num_images} {'images' if images else 'images of noise'}"
    return f"largest difference of a probability: {done.difference:.1e}, {checked}\nexported: {done.path.absolute()}"


if __name__ == "__main__":
    command(ExportModel, write)
