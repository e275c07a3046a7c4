"""A bundle as one file that other programs run: ONNX or torch.export, or as a MONAI bundle.

The exported graph goes from preprocessed pixels, as `Preprocess.to_array` makes them, to the answer:

    pixels          (B, C, size, size) uint8 or uint16 as the training images were; B is free
    probability     (B,) float32, calibrated; positive at or above `threshold`
    raw_probability (B,) float32, before calibration
    mahalanobis, knn (B,) float32, where the bundle has statistics; foreign above either of `ood_thresholds`

so that scaling, normalisation, network and calibration cannot come apart. Nothing leaves before the exported graph and
the bundle's own predictor have given the same probabilities on real or made-up images. What the numbers mean stands in
the file itself (ONNX metadata, torch.export extra files) and in a JSON beside it.
"""

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from raymed.bundle import Bundle
from raymed.config import UserError, to_json
from raymed.metrics.calibration import Calibration
from raymed.metrics.reliability import Calibrator, Isotonic, Temperature
from raymed.registry.card import metadata, write_card
from raymed.storage import write_atomic
from raymed.storage.leftovers import remove, sweep, temporary
from raymed.tasks.predictor import Predictor

Format = Literal["onnx", "torch", "monai"]
TOLERANCE = 1e-5  # of a probability
SUFFIX = {"onnx": ".onnx", "torch": ".pt2"}
OPSET = 20
INPUT, BATCH, NUM_RANDOM = "pixels", "batch", 64
Run = Callable[[np.ndarray], dict[str, np.ndarray]]


class Graph(nn.Module):
    """What is exported: pixels (B, C, size, size) -> the outputs named above, as a dict."""

    def __init__(self, predictor: Predictor):
        super().__init__()
        self.network = predictor.network
        self.calibration = _calibration(predictor.calibration)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """As the module says."""
        logit, *distances = self.network(pixels.to(torch.float32) / torch.iinfo(pixels.dtype).max)
        probability = self.calibration(logit)
        outputs = {"probability": probability, "raw_probability": torch.sigmoid(logit)}
        return outputs | dict(zip(("mahalanobis", "knn"), distances, strict=False))


class _Platt(nn.Module):
    def __init__(self, temperature: float, bias: float):
        super().__init__()
        self.temperature, self.bias = temperature, bias

    def forward(self, logit: Tensor) -> Tensor:
        return torch.sigmoid(logit / self.temperature + self.bias)


class _PiecewiseLinear(nn.Module):
    """np.interp as a sum of ramps, one a piece: no operator that a graph may lack."""

    start: Tensor
    length: Tensor
    rise: Tensor

    def __init__(self, at: Sequence[float], values: Sequence[float]):
        super().__init__()
        x, y = torch.tensor(at, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)
        self.first = float(y[0])
        length = x.diff()
        pieces = {"start": x[:-1], "length": length, "rise": y.diff() / length}
        for name, value in pieces.items():
            self.register_buffer(name, value.float())

    def forward(self, logit: Tensor) -> Tensor:
        inside = (logit[:, None] - self.start).clamp(min=0)
        return self.first + (torch.minimum(inside, self.length) * self.rise).sum(1)


def _calibration(calibrator: Calibrator) -> nn.Module:
    if isinstance(calibrator, Isotonic):
        return _PiecewiseLinear(calibrator.logits, calibrator.probabilities)
    plain = (
        calibrator if isinstance(calibrator, Calibration) else Calibration(cast(Temperature, calibrator).temperature)
    )
    return _Platt(plain.temperature, plain.bias)


@dataclass(frozen=True)
class Exported:
    """What was written, and how far its probabilities are from the bundle's (largest difference, on so many images)."""

    path: Path
    difference: float
    num_images: int


def export(bundle: Bundle, path: Path, format: Format, images: Sequence[np.ndarray] = ()) -> Exported:
    """Write a bundle as an ONNX or torch.export file.

    Args:
        path: of the file; its ending is that of the format, or is added. Beside it FILE.json is written (`describe`).
        images: decoded images for the check, as `Predictor` takes them; none = noise.

    Raises:
        UserError: the exported graph's probabilities differ from the bundle's by 1e-5 or more (no file is left); a
            package is missing; a wrong ending.
    """
    _check_kind(bundle)
    path = _with_suffix(path, format)
    predictor = Predictor.from_bundle(bundle)
    pixels = _pixels(predictor, images)
    description = describe(bundle, predictor)
    path.parent.mkdir(parents=True, exist_ok=True)
    arriving = path.with_name(f".{path.name}.tmp{path.suffix}")
    try:
        run = (_to_onnx if format == "onnx" else _to_torch)(Graph(predictor).eval(), pixels, arriving, description)
        difference = parity(predictor, run, pixels)
        if not difference < TOLERANCE:
            raise UserError(
                f"the exported network's probabilities differ from the bundle's by up to {difference:.2g}, more than "
                f"{TOLERANCE:g}: nothing is written"
            )
        arriving.replace(path)
    finally:
        arriving.unlink(missing_ok=True)
    checked = {"max_difference": difference, "num_images": len(pixels), "real_images": bool(len(images))}
    write_atomic(path.with_name(f"{path.name}.json"), to_json(description | {"parity": checked}))
    return Exported(path, difference, len(pixels))


def export_monai(folder: Path, into: Path) -> Path:
    """Lay a bundle's folder out as a MONAI bundle (configs, docs, models), with the network as ONNX in `models`.

    The network is exported and checked as by `export`. Raises as that does, when nothing is left, and UserError when
    `into` is no folder or is not empty; what an export has left that was killed does not count.
    """
    is_new = not (into.exists() or into.is_symlink())
    if not (is_new or into.is_dir()):
        raise UserError(f"{into} is no folder: give a new one")
    if not is_new:
        sweep(into, deep=False)
    if not is_new and any(into.iterdir()):
        raise UserError(f"{into} is not empty: give a new folder")
    into.mkdir(parents=True, exist_ok=True)
    making = temporary(into / "bundle")  # inside: what is given may be a mount, or a link
    try:
        _lay_out(folder, making)
        for part in sorted(making.iterdir()):
            part.replace(into / part.name)
    finally:
        remove(making)
        if is_new and not any(into.iterdir()):
            into.rmdir()
    return into


def _lay_out(folder: Path, into: Path) -> None:
    bundle, models = Bundle.load(folder), into / "models"
    export(bundle, models / "model.onnx", "onnx")
    for file in ("model.safetensors", "extras.safetensors", "bundle.json"):
        if (folder / file).is_file():
            shutil.copy2(folder / file, models / file)
    write_card(models)
    for place in ("configs", "docs"):
        (into / place).mkdir()
    (models / "metadata.json").replace(into / "configs" / "metadata.json")
    (models / "card.md").replace(into / "docs" / "README.md")
    data, weights = bundle.licences["data"], bundle.licences["weights"]
    write_atomic(into / "docs" / "data_license.txt", f"{data['name']}\nSource: {data['source']}\n")
    write_atomic(into / "LICENSE", f"Of the weights: {weights['name']}\nSource: {weights['source']}\n")


def _check_kind(bundle: Bundle) -> None:
    if bundle.kind != "classifier":
        raise UserError(
            f"classifiers are exported so, and the bundle holds a {bundle.kind}: its own folder is what other machines "
            "load, with raymed installed (Bundle.load), or through the registry"
        )


def describe(bundle: Bundle, predictor: Predictor) -> dict[str, Any]:
    """What a program needs to know beside the graph, as JSON."""
    return {
        "classes": bundle.classes,
        "threshold": predictor.threshold,
        "uncertain_band": predictor.band,
        "ood_thresholds": bundle.ood.get("thresholds"),
        "preprocess": bundle.preprocess,
        "contract": bundle.contract,
        "network_data_format": metadata(bundle)["network_data_format"],
        "intended_use": bundle.intended_use,
        "licences": bundle.licences,
        "run_key": bundle.provenance.get("run_key"),
    }


def parity(predictor: Predictor, run: Run, pixels: np.ndarray) -> float:
    """Largest difference of a probability between an exported graph and the predictor, over batches of several sizes;
    nan if either gave nan."""
    expected = predictor.from_pixels(torch.from_numpy(pixels))
    wanted = np.array([[p.probability, p.raw_probability] for p in expected])
    parts = [run(part) for part in np.split(pixels, [1, min(4, len(pixels))]) if len(part)]
    given = np.stack([np.concatenate([p[name] for p in parts]) for name in ("probability", "raw_probability")], axis=1)
    return float(np.abs(given - wanted).max())


def _to_onnx(graph: Graph, pixels: np.ndarray, path: Path, description: dict[str, Any]) -> Run:
    """Write the file; returns what runs it."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError as error:
        raise UserError(f"ONNX needs the package {error.name}: pip install 'raymed[export]'") from None
    from torch.onnx import export as to_onnx

    example = _example(pixels)
    names = list(graph(example))
    with _quiet():
        program = to_onnx(
            graph,
            (example,),
            dynamo=True,
            input_names=[INPUT],
            output_names=names,
            dynamic_shapes={INPUT: {0: torch.export.Dim(BATCH)}},
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in description.items()}
    program.model.metadata_props.update(texts)
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(part: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.asarray(value) for name, value in zip(names, session.run(names, {INPUT: part}), strict=True)}

    return run


def _to_torch(graph: Graph, pixels: np.ndarray, path: Path, description: dict[str, Any]) -> Run:
    """Write the file; returns what runs it."""
    with _quiet():
        shapes = {INPUT: {0: torch.export.Dim(BATCH)}}
        program = torch.export.export(graph, (_example(pixels),), dynamic_shapes=shapes)
        torch.export.save(program, path, extra_files={"raymed.json": to_json(description)})
        loaded = torch.export.load(path).module()

    def run(part: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            return {name: value.numpy() for name, value in loaded(torch.from_numpy(part)).items()}

    return run


def _example(pixels: np.ndarray) -> Tensor:
    """Two images: torch takes a size of one for a constant."""
    return torch.from_numpy(np.repeat(pixels[:1], 2, axis=0))


def _pixels(predictor: Predictor, images: Sequence[np.ndarray]) -> np.ndarray:
    """(N, C, size, size) for the check, of the depth that the graph is made for."""
    preprocess = predictor.preprocess
    dtype = np.dtype(f"uint{predictor.bundle.contract.get('bits', 8)}")
    if not len(images):
        assert preprocess.size is not None
        shape = (NUM_RANDOM, preprocess.channels, preprocess.size, preprocess.size)
        return np.random.default_rng(0).integers(np.iinfo(dtype).max, size=shape, dtype=dtype, endpoint=True)
    if wrong := {str(image.dtype) for image in images} - {str(dtype)}:
        raise UserError(f"the model is for {dtype} images, got {', '.join(wrong)}")
    return np.stack([preprocess.to_array(image).transpose(2, 0, 1) for image in images])


def _with_suffix(path: Path, format: Format) -> Path:
    suffix = SUFFIX[format]
    if path.suffix not in ("", suffix):
        raise UserError(f"a file of format {format} ends in {suffix}, got {path}")
    return path.with_suffix(suffix)


@contextmanager
def _quiet() -> Iterator[None]:
    """Within: the exporters' warnings about their own code are not shown."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
