"""Images for a data sheet: which are shown, and how the network receives them."""

from __future__ import annotations

import numpy as np
import pandas as pd

from raymed.data.augment import Augment
from raymed.data.dataset import DataSet
from raymed.random import derive

_SAMPLE = 64  # training images that the scale of grey is taken from


def drawn_for(data: DataSet, label: str, num: int) -> np.ndarray:
    """Indices of training images of a class, drawn at random, of different patients as far as there are; ascending."""
    of_class = data.class_codes[data.splits["train"]] == data.classes.index(label)
    chosen = data.splits["train"][of_class]
    np.random.default_rng(derive(0, "data sheet", label)).shuffle(chosen)
    again = pd.Series(data.patients[chosen]).duplicated().to_numpy()
    return np.sort(np.concatenate([chosen[~again], chosen[again]])[:num])


def network_input(data: DataSet, indices: np.ndarray, augment: Augment | None = None) -> np.ndarray:
    """(B, H, W) or (B, H, W, 3) float32: what the network receives of the images at `indices`, in the first step of
    training where `augment` is given. Normalisation by the data set is left out, since it changes all images alike."""
    batch = data.batch(indices)
    image = batch.unit_image()
    if augment is not None:
        image = augment(image, batch.index, step=0, seed=0)
    if data.preprocess.normalisation == "image":
        image = data.preprocess.normalise(image)
    values = image.permute(0, 2, 3, 1).numpy()
    return values[..., 0] if values.shape[-1] == 1 else values


def grey_scale(data: DataSet) -> tuple[float, float]:
    """The values that are black and white: all but 0.5 % at each end of some training images."""
    train = data.splits["train"]
    values = network_input(data, train[:: max(1, len(train) // _SAMPLE)])
    low, high = np.percentile(values, [0.5, 99.5])
    return float(low), float(max(high, low + 1e-6))
