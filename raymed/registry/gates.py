"""What a version must pass before it takes the place of the one in use.

    golden inputs   it answers as it did when it was made
    AUROC           not worse than the champion's by the margin: non-inferiority, on the same patients
    mean recall     the same of a CLIP, of images and captions that are to find each other
    calibration     its expected calibration error is not higher by more than a margin; not of a CLIP
    latency         one prediction takes not much longer than the champion's

The comparison itself is `raymed.results.gates`.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raymed.bundle import Bundle
from raymed.config import UserError, check_range
from raymed.tasks.embedder import Embedder
from raymed.tasks.golden import check_golden, golden_values, patterns
from raymed.tasks.predictor import Predictor

_WARM_UP = 3


@dataclass(frozen=True)
class GateConfig:
    """What a candidate must pass before it becomes champion."""

    manifest: str | None = None
    """Labelled images (see data.manifest), or for a CLIP images with captions, of patients whom neither model has seen:
    candidate and champion are compared on them. None = they are not compared: another champion is then replaced only
    with --force."""
    caption: tuple[str, ...] = ("caption",)
    """Of a CLIP: columns with what is said of the image."""
    margin: float = 0.02
    """How much lower the candidate's AUROC, or a CLIP's mean recall, may be: the lower end of the 95 % interval of the
    difference must lie above minus this."""
    calibration: float = 0.05
    """How much higher its expected calibration error may be."""
    slower: float = 2.0
    """How many times the champion's time a prediction may take, at the 95th percentile."""
    predictions: int = 50
    """That are timed, of each."""

    def __post_init__(self) -> None:
        check_range("gate.margin", self.margin, 0, 1, low_open=True)
        check_range("gate.calibration", self.calibration, 0, 1)
        check_range("gate.slower", self.slower, 0, low_open=True)
        check_range("gate.predictions", self.predictions, 20)


@dataclass(frozen=True)
class Gate:
    """One condition. passed: None where nobody looked."""

    name: str
    passed: bool | None
    said: str
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        how = {True: "passed", False: "not passed", None: "not looked at"}[self.passed]
        return f"{self.name}: {how} ({self.said})"


@dataclass(frozen=True)
class Examination:
    """What a version was held to, and whose place it was to take."""

    gates: tuple[Gate, ...]
    champion: int | None
    """The version that was champion, which the gates are about; None where there was none."""


def is_passed(gates: Sequence[Gate], replaces: bool) -> bool:
    """Whether a version does what it was held to. replaces: another champion, so that a gate at which nobody looked is
    not passed either."""
    return not any(gate.passed is False or (replaces and gate.passed is None) for gate in gates)


def golden_gate(model: Predictor | Embedder) -> Gate:
    """Whether a bundle answers on drawn patterns what it did when it was made."""
    name = "golden inputs"
    try:
        check_golden(model.bundle, golden_values(model))
    except UserError as error:
        return Gate(name, False, str(error))
    if not model.bundle.golden:
        return Gate(name, True, "the bundle holds none: its answers are finite, and no more is known")
    return Gate(name, True, "it answers as it did when it was made")


def not_worse_gate(name: str, difference: Mapping[str, Any], margin: float) -> Gate:
    """Of the figure of (candidate's - champion's) metric of this name: AUROC, mean recall."""
    figures = _interval(difference)
    told = f"{figures['mean']:+.3f}, 95 % CI {figures['ci_low']:+.3f} to {figures['ci_high']:+.3f}"
    if math.isnan(figures["ci_low"]):
        return Gate(name, False, "the images are too few for an interval of the difference", figures)
    said = f"it differs from the champion's by {told}; the lower end must lie above -{margin:g}"
    return Gate(name, figures["ci_low"] > -margin, said, figures | {"margin": margin})


def calibration_gate(difference: Mapping[str, Any], margin: float) -> Gate:
    """Of the figure of (candidate's - champion's) expected calibration error. The difference itself is held to the
    margin: on few cases its interval is wide, and says little."""
    figures = _interval(difference)
    said = f"its error differs from the champion's by {figures['mean']:+.3f}; at most +{margin:g} is allowed"
    return Gate("calibration", figures["mean"] <= margin, said, figures | {"margin": margin})


def latency_gate(candidate: Predictor | Embedder, champion: Predictor | Embedder, slower: float, num: int) -> Gate:
    """Of num predictions of single images by each, which take turns, so that a busy machine slows both."""
    mine, theirs = p95([_prediction(candidate), _prediction(champion)], num)
    figures = {"candidate_p95_ms": 1e3 * mine, "champion_p95_ms": 1e3 * theirs, "slower": slower}
    said = f"95 % of predictions within {1e3 * mine:.1f} ms, the champion's within {1e3 * theirs:.1f} ms"
    return Gate("latency", mine <= slower * theirs, f"{said}; at most {slower:g} times that is allowed", figures)


def p95(works: Sequence[Callable[[], Any]], num: int) -> list[float]:
    """The 95th percentile of the seconds that each work takes, over num times in turns."""
    times = np.empty((num, len(works)))
    for i in range(-_WARM_UP, num):
        for j, work in enumerate(works):
            started = time.perf_counter()
            work()
            times[max(i, 0), j] = time.perf_counter() - started
    return np.quantile(times, 0.95, axis=0).tolist()


def model_of(bundle: Bundle, device: str) -> Predictor | Embedder:
    """A bundle in use."""
    return Embedder.from_bundle(bundle, device) if bundle.kind == "clip" else Predictor.from_bundle(bundle, device)


def _prediction(model: Predictor | Embedder) -> Callable[[], Any]:
    image = patterns()[:1]
    return lambda: model(image) if isinstance(model, Predictor) else model.similarity(image, ("a chest X-ray",))


def _interval(difference: Mapping[str, Any]) -> dict[str, float]:
    """JSON has null for what is not a number."""
    found = {name: difference[name] for name in ("mean", "ci_low", "ci_high")}
    return {name: math.nan if value is None else float(value) for name, value in found.items()}
