"""A classifier answers: the probability of the positive class for a case, its decision, and what speaks against it."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor

from raymed.bundle import Bundle
from raymed.config import check_choice
from raymed.serve import handlers
from raymed.serve.described import Described
from raymed.serve.explain import Explainer, ExplainFields, Explanation
from raymed.serve.handlers import Ask, Prepared, Upload, ask_all, example_image
from raymed.tasks.golden import golden_values
from raymed.tasks.predictor import Prediction, Predictor


class ImageResult(Described):
    """Of one image of the case."""

    file: int
    """Place in the request, from 0."""
    frame: int | None
    probability: float
    label: str
    uncertain: bool | None
    foreign: bool | None
    """Not like the images that the model was trained on; None where it cannot tell."""
    distances: dict[str, float] | None
    """From the training images: mahalanobis, knn."""
    explanation: Explanation | None = None


class ClassifierResult(handlers.Result):
    """Of a case."""

    kind: Literal["classifier"] = "classifier"
    label: str
    """The class that the decision stands for, also where the answer abstains."""
    probability: float
    """Of the positive class, calibrated."""
    threshold: float
    """Positive from here on."""
    uncertain_band: tuple[float, float] | None
    """Probabilities whose decision is not to be trusted."""
    images: list[ImageResult]


class Handler:
    """See `raymed.serve.handlers.Handler`."""

    Fields: ClassVar = ExplainFields
    Result: ClassVar = ClassifierResult
    needs_image: ClassVar = True

    def __init__(self, bundle: Bundle, device: str, options: Mapping[str, str]):
        for name in options:
            check_choice("option of a classifier", name, ())
        self.bundle = bundle
        self.predictor = Predictor.from_bundle(bundle, device)
        self.window = self.predictor.preprocess.window
        self.networks = {"image": self.predictor.from_unit}
        self.modules = [self.predictor.network.encoder]
        self.explainer = Explainer(self.predictor)

    def prepare(self, upload: Upload) -> Tensor:
        """(C, size, size) float32 in [0, 1]."""
        return self.predictor.input_image([upload.pixels], upload.file)[0]

    async def answer(self, images: Sequence[Prepared], fields: ExplainFields, ask: Ask) -> ClassifierResult:
        """Every image through the network, then the case as the bundle decides, then the maps, one after the other."""
        self.explainer.check(fields, len(images))
        predictions = await ask_all(ask, "image", [image.item for image in images])
        case = self.predictor.case(predictions)
        decision, reasons = self.predictor.answer(case)
        explained = [await self.explainer(image.item, fields, ask) for image in images]
        return ClassifierResult(
            decision=decision,
            reasons=reasons,
            label=case.decision,
            probability=case.probability,
            threshold=case.threshold,
            uncertain_band=self.predictor.band,
            images=[_image(*each) for each in zip(images, predictions, explained, strict=True)],
        )

    def examples(self) -> dict[str, Tensor]:
        """A picture of a gradient."""
        return {"image": self.prepare(example_image(int(self.bundle.preprocess["size"])))}

    def golden(self) -> list[float]:
        """Probabilities of the patterns."""
        return golden_values(self.predictor)

    def about(self) -> dict[str, Any]:
        """Classes, threshold and band, and how an answer can be explained."""
        positive = self.bundle.classes["positive"]
        return {
            "classes": self.bundle.classes["names"],
            "positive": positive,
            "threshold": self.predictor.threshold,
            "uncertain_band": self.predictor.band,
            "explain": list(self.explainer.methods),
            "decides_about": self.bundle.operating_point.get("unit", "image"),
        }


def _image(image: Prepared, found: Prediction, explanation: Explanation | None) -> ImageResult:
    ood = dict(found.ood) if found.ood is not None else None
    foreign = None if ood is None else bool(ood.pop("foreign"))
    return ImageResult(
        file=image.upload.file,
        frame=image.upload.frame,
        probability=found.probability,
        label=found.decision,
        uncertain=found.uncertain,
        foreign=foreign,
        distances=ood,
        explanation=explanation,
    )
