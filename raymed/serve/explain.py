"""Explanations of a classifier's answers, made in the device's thread, a batch at a time, between what others ask.

    the image as the network takes it -> heat map -> deletion score, where asked for -> `Explanation`

How much a request may ask for is bounded by the number of images that a network would have to see for it.
"""

import asyncio
import base64
import io
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from raymed.explain.attribution import (
    NODES,
    ORDERS,
    SQUARES,
    TILES,
    Deletion,
    Steps,
    deletion,
    integrated_gradients,
    occlusion,
    smooth,
)
from raymed.explain.gradcam import grad_cam
from raymed.report.gallery import HEAT_MAP_SENTENCE
from raymed.serve.described import Described
from raymed.serve.footer import marked
from raymed.serve.handlers import Ask, Fields
from raymed.serve.problems import OutOfMemory, Problem, TooLarge
from raymed.tasks.predictor import Predictor

T = TypeVar("T")
Method = Literal["gradcam", "ig", "occlusion"]
Form = Literal["overlay", "array"]
METHODS: tuple[Method, ...] = get_args(Method)
_PASSES = {"gradcam": 2, "ig": 3 * NODES, "occlusion": SQUARES + 1}
"""Images that a network sees for a map; one with its gradient counts three times."""
_PASSES_OF_DELETION = (1 + ORDERS) * (TILES + 1)
_MOST_PASSES = 4096


class DeletionScore(Described):
    """How the probability falls as the image is taken away tile by tile, the highest of the map first, or at random."""

    informed: float
    """Area under the curve of the probability, from the whole image to none of it, by the map."""
    random: float
    """The same in random order."""
    difference: float
    """random - informed: above 0 where the map shows what the probability rests on; about 0 for one that shows nothing,
    and for an image whose probability is low from the start."""
    taken: list[float]
    """Of the curves: fractions of the image."""
    informed_curve: list[float]
    random_curve: list[float]


class Explanation(Described):
    """A heat map of one image, on the grid of the network's input."""

    method: Method
    target: str
    """The class that the map speaks for."""
    shape: tuple[int, int]
    """(H, W)."""
    map: str | None = None
    """base64 of H x W bytes, row by row: 0 to 255 for 0 to `maximum`. Only of the form "array"."""
    overlay: str | None = None
    """base64 of a PNG: the map over the image, the higher, the denser, several times as large where it is small, and
    below it the model, what the map is, and whether it is for research use only. Only of the form "overlay"."""
    image: str
    """base64 of a PNG: the image as the network receives it."""
    maximum: float
    """Of the map before scaling. ig: logit that a pixel adds, the mean of its neighbours; occlusion: by how much the
    logit falls without the pixel's surroundings; gradcam has no unit: 1, or 0 for an empty map."""
    deletion: DeletionScore | None = None
    note: str = HEAT_MAP_SENTENCE


class ExplainFields(Fields):
    """What a request may ask for beside the answer."""

    explain: Method | None = None
    """A heat map of each image: where the network looks, which is no evidence of where the finding is."""
    explain_as: Form = "overlay"
    """overlay: PNG of the image as the network receives it under the map; array: the map itself."""
    deletion: bool = False
    """With each map, how fast the probability falls when its highest parts are taken away first."""


class Explainer:
    """Explains the answers of a predictor.

    Attributes: methods: those that its network allows.
    """

    def __init__(self, predictor: Predictor):
        self.predictor = predictor
        self.methods = METHODS if has_feature_maps(predictor) else METHODS[1:]

    def check(self, fields: ExplainFields, num_images: int) -> None:
        """Raises Problem (422) for a method that the network does not allow, for too many images, and for a deletion
        score without a map."""
        if fields.explain is None:
            if fields.deletion:
                raise Problem(422, "deletion: explain is expected beside it, the map to be judged", field="deletion")
            return
        if fields.explain not in self.methods:
            possible = " or ".join(self.methods)
            detail = f"explain: gradcam needs feature maps, which this network has none of: {possible} is expected"
            raise Problem(422, detail, field="explain")
        most = _MOST_PASSES // (_PASSES[fields.explain] + fields.deletion * _PASSES_OF_DELETION)
        if num_images > most:
            detail = f"explain: a case of at most {most} images is expected; the field frames can choose some"
            raise TooLarge(detail, field="explain")

    async def __call__(self, item: Tensor, fields: ExplainFields, ask: Ask) -> Explanation | None:
        """item: (C, H, W) float32 in [0, 1], what `Predictor.input_image` made. None where no map is asked for. Raises
        Problem (503), of the field explain where the device has no memory for a map."""
        if fields.explain is None:
            return None
        try:
            heat_map, deleted = await self._made(item, fields.explain, fields.deletion, ask)
        except OutOfMemory:
            raise OutOfMemory("a map", field="explain") from None
        whose = None if fields.explain_as == "array" else ask.identity
        return await asyncio.to_thread(self._told, fields.explain, item, heat_map.numpy(), whose, deleted)

    async def _made(self, item: Tensor, method: Method, is_judged: bool, ask: Ask) -> tuple[Tensor, Deletion | None]:
        image = await ask.alone(lambda: self._normalised(item))
        heat_map = await in_turns(self._heat_map(method, image), ask)
        if not is_judged:
            return heat_map, None
        return heat_map, await in_turns(deletion(self._probability, image, heat_map), ask)

    def _normalised(self, item: Tensor) -> Tensor:
        return self.predictor.preprocess.normalise(item[None].to(self.predictor.device))[0]

    def _heat_map(self, method: Method, image: Tensor) -> Steps[Tensor]:
        """(H, W) float32 >= 0, on the CPU: what speaks for the positive class."""
        if method == "gradcam":
            yield
            network = self.predictor.network
            return grad_cam(network.encoder, network.head, image[None])[0].cpu()
        if method == "ig":
            return smooth((yield from integrated_gradients(self._logit, image))).relu().cpu()
        return (yield from occlusion(self._logit, image)).relu()

    def _logit(self, images: Tensor) -> Tensor:
        network = self.predictor.network
        return network.head(network.encoder(images))

    def _probability(self, images: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(self.predictor.calibration(self._logit(images).double().cpu().numpy())))

    def _told(
        self,
        method: Method,
        item: Tensor,
        heat_map: np.ndarray,
        whose: Mapping[str, Any] | None,
        deleted: Deletion | None,
    ) -> Explanation:
        """whose: what the overlay says of the model; None = the map itself."""
        pixels = (255 * item).round().to(torch.uint8).numpy().transpose(1, 2, 0).squeeze()
        maximum = float(heat_map.max())
        scaled = heat_map / maximum if maximum > 0 else heat_map
        return Explanation(
            method=method,
            target=self.predictor.bundle.classes["positive"],
            shape=(heat_map.shape[0], heat_map.shape[1]),
            map=_base64((255 * scaled).round().astype(np.uint8).tobytes()) if whose is None else None,
            overlay=None if whose is None else _png(_overlay(blend(pixels, scaled), method, whose)),
            image=_png(pixels),
            maximum=maximum,
            deletion=None if deleted is None else DeletionScore.model_validate(deleted, from_attributes=True),
        )


async def in_turns(steps: Steps[T], ask: Ask) -> T:
    """What work in steps ends with, each step in the device's thread, in turn with what others ask."""
    ends: list[T] = []

    def step() -> None:
        try:
            next(steps)
        except StopIteration as stop:
            ends.append(stop.value)

    while not ends:
        await ask.alone(step)
    return ends[0]


def has_feature_maps(predictor: Predictor) -> bool:
    """Whether the encoder's last output is maps (B, K, h, w), which Grad-CAM needs, and not tokens or (B, h, w, K)."""
    size, channels = int(predictor.bundle.preprocess["size"]), predictor.preprocess.channels
    encoder = predictor.network.encoder
    with torch.inference_mode():
        maps = encoder.maps(torch.zeros(1, channels, size, size, device=predictor.device))
    return maps.ndim == 4 and maps.shape[1] == getattr(encoder.net, "num_features", maps.shape[1])


def blend(pixels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8 or uint16 under a map (H, W) in [0, 1] -> (H, W, 3) uint8; the higher, the denser."""
    from matplotlib import colormaps

    shown = pixels.astype(np.float32) / np.iinfo(pixels.dtype).max
    grey = shown if shown.ndim == 3 else np.repeat(shown[..., None], 3, axis=2)
    alpha = 0.65 * values[..., None]
    return np.round(255 * ((1 - alpha) * grey + alpha * colormaps["inferno"](values)[..., :3])).astype(np.uint8)


def _overlay(picture: np.ndarray, method: str, whose: Mapping[str, Any]) -> np.ndarray:
    version = whose["version"] or whose["bundle"][:12]
    return marked(picture, whose["model"], version, method, whose["research_only"])


def _png(pixels: np.ndarray) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return _base64(file.getvalue())


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
