"""Golden inputs: what a bundle answered on drawn patterns when it was made, and must answer wherever it is loaded.

The patterns show nobody. They find weights that were changed, a library that resamples or normalises otherwise, and a
device that computes wrongly, before anybody is answered by such a model.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from raymed.bundle import Bundle
from raymed.config import UserError
from raymed.tasks.embedder import Embedder
from raymed.tasks.predictor import Predictor

TOLERANCE = 1e-3
"""Of probabilities and cosines: devices differ in the last bits, a wrong network by far more."""
_NUM = 4
_SIDE = 96
_TEXTS = ("a chest X-ray", "no finding")


def patterns() -> list[np.ndarray]:
    """Waves of several directions and frequencies, (96, 96) uint8, the same everywhere."""
    rows, columns = np.mgrid[:_SIDE, :_SIDE] / _SIDE
    waves = [np.sin(2 * np.pi * ((k + 1) * rows + (3 - k) * columns)) * np.exp(-k * rows) for k in range(_NUM)]
    return [np.round(127.5 * (1 + wave)).astype(np.uint8) for wave in waves]


def golden_values(model: Predictor | Embedder) -> list[float]:
    """Of a classifier the raw probability of each pattern; of a CLIP the cosines of patterns with texts, row by row."""
    if isinstance(model, Predictor):
        return [prediction.raw_probability for prediction in model(patterns())]
    return model.similarity(patterns(), _TEXTS).astype(np.float64).ravel().tolist()


def with_golden(bundle: Bundle) -> Bundle:
    """The bundle with the answers that it gives here, on a CPU in float32. To be called when it is final."""
    model = Embedder.from_bundle(bundle) if bundle.kind == "clip" else Predictor.from_bundle(bundle)
    return replace(bundle, golden={"values": golden_values(model), "tolerance": TOLERANCE})


def check_golden(bundle: Bundle, found: Sequence[float], tolerance: float | None = None) -> None:
    """Raise UserError unless what was found is what the bundle answered when it was made, within its tolerance (or a
    wider one, of networks that run in bfloat16). One made before there were golden inputs must only be finite."""
    wanted, got = np.asarray(bundle.golden.get("values", found), np.float64), np.asarray(found, np.float64)
    within = max(tolerance or 0.0, float(bundle.golden.get("tolerance", TOLERANCE)))
    if wanted.shape != got.shape or not np.isfinite(got).all() or np.abs(wanted - got).max() > within:
        far = np.abs(wanted - got).max() if wanted.shape == got.shape else np.nan
        raise UserError(
            f"the model does not answer as it did when it was made: on drawn patterns it is off by {far:.3g}, "
            f"and at most {within:g} is allowed. Nothing is answered by it here"
        )
