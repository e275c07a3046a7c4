"""What answers for a bundle: one file a kind, named as the bundle's `kind`, with a class `Handler`.

    uploads -> prepare (a thread of many) -> networks (one thread a device, in batches) -> answer

Nothing else in `raymed.serve` knows kinds: a new one is a file here and, for the page, `page/panels/KIND.js`. The file
has three classes (`clip.py` is the shorter example with several networks, `classifier.py` the one with decisions):

    Fields    what a request may say, of `Fields`. Types check it; what they cannot is a Problem (422) with the name of
              the field, which says what is expected and nothing of what was sent. Lists take one value alone too, since
              forms have no lists
    Result    what an answer says, of `Result`, with `kind`. Pixels (masks, pictures) are base64 with their shape beside
              them, as in `raymed.serve.explain.Explanation`. `decision` only by a threshold that was validated; without
              one it is None, and `reasons` say why
    Handler   the bundle in use (below). Its networks take a batch under `torch.inference_mode` and give plain values of
              each item on the CPU. Items that share a batch have one shape: what varies is padded to a few lengths.
              `ask_all` batches with other requests; other work on the device goes through `Ask.alone` in steps, each
              as short as a batch (`raymed.serve.explain.in_turns`), and what else computes through a thread

A handler that has `regions(answer, images) -> list[Region]` says so what DICOM shows of its answer (the `result` of
`raymed.serve.service.Answer`) beside a report: masks, boxes. Without one these are the heat maps of the answer's
`images[].explanation`, and an answer that decides nothing has no DICOM.

Answers are those of the class in `raymed.tasks` that jobs use, and fields bound what a request can cost. Golden inputs
(`raymed.tasks.golden`) of the kind tell it from a broken copy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
from pydantic import ConfigDict, Field, field_validator
from torch import Tensor, nn

from raymed.bundle import Bundle
from raymed.config import UserError
from raymed.data.readers import Window
from raymed.serve.described import Described

T = TypeVar("T")
Decision = Literal["positive", "negative", "abstain"]
Network = Callable[[Tensor], Sequence[Any]]
"""(B, ...) -> B results, on the server's device."""


@dataclass(frozen=True)
class Upload:
    """A decoded image. pixels: (H, W) or (H, W, 3) uint8 or uint16. file: place of its file in the request, from 0.
    frame: number, from 1, of a file that holds several. kind: PNG, DICOM, ...; header: DICOM's data set without its
    pixels, for answers to the sender and nobody else."""

    pixels: np.ndarray
    file: int = 0
    frame: int | None = None
    kind: str = ""
    header: Any = None


@dataclass(frozen=True)
class Prepared:
    """An upload with what a network takes of it: item, a tensor without batch axis."""

    upload: Upload
    item: Tensor


@dataclass(frozen=True)
class Region:
    """What a model has to show of an image, for the overlays and segmentations of `raymed.serve.dicom`.

    Attributes:
        place: of the image in the case, from 0.
        values: makes (H, W) float in [0, 1] on the image's own grid; only asked when there is room for it.
        method: how it was made, in a word that no other region of the image has.
        finding: what the values are of; "" of a heat map, which shows where a network looks and no finding.
    """

    place: int
    values: Callable[[], np.ndarray]
    method: str
    finding: str = ""


class Ask(Protocol):
    """How a handler reaches its networks."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What stands in the answer of the model: model, version, bundle, research_only, ... for pictures to bear."""
        ...

    @property
    def at_once(self) -> int:
        """Items that a case may have in the queue, at least 1."""
        ...

    async def __call__(self, network: str, item: Tensor) -> Any:
        """The result of one of `Handler.networks` for one item, computed in a batch with those of other requests.
        Raises Problem (503) where too many wait."""
        ...

    async def alone(self, work: Callable[[], T]) -> T:
        """The result of work in the thread of the device, between batches: explanations, whatever has gradients."""
        ...


async def ask_all(ask: Ask, network: str, items: Sequence[Tensor]) -> list[Any]:
    """The results of a network for many items. Only some wait at a time, so that a large case leaves others room in the
    queue. Raises what asking for one of them raised first; the others are then no longer waited for."""
    found: list[Any] = []
    for start in range(0, len(items), ask.at_once):
        found += await _together(ask, network, items[start : start + ask.at_once])
    return found


async def _together(ask: Ask, network: str, items: Sequence[Tensor]) -> list[Any]:
    asked = [asyncio.ensure_future(ask(network, item)) for item in items]
    try:
        return await asyncio.gather(*asked)
    finally:
        for each in asked:
            each.cancel()
        del asked  # a cancelled task holds the frame that it was raised through, and with it the pixels


def example_image(size: int) -> Upload:
    """A picture of a gradient, to warm up with."""
    ramp = np.add.outer(np.arange(size), np.arange(size)) / (2 * size)
    return Upload((255 * ramp).astype(np.uint8))


class Fields(Described):
    """What a request may say beside its files."""

    model_config = ConfigDict(extra="forbid")

    frames: Annotated[list[int], Field(max_length=4096)] | None = None
    """Numbers, from 1, of the frames that count, in every file that holds several. None: all of them."""

    @field_validator("frames", mode="before")
    @classmethod
    def _several(cls, frames: Any) -> Any:
        """A form that names one frame has no list."""
        return [frames] if isinstance(frames, str | int) else frames


class Result(Described):
    """What every answer says; a kind's own has more. Answers that decide nothing have no decision."""

    decision: Decision | None = None
    reasons: list[str] = []
    """Why the decision is as it is, or why there is none, for people."""


class Handler(Protocol):
    """A bundle of some kind, answering. Made in a thread; `answer` runs in the event loop and must not compute."""

    Fields: ClassVar[type[Fields]]
    Result: ClassVar[type[Result]]
    needs_image: ClassVar[bool]

    bundle: Bundle
    networks: Mapping[str, Network]
    modules: Sequence[nn.Module]
    """What is folded (`raymed.models.folding`) and, with hardware.compile, compiled: each takes one batch, of items of
    one shape, and gives a tensor. All networks together, each run once, call each once."""
    window: Window | None
    """(center, width) that DICOM and NIfTI are read with."""

    def __init__(self, bundle: Bundle, device: str, options: Mapping[str, str]) -> None:
        """options: what `Wanted.options` holds. Raises UserError for a bundle or an option that cannot be used."""
        ...

    def prepare(self, upload: Upload) -> Tensor:
        """An item of a network. Raises UserError for pixels that cannot be used."""
        ...

    async def answer(self, images: Sequence[Prepared], fields: Any, ask: Ask) -> Result:
        """The answer for the images of one case. Raises UserError for fields that cannot be used together."""
        ...

    def examples(self) -> Mapping[str, Tensor]:
        """An item for each network, to warm up with."""
        ...

    def golden(self) -> list[float]:
        """What it answers on golden inputs (`raymed.tasks.golden`)."""
        ...

    def about(self) -> dict[str, Any]:
        """What people and programs are told of the model, as JSON: classes, threshold, what a request may say."""
        ...


def handler_class(kind: str) -> type[Handler]:
    """The class that answers for bundles of a kind. Raises UserError where there is none."""
    module = f"{__name__}.{kind}"
    if not kind.isidentifier() or find_spec(module) is None:
        raise UserError(f"the bundle holds a {kind}: nothing here answers for it")
    return import_module(module).Handler
