"""A bundle as MLflow runs it: a table of image files (and texts) in, a table of answers out.

MLflow copies this file into the logged model and runs it to load the model ("models from code"), so that nothing is
pickled; what it needs is `raymed`, installed. All of the work is `raymed.tasks.handler`'s, which any other server calls
alike. The input is the content of image files, not arrays: whoever asks sends the PNG, JPEG, TIFF or DICOM file as it
is, of any size, and what happens to it afterwards (window, photometric interpretation, size, depth) is what happened in
training. Over HTTP bytes are base64, as MLflow does by itself:

    {"dataframe_records": [{"image": "iVBORw0KGgo..."}, ...]}

Of a CLIP also, where an empty `image` or `text` is none:

    {"dataframe_records": [{"image": "iVBORw0KGgo...", "text": "a nodule"}, ...]}
    {"dataframe_records": [...], "params": {"task": "zero_shot", "prompts": "{\\"nodule\\": [...], ...}"}}
    {"dataframe_records": [{"text": "a nodule"}], "params": {"task": "retrieve", "k": 5}}

The index that `retrieve` searches is named when the model is loaded, never by a request:
`load_model(uri, model_config={"index": "s3://bucket/index.parquet"})`, or
MLFLOW_PYFUNC_INFERENCE_CONFIG='{"index": ...}' where a program of MLflow loads it.
"""

from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc import PythonModel, PythonModelContext
from mlflow.utils.yaml_utils import read_yaml

from raymed.bundle import Bundle
from raymed.registry.schema import answer_table
from raymed.tasks.handler import load_handler


class BundleModel(PythonModel):
    """Answers with the bundle that was logged beside it."""

    def load_context(self, context: PythonModelContext) -> None:
        """Build the handler, once."""
        folder = Path(context.artifacts["bundle"])
        bundle = Bundle.load(folder)
        self.kind = bundle.kind
        self.handler = load_handler(bundle, index=(context.model_config or {}).get("index"))
        self.origin = _registered(folder.parents[1]) | {"run": bundle.provenance.get("run_key")}

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:
        """One row a row of the input, in its order; columns: `raymed.registry.schema`.

        Raises UserError naming the row (from 0) of what cannot be used.
        """
        given = model_input.astype(object).where(model_input.notna(), None)  # an empty cell is nan or NA
        rows = self.handler.handle({"rows": given.to_dict("records"), **(params or {})})
        return answer_table(self.kind, [row | self.origin for row in rows])


def _registered(root: Path) -> dict[str, str | None]:
    """Registered name and version, which MLflow writes beside a model that it loads from the registry; None for a model
    that is loaded from elsewhere."""
    name = "registered_model_meta"
    known = read_yaml(str(root), name) if (root / name).is_file() else {}
    return {"model": known.get("model_name"), "version": str(known["model_version"]) if known else None}


mlflow.models.set_model(BundleModel())
