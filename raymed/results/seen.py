"""Whether a model has seen a patient that it is to be tested on.

A bundle knows the contents of all images that had a say in its weights, their choice or its threshold; a patient of
whom one is among these images was seen. Images are told by their pixels as read, so that another name or another
manifest does not hide them; a copy with other pixels (another window, a blanked text) is not recognised, but the
patient is by any other image and, where an import with the same key named him, by his pseudonym.
"""

from collections.abc import Mapping

import numpy as np

from raymed.bundle import Bundle
from raymed.config import UserError
from raymed.data.dataset import DataSet
from raymed.data.problems import rows_text
from raymed.train.unit import TRAINED_ON


def knows_training_set(bundle: Bundle) -> bool:
    """Whether the bundle says what it was trained on."""
    return TRAINED_ON in bundle.extras


def seen_by(bundle: Bundle, data: DataSet, where: np.ndarray) -> np.ndarray:
    """(N,) bool: which of the images at `where` (N,) are of a patient of whom the model has seen an image.

    Without patients in the data, of a case of which it has; without cases, images that it has. All False where the
    bundle does not say what it was trained on.
    """
    if not knows_training_set(bundle):
        return np.zeros(len(where), bool)
    groups, seen = data.patients, bundle.extras[TRAINED_ON].numpy()
    known = np.isin(data.content.view(np.int64), seen) | np.isin(data.patient_keys.view(np.int64), seen)
    return np.isin(groups[where], np.unique(groups[known]))


def unseen(
    models: Mapping[str, tuple[Bundle, DataSet]], where: np.ndarray, on_problem: str, notes: list[str]
) -> np.ndarray:
    """The indices at `where` of which no model has seen the patient.

    Args:
        models: name -> bundle, and the data set as it reads it; all have the same rows.
        on_problem: "error": one that was seen raises. "skip": it is left out, and `notes` says so.

    Raises:
        UserError: a seen patient, by the rows of the manifest; nobody is left.
    """
    kept = np.ones(len(where), bool)
    for name, (bundle, data) in models.items():
        seen = seen_by(bundle, data, where)
        if not seen.any():
            continue
        unit = f"{data.grouped_by}s"
        rows = rows_text(data.rows[where[seen]].tolist())
        if on_problem == "error":
            raise UserError(
                f"{name} was trained, or its threshold chosen, on {unit} of this manifest, {rows}: figures there would "
                "be too good. Take another manifest, or leave these rows out, counted: --data.on-problem skip"
            )
        notes.append(f"left out, {unit} that {name} was trained on: {rows}")
        kept &= ~seen
    if not kept.any():
        raise UserError("\n".join([f"the manifest has nobody who is new to {' and '.join(models)}:", *notes]))
    return where[kept]
