"""A bundle is what leaves training: weights as safetensors, everything else as JSON, every file with its hash.

Nothing in a bundle is ever unpickled. The task that made it knows how to use it; `kind` names that task's handler.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raymed.config import UserError, to_json
from raymed.storage import write_atomic

FORMAT = 1
_WEIGHTS, _JSON = "model.safetensors", "bundle.json"


@dataclass
class Bundle:
    """A trained model with what is needed to use it, and only that.

    kind: the handler, e.g. "classifier". weights: name -> tensor. model: architecture (JSON). preprocess: size, fit,
    channels, normalisation (JSON). classes: class names by label value, and which is positive. operating_point:
    threshold and how it was chosen. metrics, provenance (run, data fingerprint, versions), licences: JSON.
    """

    kind: str
    weights: dict[str, Any]
    model: dict[str, Any]
    preprocess: dict[str, Any]
    classes: dict[str, Any]
    operating_point: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        """Write the bundle; an existing one in the folder is replaced file by file, the JSON last."""
        from safetensors.torch import save

        folder.mkdir(parents=True, exist_ok=True)
        weights = save({name: tensor.detach().cpu().contiguous() for name, tensor in self.weights.items()})
        write_atomic(folder / _WEIGHTS, weights)
        described = {name: value for name, value in vars(self).items() if name != "weights"}
        described |= {"format": FORMAT, "sha256": {_WEIGHTS: hashlib.sha256(weights).hexdigest()}}
        write_atomic(folder / _JSON, to_json(described))
        return folder

    @classmethod
    def load(cls, folder: Path) -> "Bundle":
        """Read a bundle. Raises UserError when a file is missing, its hash is wrong, or its format is newer."""
        from safetensors.torch import load

        for name in (_WEIGHTS, _JSON):
            if not (folder / name).is_file():
                raise UserError(f"{folder} is not a bundle: {name} is missing")
        described = json.loads((folder / _JSON).read_text())
        if described.pop("format") > FORMAT:
            raise UserError(f"{folder} was written by a newer raymed: this one reads bundles up to format {FORMAT}")
        raw = (folder / _WEIGHTS).read_bytes()
        if hashlib.sha256(raw).hexdigest() != described.pop("sha256")[_WEIGHTS]:
            raise UserError(f"{folder / _WEIGHTS} is damaged: its sha256 is not the one in {_JSON}. Copy it again")
        return cls(weights=load(raw), **described)
