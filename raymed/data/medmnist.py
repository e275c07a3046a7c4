"""MedMNIST archives: an npz with {train,val,test}_images (N, H, W[, 3]) uint8 and {train,val,test}_labels (N, 1).

The archive states neither patients nor the names of its classes; the names are those MedMNIST publishes (Yang et al.,
"MedMNIST v2", Scientific Data 2023).
"""

import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from raymed.config import UserError
from raymed.data.locations import Location, near
from raymed.data.readers import ImageProblem, Window, check_varies

_ORGANS = (
    "bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver", "lung-left", "lung-right",
    "pancreas", "spleen",
)  # fmt: skip
CLASS_NAMES = {
    "bloodmnist": (
        "basophil", "eosinophil", "erythroblast", "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)",
        "lymphocyte", "monocyte", "neutrophil", "platelet",
    ),
    "breastmnist": ("malignant", "normal, benign"),
    "dermamnist": (
        "actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma", "benign keratosis-like lesions",
        "dermatofibroma", "melanoma", "melanocytic nevi", "vascular lesions",
    ),
    "octmnist": ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal"),
    "organamnist": _ORGANS,
    "organcmnist": _ORGANS,
    "organsmnist": _ORGANS,
    "pathmnist": (
        "adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa",
        "cancer-associated stroma", "colorectal adenocarcinoma epithelium",
    ),
    "pneumoniamnist": ("normal", "pneumonia"),
    "tissuemnist": (
        "Collecting Duct, Connecting Tubule", "Distal Convoluted Tubule", "Glomerular endothelial cells",
        "Interstitial endothelial cells", "Leukocytes", "Podocytes", "Proximal Tubule Segments",
        "Thick Ascending Limb",
    ),
}  # fmt: skip
"""Class names by label number, by name of the set."""


@dataclass(eq=False)
class Archive:
    """An npz whose images are read when the first of them is asked for."""

    path: Location
    _images: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def images(self, split: str) -> np.ndarray:
        """All images of a split (N, H, W) or (N, H, W, 3)."""
        if split not in self._images:
            with np.load(near(self.path), allow_pickle=False) as npz:
                images = npz[f"{split}_images"]
            two_d = images.ndim in (3, 4) and images.shape[3:] in ((), (3,))
            if not two_d or images.dtype not in (np.uint8, np.uint16):
                raise UserError(
                    f"{self.path}: {split}_images must be 2-D images (N, H, W) or (N, H, W, 3) in uint8 or uint16, "
                    f"got {images.shape} {images.dtype}"
                )
            self._images[split] = images
        return self._images[split]


@dataclass(frozen=True)
class ArchiveImage:
    """One image of an archive."""

    archive: Archive
    split: str
    number: int

    @property
    def path(self) -> Location:
        """The archive."""
        return self.archive.path

    def identity(self) -> tuple[str | int | None, ...]:
        """Path of the archive, and where the image lies in it."""
        return str(self.path), self.split, self.number

    def at(self, path: Path) -> "ArchiveImage":
        """The same image: an archive finds its copy by itself, since its images are read once for all of them."""
        return self

    def read(self, window: Window | None = None) -> np.ndarray:
        """The pixels. Raises ImageProblem. There is nothing to window."""
        images = self.archive.images(self.split)
        if self.number >= len(images):
            raise ImageProblem(f"{self.split}_images ends after {len(images)} images")
        return check_varies(images[self.number])


def read_archive(path: Location, names: tuple[str, ...]) -> tuple[pd.DataFrame, tuple[str, ...], list[ArchiveImage]]:
    """The archive as a table with the columns image, label, split; the names of its classes; where the images lie.

    `names` by label number; empty: the published ones, and where there are none, the numbers. A number without a name
    stays a number.

    Raises:
        UserError: not an npz of this kind.
    """
    names = names or CLASS_NAMES.get(re.sub(r"_\d+$", "", PurePosixPath(path).stem), ())
    labels = _read_labels(path)
    rows = [
        (f"{split}_images[{i}]", names[k] if 0 <= k < len(names) else str(k), split)
        for split, numbers in labels.items()
        for i, k in enumerate(numbers)
    ]
    archive = Archive(path)
    sources = [ArchiveImage(archive, split, i) for split, numbers in labels.items() for i in range(len(numbers))]
    return pd.DataFrame(rows, columns=["image", "label", "split"]), names, sources


def _read_labels(path: Location) -> dict[str, list[int]]:
    labels = {}
    try:
        with np.load(near(path), allow_pickle=False) as npz:
            for split in ("train", "val", "test"):
                if f"{split}_images" in npz and f"{split}_labels" in npz:
                    labels[split] = npz[f"{split}_labels"]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not an npz archive, or a damaged one ({error})") from error
    if not labels:
        raise UserError(f"{path} has no train_images and train_labels: a MedMNIST archive is expected")
    for split, array in labels.items():
        if array.shape[1:] not in ((), (1,)) or array.dtype.kind not in "iu":
            what = f"got {array.shape} {array.dtype}"
            raise UserError(f"{path}: {split}_labels must be one whole number an image, {what}")
    return {split: array.reshape(-1).tolist() for split, array in labels.items()}
