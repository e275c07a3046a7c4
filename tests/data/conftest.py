"""A small set of images on disk, with its manifest."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image


@pytest.fixture
def make_set(tmp_path):
    """make_set(labels, **columns) writes one random 16 x 16 PNG a label and manifest.csv; returns the manifest's path.

    images: {position: pixels} to use instead of random ones.
    """

    def make(labels, images=None, **columns):
        rng = np.random.default_rng(0)
        names = [f"{i:03d}.png" for i in range(len(labels))]
        for i, name in enumerate(names):
            pixels = rng.integers(0, 256, (16, 16), np.uint8)
            Image.fromarray((images or {}).get(i, pixels)).save(tmp_path / name)
        path = tmp_path / "manifest.csv"
        pd.DataFrame({"image": names, "label": labels} | columns).to_csv(path, index=False)
        return path

    return make
