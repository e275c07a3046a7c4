"""What a registered model takes and answers, what it needs installed, and an input to try it with."""

import importlib.metadata
import io
from typing import TYPE_CHECKING

import numpy as np

from raymed.bundle import Bundle
from raymed.models.encoder import BUILT_IN

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.models import ModelSignature

ANSWER = {
    "probability": "double",
    "raw_probability": "double",
    "decision": "string",
    "threshold": "double",
    "uncertain": "boolean",
    "mahalanobis": "double",
    "knn": "double",
    "foreign": "boolean",
    "model": "string",
    "version": "string",
    "run": "string",
}
"""Columns of an answer. None where the bundle has no uncertain band, or no statistics of foreign images, and for model
and version of a model that is not loaded from the registry. run: key of the training run."""
ALWAYS = ("probability", "raw_probability", "decision", "threshold")


def signature() -> "ModelSignature":
    """The content of an image file in, `ANSWER` out; one row an image."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    image = Schema([ColSpec(DataType.binary, "image")])
    answer = Schema([ColSpec(DataType[kind], name, required=name in ALWAYS) for name, kind in ANSWER.items()])
    return ModelSignature(image, answer)


def input_example(bundle: Bundle) -> "pd.DataFrame":
    """One PNG of noise, of the network's size and depth: an image of a patient never goes with a model."""
    import pandas as pd
    from PIL import Image

    size = bundle.preprocess["size"]
    shape = (size, size) if bundle.preprocess["channels"] == 1 else (size, size, 3)
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)).save(file, "PNG")
    return pd.DataFrame({"image": [file.getvalue()]})


def requirements(bundle: Bundle) -> list[str]:
    """What decides a prediction, in the versions installed here; raymed brings the rest."""
    packages = ["raymed", "mlflow", "numpy", "pandas", "pillow", "pydicom", "torch"]
    if bundle.model["encoder"]["backbone"] != BUILT_IN:
        packages.append("timm")
    # Without the part behind "+" (the CPU or CUDA build), which is no version that PyPI has.
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in packages]
