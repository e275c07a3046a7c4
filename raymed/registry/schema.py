"""What a registered model takes and answers, what it needs installed, and an input to try it with."""

import importlib.metadata
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from raymed.bundle import Bundle
from raymed.models.encoder import BUILT_IN
from raymed.tasks.handler import DEFAULT_K, TASKS

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, ParamSchema

ORIGIN = {"model": "string", "version": "string", "run": "string"}
"""Of every answer: model and version None for a model that is not loaded from the registry; run: key of the training
run."""
ANSWER = {
    "probability": "double",
    "raw_probability": "double",
    "decision": "string",
    "threshold": "double",
    "uncertain": "boolean",
    "mahalanobis": "double",
    "knn": "double",
    "foreign": "boolean",
} | ORIGIN
"""Columns of a classifier's answer. None where the bundle has no uncertain band, or no statistics of foreign images."""
ALWAYS = ("probability", "raw_probability", "decision", "threshold")
CLIP_ANSWER = {
    "image_embedding": "numbers",
    "text_embedding": "numbers",
    "similarity": "double",
    "probability": "double",
    "probabilities": "classes",
    "decision": "string",
    "matches": "matches",
    "truncated": "boolean",
} | ORIGIN
"""Columns that a CLIP's answers may have; which of them it has depends on the task (`raymed.tasks.handler`)."""
MATCH = {"rank": "long", "row": "long", "cosine": "double", "caption": "string", "image": "string"}


def answer_table(kind: str, rows: Sequence[dict[str, Any]]) -> "pd.DataFrame":
    """A handler's answer as a table: a classifier's with all columns of `ANSWER`, a CLIP's with those that it has."""
    import pandas as pd

    if kind == "classifier":
        return pd.DataFrame(rows, columns=list(ANSWER))
    names = [name for name in CLIP_ANSWER if name in ORIGIN or any(name in row for row in rows)]
    return pd.DataFrame(rows, columns=names, dtype=object)  # None stays None beside numbers: nan is no JSON


def signature(bundle: Bundle) -> "ModelSignature":
    """The content of an image file in, and of a CLIP a text too; one row in, one row out."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    if bundle.kind == "classifier":
        image = Schema([ColSpec(DataType.binary, "image")])
        answer = Schema([_column(name, kind, required=name in ALWAYS) for name, kind in ANSWER.items()])
        return ModelSignature(image, answer)
    either = Schema(
        [ColSpec(DataType.binary, "image", required=False), ColSpec(DataType.string, "text", required=False)]
    )
    answer = Schema([_column(name, kind, required=name == "truncated") for name, kind in CLIP_ANSWER.items()])
    return ModelSignature(either, answer, _clip_params())


def _clip_params() -> "ParamSchema":
    """What a request to a CLIP says beside its rows. MLflow knows no mapping of free keys here: prompts are JSON."""
    from mlflow.types import ParamSchema, ParamSpec

    return ParamSchema(
        [ParamSpec("task", "string", TASKS[0]), ParamSpec("prompts", "string", ""), ParamSpec("k", "long", DEFAULT_K)]
    )


def _column(name: str, kind: str, required: bool) -> "ColSpec":
    from mlflow.types import ColSpec, DataType
    from mlflow.types.schema import Array, Map, Object, Property

    match = Object([Property(part, DataType[of]) for part, of in MATCH.items()])
    nested = {"numbers": Array(DataType.double), "classes": Map(DataType.double), "matches": Array(match)}
    return ColSpec(nested.get(kind) or DataType[kind], name, required=required)


def input_example(bundle: Bundle) -> "pd.DataFrame":
    """One PNG of noise, of the network's size and depth, and of a CLIP a text: no image of a patient, nor a report,
    ever goes with a model."""
    import pandas as pd
    from PIL import Image

    size = bundle.preprocess["size"]
    shape = (size, size) if bundle.preprocess["channels"] == 1 else (size, size, 3)
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)).save(file, "PNG")
    text = {} if bundle.kind == "classifier" else {"text": ["an image of noise"]}
    return pd.DataFrame({"image": [file.getvalue()]} | text)


def load_options(bundle: Bundle) -> dict[str, Any] | None:
    """What may be said when the model is loaded, with what holds otherwise: of a CLIP the `index` to search."""
    return {"index": None} if bundle.kind == "clip" else None


def requirements(bundle: Bundle) -> list[str]:
    """What decides an answer, in the versions installed here; raymed brings the rest."""
    packages = ["raymed", "mlflow", "numpy", "pandas", "pillow", "pydicom", "torch"]
    packages += _clip_packages(bundle) if bundle.kind == "clip" else _encoder_packages(bundle)
    # Without the part behind "+" (the CPU or CUDA build), which is no version that PyPI has.
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in packages]


def _encoder_packages(bundle: Bundle) -> list[str]:
    return [] if bundle.model["encoder"]["backbone"] == BUILT_IN else ["timm"]


def _clip_packages(bundle: Bundle) -> list[str]:
    architecture = bundle.model["architecture"]
    packages = ["open_clip_torch", "tokenizers"]
    packages += ["timm"] if "timm_model_name" in architecture["clip"]["vision_cfg"] else []
    return packages + (["transformers"] if architecture["text"] else [])
