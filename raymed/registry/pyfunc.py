"""A bundle as MLflow runs it: a table of image files in, a table of predictions out.

MLflow copies this file into the logged model and runs it to load the model ("models from code"), so that nothing is
pickled; what it needs is `raymed`, installed. The input is the content of image files, not arrays: whoever asks sends
the PNG, JPEG, TIFF or DICOM file as it is, of any size, and what happens to it afterwards (window, photometric
interpretation, size, depth) is what happened in training. Over HTTP bytes are base64, as MLflow does by itself:

    {"dataframe_records": [{"image": "iVBORw0KGgo..."}, ...]}
"""

import tempfile
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext
from mlflow.utils.yaml_utils import read_yaml

from raymed.bundle import Bundle
from raymed.config import UserError
from raymed.data.readers import read
from raymed.registry.schema import ANSWER
from raymed.tasks.predictor import Predictor


class BundleModel(PythonModel):
    """Predicts with the bundle that was logged beside it."""

    def load_context(self, context: PythonModelContext) -> None:
        """Build the predictor, once."""
        folder = Path(context.artifacts["bundle"])
        bundle = Bundle.load(folder)
        self.predictor = Predictor.from_bundle(bundle)
        self.origin = _registered(folder.parents[1]) | {"run": bundle.provenance.get("run_key")}

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:
        """One row an image, in the order of the input; columns: `raymed.registry.schema.ANSWER`.

        Column `image` of the input: the bytes of a file. Raises UserError naming the row (from 0) of an image that
        cannot be used.
        """
        images = [self._read(row, content) for row, content in enumerate(model_input["image"])]
        rows = [prediction.row() | self.origin for prediction in self.predictor(images)]
        return pd.DataFrame(rows, columns=list(ANSWER))

    def _read(self, row: int, content: bytes) -> np.ndarray:
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            try:
                return read(file.name, window=self.predictor.preprocess.window)
            except UserError as error:
                raise UserError(f"image {row}: {error}") from None


def _registered(root: Path) -> dict[str, str | None]:
    """Registered name and version, which MLflow writes beside a model that it loads from the registry; None for a model
    that is loaded from elsewhere."""
    name = "registered_model_meta"
    known = read_yaml(str(root), name) if (root / name).is_file() else {}
    return {"model": known.get("model_name"), "version": str(known["model_version"]) if known else None}


mlflow.models.set_model(BundleModel())
