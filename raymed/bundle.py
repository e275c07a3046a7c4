"""A bundle is what leaves training: tensors as safetensors, everything else as JSON, every file with its hash.

    model.safetensors    the weights
    extras.safetensors   further tensors, where there are any: what tells foreign images from known ones
    bundle.json          everything else, and the sha256 of the other files

The folder may be one in a bucket (s3://BUCKET/KEY). Nothing in a bundle is ever unpickled. The task that made it knows
how to use it; `kind` names that task's handler.
"""

import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from raymed.config import UserError, to_json
from raymed.storage import is_remote, join, local_folder_copy, write_bytes

FORMAT = 3
"""1: without contract, calibration, uncertain_band, ood, licences, intended_use and extras. 2: without golden. Both are
still read."""
NOT_STATED = "not stated"
RELEASE = ("research_only", "released_by")
"""Of a contract: what only people decide, like the intended use."""
_JSON = "bundle.json"
L = TypeVar("L", str, Path)
_TENSORS = {"weights": "model.safetensors", "extras": "extras.safetensors"}


@dataclass
class Bundle:
    """A trained model with what is needed to use it, and only that. All but the tensors is plain JSON.

    kind: the handler, e.g. "classifier". weights: name -> tensor. model: architecture. preprocess: size, fit, channels,
    normalisation. classes: class names by label value, and which is positive. operating_point: threshold and how it was
    chosen. metrics. provenance: run, data fingerprint, versions.

    contract: what an input must be: modality, body part, size, channels, photometric interpretation, bits, views, file
    kinds; research_only is false, and released_by somebody, once it was released from research use. calibration: from
    logit to probability. uncertain_band: the scores whose decision is not to be trusted. ood: how a foreign input is
    recognised, with the statistics in extras. licences: {"weights": {"name", "source"}, "data": {"name", "source"}}.
    intended_use: a text that only people can write; NOT_STATED until they do. golden: what it
    answers on drawn patterns (`raymed.tasks.golden`).
    """

    kind: str
    weights: dict[str, Any]
    model: dict[str, Any]
    preprocess: dict[str, Any]
    classes: dict[str, Any]
    operating_point: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    contract: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    uncertain_band: dict[str, Any] = field(default_factory=dict)
    ood: dict[str, Any] = field(default_factory=dict)
    licences: dict[str, dict[str, str]] = field(default_factory=lambda: {"weights": _unknown(), "data": _unknown()})
    intended_use: str = NOT_STATED
    extras: dict[str, Any] = field(default_factory=dict)
    golden: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: L) -> L:
        """Write the bundle; an existing one in the folder is replaced file by file, the JSON last."""
        from safetensors.torch import save

        hashes = {}
        for name, file in _TENSORS.items():
            if name == "extras" and not self.extras:
                continue
            tensors = getattr(self, name)
            raw = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
            write_bytes(join(folder, file), raw)
            hashes[file] = hashlib.sha256(raw).hexdigest()
        described = {name: value for name, value in vars(self).items() if name not in _TENSORS}
        write_bytes(join(folder, _JSON), to_json(described | {"format": FORMAT, "sha256": hashes}).encode())
        if not self.extras:
            _remove(join(folder, _TENSORS["extras"]))  # of the bundle that was replaced
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "Bundle":
        """Read a bundle. Raises UserError when a file is missing or damaged, or its format newer."""
        folder = local_folder_copy(folder)
        for name in (_TENSORS["weights"], _JSON):
            if not (folder / name).is_file():
                raise UserError(f"{folder} is not a bundle: {name} is missing")
        described, hashes = _read_json(folder / _JSON)
        tensors = {name: _read_tensors(folder, file, hashes[file]) for name, file in _TENSORS.items() if file in hashes}
        return cls(**tensors, **described)


def _remove(location: str | Path) -> None:
    if is_remote(location):
        from raymed.storage.s3 import delete

        delete([str(location)])
    else:
        Path(location).unlink(missing_ok=True)


def _unknown() -> dict[str, str]:
    return {"name": NOT_STATED, "source": NOT_STATED}


def _read_json(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The fields of a bundle that are no tensors, and the hashes of its files."""
    try:
        described = json.loads(path.read_text())
        format, hashes = int(described.pop("format")), described.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}). Copy it again") from error
    if format > FORMAT:
        raise UserError(f"{path.parent} was written by a newer raymed: this one reads bundles up to format {FORMAT}")
    known = {f.name for f in fields(Bundle)} - set(_TENSORS)
    required = {"kind", "model", "preprocess", "classes"}
    if not required <= described.keys() <= known or _TENSORS["weights"] not in hashes:
        wrong = ", ".join(sorted((required - described.keys()) | (described.keys() - known))) or "sha256"
        raise UserError(f"{path} is damaged (missing or unknown: {wrong}). Copy it again")
    return described, hashes


def _read_tensors(folder: Path, file: str, sha256: str) -> dict[str, Any]:
    from safetensors.torch import load

    path = folder / file
    if not path.is_file():
        raise UserError(f"{folder} is not whole: {file} is missing. Copy it again")
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise UserError(f"{path} is damaged: its sha256 is not the one in {_JSON}. Copy it again")
    return load(raw)
