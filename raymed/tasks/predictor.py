"""What a finished classifier says of a case and its images: probability, decision, how far to trust it, and whether it
is foreign.

    complete    adds to a classifier's bundle all that is learned from its validation split and features
    Predictor   a bundle in use; the only way from pixels to an answer, in a report, a registry or a server

The image goes through the same `Preprocess` as in training, and through the encoder once: its features give the logit
and the distances of `raymed.metrics.ood`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from raymed.bundle import NOT_STATED, Bundle
from raymed.config import UserError
from raymed.data.dataset import DataSet
from raymed.data.preprocess import Preprocess
from raymed.metrics.calibration import Calibration, band_figures, logit_of, probability_figures, uncertain_band
from raymed.metrics.levels import LevelTable
from raymed.metrics.ood import SCORES, FeatureDistances, fit_ood, is_foreign, separation
from raymed.metrics.reliability import Method, calibrator_from_dict, fit_calibrator
from raymed.tasks.attention import image_energies, load_attention
from raymed.tasks.classifier import Classifier, load_classifier
from raymed.tasks.decide import ATTENTION, put_together
from raymed.tasks.images import to_unit, unit_image

FILE_KINDS = ("PNG", "JPEG", "TIFF", "DICOM", "NIfTI")
_PREFIX = "ood."  # of the distances' tensors among a bundle's extras
_BATCH = 128
Verdict = Literal["positive", "negative", "abstain"]


@dataclass(frozen=True)
class Prediction:
    """The answer for one image, taken as a case of its own. Probabilities are of the positive class."""

    probability: float
    """Calibrated."""
    raw_probability: float
    """Sigmoid of the logit, as it stands in training's predictions."""
    decision: str
    """Name of a class; with more than two, "not" and the positive one where it is not that."""
    threshold: float
    """On the scale of `probability`. The decision is made on the raw one, as in training, which is the same."""
    uncertain: bool | None
    """Inside the band where a decision is not to be trusted; None where the bundle knows no band."""
    ood: dict[str, float | bool] | None
    """mahalanobis, knn, foreign (`raymed.metrics.ood`); None where the bundle holds no statistics."""
    energy: float | None = None
    """What it counts among the images of its case (`raymed.models.attention_pool`); None where all count alike."""

    def row(self) -> dict[str, Any]:
        """All that is said of the image, in one level, for a table."""
        values = asdict(self)
        del values["energy"]
        return values | (values.pop("ood") or {})


@dataclass(frozen=True)
class CasePrediction:
    """The answer for the images of one case (or whatever the bundle decides about). As of `Prediction`, but that
    raw_probability is what the bundle's aggregation makes of those of the images."""

    probability: float
    raw_probability: float
    decision: str
    threshold: float
    uncertain: bool | None
    num_foreign: int | None
    """Images that the bundle takes for foreign; None where it holds no statistics."""
    images: tuple[Prediction, ...]


class PredictorNetwork(nn.Module):
    """Everything between pixels and numbers as one module, as it is exported.

    (B, C, size, size) float32 in [0, 1] -> (logit (B,), mahalanobis (B,), knn (B,)); without statistics (logit,).
    """

    def __init__(self, classifier: Classifier, preprocess: Preprocess, distances: FeatureDistances | None):
        super().__init__()
        self.encoder = classifier.encoder
        self.head = classifier.head
        self.preprocess = preprocess
        self.distances = distances

    def features(self, image: Tensor) -> Tensor:
        """(B, C, size, size) -> (B, D)."""
        return self.encoder(self.preprocess.normalise(image))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """The logit and, where there are statistics, the two distances."""
        return self.outputs(self.features(image))

    def outputs(self, features: Tensor) -> tuple[Tensor, ...]:
        """The same of features (B, D)."""
        logit = self.head(features)
        return (logit,) if self.distances is None else (logit, *self.distances(features))


class Predictor:
    """A "classifier" bundle in use.

    Attributes: bundle; preprocess; device; network (`PredictorNetwork`, in eval mode); calibration; threshold and band
    (low, high), on the scale of calibrated probabilities, the band None where there is none.
    """

    def __init__(self, bundle: Bundle, network: PredictorNetwork, device: torch.device):
        from scipy.special import logit

        self.bundle = bundle
        self.preprocess = network.preprocess
        self.device = device
        self.network = network.to(device).eval()
        self.attention = load_attention(bundle.extras)
        if bundle.operating_point.get("aggregate") == ATTENTION and self.attention is None:
            raise UserError("the bundle decides by attention, and holds none of its tensors: copy it again")
        self.calibration = calibrator_from_dict(bundle.calibration)
        band = bundle.uncertain_band
        raw = [_threshold(bundle), *([band["low"], band["high"]] if band else [])]
        self.threshold, *edges = (float(p) for p in self.calibration(logit(raw)))
        self.band: tuple[float, float] | None = (edges[0], edges[1]) if edges else None

    @classmethod
    def from_bundle(cls, bundle: Bundle, device: str | torch.device = "cpu") -> "Predictor":
        """Rebuild the network. Raises UserError for a bundle of another kind, or without an operating point."""
        classifier, preprocess = load_classifier(bundle)
        return cls(bundle, PredictorNetwork(classifier, preprocess, load_distances(bundle)), torch.device(device))

    def __call__(self, images: Sequence[np.ndarray]) -> list[Prediction]:
        """Predict decoded images, each (H, W) or (H, W, 3) uint8 or uint16 of any size.

        They are to come from `raymed.data.readers.read(path, frame, window=predictor.preprocess.window)`.

        Raises:
            UserError: an image is no such array, is empty, or has one value everywhere; it is named by its place.
        """
        return [
            prediction
            for start in range(0, len(images), _BATCH)
            for prediction in self.from_unit(self.input_image(images[start : start + _BATCH], start))
        ]

    def case(self, images: Sequence[Prediction]) -> CasePrediction:
        """What the predictions of the images of one case come to together. Raises UserError for a case without any."""
        if not images:
            raise UserError("a case without an image cannot be decided")
        how = self.bundle.operating_point.get("aggregate", "mean")
        energies = None if self.attention is None else np.array([image.energy for image in images])
        scores = np.array([image.raw_probability for image in images])
        (raw,), _ = put_together(scores, np.zeros(len(images), np.int64), how, energies)
        foreign = [image.ood["foreign"] for image in images if image.ood is not None]
        return CasePrediction(
            probability=float(self.told(np.array([raw]))[0]),
            raw_probability=float(raw),
            decision=self._decision(raw),
            threshold=self.threshold,
            uncertain=self._uncertain(raw),
            num_foreign=sum(map(bool, foreign)) if foreign else None,
            images=tuple(images),
        )

    def answer(self, case: CasePrediction) -> tuple[Verdict, list[str]]:
        """What people are told of a case, and why: abstain where it is foreign or in the uncertain band, otherwise the
        side of the threshold."""
        reasons = []
        if case.num_foreign:
            num = len(case.images)
            which = "the image is" if num == 1 else f"{case.num_foreign} of {num} images are"
            reasons.append(f"{which} not like those that the model was trained on")
        if case.uncertain:
            reasons.append("the probability is in the band in which the model's decisions are not to be trusted")
        if reasons:
            return "abstain", reasons
        if case.decision == self.bundle.classes["positive"]:
            return "positive", ["the probability is at or above the threshold"]
        return "negative", ["the probability is below the threshold"]

    def told(self, raw: np.ndarray, logits: np.ndarray | None = None) -> np.ndarray:
        """Raw probabilities (N,) as they are told: calibrated (from the logits, where those are at hand). Where a
        calibration gives one probability to scores on both sides of the threshold, as steps do, those below it are
        moved by the last bit, so that `probability >= threshold` is the decision."""
        calibrated = self.calibration(logit_of(raw) if logits is None else logits)
        below = np.minimum(calibrated, np.nextafter(self.threshold, -1))
        return np.where(raw >= _threshold(self.bundle), np.maximum(calibrated, self.threshold), below)

    def _decision(self, raw: float) -> str:
        return _class_names(self.bundle)[int(raw >= _threshold(self.bundle))]

    def _uncertain(self, raw: float) -> bool | None:
        band = self.bundle.uncertain_band
        return bool(band["low"] <= raw <= band["high"]) if band else None

    def from_pixels(self, pixels: Tensor) -> list[Prediction]:
        """Predict images that `Preprocess.to_array` has seen already: (B, C, size, size) uint8 or uint16."""
        wanted = (self.preprocess.channels, self.preprocess.size, self.preprocess.size)
        if pixels.ndim != 4 or pixels.shape[1:] != wanted or pixels.dtype not in (torch.uint8, torch.uint16):
            shape = ", ".join(map(str, wanted))
            raise UserError(f"pixels must be (B, {shape}) uint8 or uint16, got {tuple(pixels.shape)} {pixels.dtype}")
        return [p for part in pixels.split(_BATCH) for p in self.from_unit(to_unit(part))]

    def input_image(self, images: Sequence[np.ndarray], first: int = 0) -> Tensor:
        """Decoded images -> (B, C, size, size) float32 in [0, 1], what `network` takes. Errors count from `first`."""
        return unit_image(self.preprocess, images, first)

    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Decoded images -> (N, D) float32 features of the encoder."""
        return self._features(self.input_image(images[i : i + _BATCH], i) for i in range(0, len(images), _BATCH))

    def data_features(self, data: DataSet, indices: np.ndarray) -> np.ndarray:
        """Images of a data set with this preprocessing -> (N, D) float32 features of the encoder."""
        return self._features(data.batch(indices[i : i + _BATCH]).unit_image() for i in range(0, len(indices), _BATCH))

    @torch.inference_mode()
    def _features(self, parts: Iterable[Tensor]) -> np.ndarray:
        return torch.cat([self.network.features(part.to(self.device)).float().cpu() for part in parts]).numpy()

    @torch.inference_mode()
    def from_unit(self, image: Tensor) -> list[Prediction]:
        """Predict what `input_image` has made, all at once: (B, C, size, size) float32 in [0, 1]."""
        features = self.network.features(image.to(self.device))
        logit, *distances = (output.double().cpu().numpy() for output in self.network.outputs(features))
        energies = None if self.attention is None else image_energies(self.attention, features.float().cpu().numpy())
        raw = Calibration()(logit)
        ood = self._ood(dict(zip(SCORES, distances, strict=True))) if distances else None
        return [
            Prediction(
                probability=probability,
                raw_probability=float(raw[i]),
                decision=self._decision(raw[i]),
                threshold=self.threshold,
                uncertain=self._uncertain(raw[i]),
                ood=None if ood is None else ood[i],
                energy=None if energies is None else float(energies[i]),
            )
            for i, probability in enumerate(self.told(raw, logit).tolist())
        ]

    def _ood(self, scores: dict[str, np.ndarray]) -> list[dict[str, float | bool]]:
        foreign = is_foreign(scores, self.bundle.ood["thresholds"])
        columns = {name: values.tolist() for name, values in scores.items()} | {"foreign": foreign.tolist()}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def complete(
    bundle: Bundle,
    *,
    train_features: np.ndarray,
    train_labels: np.ndarray,
    train_patients: np.ndarray,
    val_features: np.ndarray,
    val_labels: np.ndarray,
    val_patients: np.ndarray,
    decided: Mapping[str, LevelTable],
    calibration_by: Method = "platt",
    contract: dict[str, Any],
    licences: dict[str, dict[str, str]] | None = None,
    intended_use: str = NOT_STATED,
) -> Bundle:
    """The bundle with calibration, uncertain band, and what recognises foreign images.

    Args:
        bundle: of a classifier, with its operating point.
        train_features, val_features: (N, D) outputs of the bundle's encoder.
        train_labels, val_labels: (N,) of {0, 1}. train_patients, val_patients: (N,) who each image is of.
        decided: "val" -> the units (images, cases, ...) that the bundle decides about, with raw probabilities: what
            calibration and band are fitted on. "test", where given: what both do there is noted under "test". The
            promises hold for units drawn as those of validation were; this shows whether those of the test were.
        calibration_by: how probabilities are mended, if that helps (`fit_calibrator`).
        contract: `input_contract`. licences: {"weights": {"name", "source"}, "data": {...}}; what is missing stays.

    Raises:
        UserError: features that are not finite or all equal.
    """
    fitted = decided["val"]
    calibrated, calibration = fit_calibrator(calibration_by, fitted.scores, fitted.targets, fitted.patients)
    band = uncertain_band(fitted.scores, fitted.targets, fitted.patients, _threshold(bundle))
    if "test" in decided:
        scores, labels = decided["test"].scores, decided["test"].targets
        before, after = (probability_figures(p, labels) for p in (scores, calibrated(logit_of(scores))))
        calibration |= {"test": {"before": before, "after": after}}
        band |= {"test": band_figures(scores, labels, _threshold(bundle), band["low"], band["high"])}
    train, val = (train_features, train_labels, train_patients), (val_features, val_labels, val_patients)
    distances, ood = fit_ood(train, val)
    extras = {_PREFIX + name: tensor for name, tensor in distances.state_dict().items()}
    return replace(
        bundle,
        contract=contract,
        calibration=calibration,
        uncertain_band=band,
        ood=ood,
        licences=bundle.licences | (licences or {}),
        intended_use=intended_use,
        extras=bundle.extras | extras,
    )


def with_separation(bundle: Bundle, test_features: np.ndarray, foreign: Mapping[str, np.ndarray]) -> Bundle:
    """The bundle with ood["separation"]: how well sets of foreign images are told from the test split, all by their
    features (`Predictor.features`, of images of another modality, say). See `raymed.metrics.ood.separation`."""
    distances = load_distances(bundle)
    assert distances is not None
    found = separation(distances, bundle.ood["thresholds"], test_features, foreign)
    return replace(bundle, ood=bundle.ood | {"separation": found})


def input_contract(data: DataSet, *, modality: str = NOT_STATED, body_part: str = NOT_STATED) -> dict[str, Any]:
    """What an input of a model trained on this data must be.

    Returns:
        modality, body_part: as stated, DICOM's terms for preference. size: height and width of the network's input;
        images of other sizes are resampled. channels: 1 or 3. photometric: MONOCHROME2 (bright is dense; MONOCHROME1
        files are inverted when read) or RGB; colour images of a one-channel model count by their luminance. bits: 8 or
        16, of the training images; others are scaled. images_per_prediction: 1. views_per_case: median number of images
        of a case in the data; views: their names; both NOT_STATED where the data do not tell. file_kinds.
    """
    image = data.batch(data.splits["train"][:1]).image
    assert image is not None
    views = [] if data.views is None else sorted(set(data.views.tolist()) - {""})
    num_views = [] if data.cases is None else np.unique(data.cases, return_counts=True)[1]
    return {
        "modality": modality,
        "body_part": body_part,
        "size": data.preprocess.size,
        "channels": data.preprocess.channels,
        "photometric": "MONOCHROME2" if data.preprocess.channels == 1 else "RGB",
        "bits": 8 * image.element_size(),
        "images_per_prediction": 1,
        "views_per_case": int(np.median(num_views)) if len(num_views) else NOT_STATED,
        "views": views or NOT_STATED,
        "file_kinds": list(FILE_KINDS),
    }


def load_distances(bundle: Bundle) -> FeatureDistances | None:
    """A bundle's feature distances, or None where it has none."""
    if not bundle.ood:
        return None
    tensors = {name.removeprefix(_PREFIX): t for name, t in bundle.extras.items() if name.startswith(_PREFIX)}
    return FeatureDistances(**tensors, k=bundle.ood["k"])


def _threshold(bundle: Bundle) -> float:
    if "threshold" not in bundle.operating_point:
        raise UserError("the bundle has no operating point: a threshold is chosen when a training ends; train it anew")
    return bundle.operating_point["threshold"]


def _class_names(bundle: Bundle) -> tuple[str, str]:
    """(negative, positive)."""
    positive = bundle.classes["positive"]
    others = [name for name in bundle.classes["names"] if name != positive]
    return others[0] if len(others) == 1 else f"not {positive}", positive
