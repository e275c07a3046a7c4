"""A CLIP answers: embeddings of images and texts, zero-shot with the sentences of the request, and what lies nearest in
an index.

    embed        every image and text becomes an embedding; with both, how well each pair goes together
    zero_shot    how probable each class is that the request describes by sentences
    retrieve     of every image and text its nearest in the index that the server was started with (`index=WHERE`)

None of it is a decision: a zero-shot probability is a share among the classes that the request happens to name, and no
threshold has been validated for those.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError
from torch import Tensor
from torch.nn import functional as F

from raymed.bundle import Bundle
from raymed.config import check_choice
from raymed.metrics.zero_shot import class_embeddings, class_probabilities
from raymed.serve import handlers
from raymed.serve.described import Described
from raymed.serve.handlers import Ask, Prepared, Upload, ask_all, example_image
from raymed.serve.problems import Problem
from raymed.tasks.embedder import Embedder
from raymed.tasks.golden import golden_values
from raymed.tasks.images import unit_image
from raymed.tasks.index import load_index

MOST_TEXTS, MOST_CHARACTERS, MOST_CLASSES, MOST_NAME = 256, 8192, 64, 128
_MATCHES = 20_000
"""Of all queries of a request together."""
_KEPT = 4096
"""Sentences of prompts whose embeddings are kept."""
_BUCKET = 16
"""Texts are padded to multiples of so many tokens, so that they share batches."""
_EXAMPLE = "a chest X-ray"


def _refused(expected: str) -> PydanticCustomError:
    """Says what is expected, and not a word of what was sent: sentences and names of classes are the sender's."""
    return PydanticCustomError("expected", "{expected} expected", {"expected": expected})


def _checked_text(text: Any) -> str:
    if not isinstance(text, str) or not text.strip() or len(text) > MOST_CHARACTERS:
        raise _refused(f"text of 1 to {MOST_CHARACTERS} characters is")
    return text


def _checked_prompts(prompts: Any) -> dict[str, list[str]]:
    if not isinstance(prompts, Mapping) or not 2 <= len(prompts) <= MOST_CLASSES:
        raise _refused(f'2 to {MOST_CLASSES} classes, {{"class": ["a sentence", ...], ...}}, are')
    if not all(isinstance(name, str) and 1 <= len(name) <= MOST_NAME for name in prompts):
        raise _refused(f"names of classes of 1 to {MOST_NAME} characters are")
    sentences = {name: [given] if isinstance(given, str) else given for name, given in prompts.items()}
    if not all(isinstance(several, list) and several for several in sentences.values()):
        raise _refused("one sentence or a list of sentences for each class is")
    if sum(map(len, sentences.values())) > MOST_TEXTS:
        raise _refused(f"at most {MOST_TEXTS} sentences are")
    return {name: [_checked_text(text) for text in several] for name, several in sentences.items()}


Text = Annotated[str, BeforeValidator(_checked_text)]
Texts = Annotated[list[Text], BeforeValidator(lambda given: [given] if isinstance(given, str) else given)]


class ClipFields(handlers.Fields):
    """What a request may say."""

    task: Literal["embed", "zero_shot", "retrieve"] = "embed"
    texts: Annotated[Texts, Field(max_length=MOST_TEXTS)] = []
    """Of embed and retrieve; one text may stand alone."""
    prompts: Annotated[dict[str, list[str]], BeforeValidator(_checked_prompts)] | None = None
    """Of zero_shot: the classes, each with a sentence or several that describe it."""
    k: Annotated[int, Field(ge=1, le=1000)] = 10
    """Of retrieve: how many of the nearest."""


class Match(Described):
    """An entry of the index."""

    rank: int
    """From 1."""
    row: int
    """Of the manifest that the index was made of, from 1."""
    cosine: float
    caption: str
    image: str
    """The first 16 hexadecimal digits of the sha256 of the image's pixels."""


class ImageAnswer(Described):
    """Of one image."""

    file: int
    """Place in the request, from 0."""
    frame: int | None
    embedding: list[float] | None = None
    """Of unit norm."""
    similarity: list[float] | None = None
    """Cosine with each text, in their order."""
    pair_probability: list[float] | None = None
    """That image and text belong together, of pairs that are as likely matched as random; None where the model knows no
    calibration."""
    probabilities: dict[str, float] | None = None
    """Of the classes."""
    label: str | None = None
    """The most probable class."""
    matches: list[Match] | None = None


class TextAnswer(Described):
    """Of one text."""

    text: int
    """Place in the request, from 0."""
    truncated: bool
    """It is longer than the model reads, so that its end does not count."""
    embedding: list[float] | None = None
    matches: list[Match] | None = None


class ClipResult(handlers.Result):
    """Of a request."""

    kind: Literal["clip"] = "clip"
    task: str
    images: list[ImageAnswer]
    texts: list[TextAnswer]
    probabilities: dict[str, float] | None = None
    """Of zero_shot: the mean over the images of the case."""
    label: str | None = None
    """The most probable class."""
    truncated: bool = False
    """A sentence of the prompts is longer than the model reads, so that its end does not count."""


class Handler:
    """See `raymed.serve.handlers.Handler`."""

    Fields: ClassVar = ClipFields
    Result: ClassVar = ClipResult
    needs_image: ClassVar = False

    def __init__(self, bundle: Bundle, device: str, options: Mapping[str, str]):
        for name in options:
            check_choice("option of a CLIP", name, ("index",))
        self.bundle = bundle
        self.embedder = Embedder.from_bundle(bundle, device)
        self.window = self.embedder.preprocess.window
        self.networks = {"image": self._embed_images, "text": self._embed_texts}
        self.modules = [self.embedder.clip.visual]
        self.index = load_index(options["index"], self.embedder.identity) if "index" in options else None
        self._kept: OrderedDict[str, tuple[np.ndarray, bool]] = OrderedDict()

    @torch.inference_mode()
    def _embed_images(self, images: Tensor) -> np.ndarray:
        """(B, C, size, size) in [0, 1] -> (B, D) of unit norm."""
        embedder = self.embedder
        return _unit(embedder.clip.encode_image(embedder.preprocess.normalise(images.to(embedder.device))))

    @torch.inference_mode()
    def _embed_texts(self, tokens: Tensor) -> np.ndarray:
        """(B, L) int64 -> (B, D) of unit norm."""
        return _unit(self.embedder.clip.encode_text(tokens.to(self.embedder.device)))

    def prepare(self, upload: Upload) -> Tensor:
        """(C, size, size) float32 in [0, 1]."""
        return unit_image(self.embedder.preprocess, [upload.pixels], upload.file)[0]

    async def answer(self, images: Sequence[Prepared], fields: ClipFields, ask: Ask) -> ClipResult:
        """By the task."""
        self._check(images, fields)
        embedded = np.array(await ask_all(ask, "image", [image.item for image in images]))
        if fields.task == "zero_shot":
            return await self._zero_shot(images, embedded, fields.prompts or {}, ask)
        texts, truncated = await self._embedded(fields.texts, ask)
        told_images = [ImageAnswer(file=image.upload.file, frame=image.upload.frame) for image in images]
        told_texts = [TextAnswer(text=place, truncated=cut) for place, cut in enumerate(truncated)]
        told = ClipResult(task=fields.task, images=told_images, texts=told_texts)
        if fields.task == "embed":
            self._tell_embeddings(told, embedded, texts)
        else:
            await self._tell_matches(told, [*embedded, *texts], fields.k)
        return told

    def _check(self, images: Sequence[Prepared], fields: ClipFields) -> None:
        """Raises Problem (422) for a task without what it needs, or with what has nothing to do with it."""
        if fields.task == "zero_shot":
            _expect(bool(images), "files", "zero_shot needs an image")
            _expect(fields.prompts is not None, "prompts", 'zero_shot needs {"class": ["a sentence", ...], ...}')
            _expect(not fields.texts, "texts", "zero_shot takes its sentences from prompts")
            return
        _expect(bool(images or fields.texts), "texts", f"{fields.task} needs a file or a text")
        _expect(fields.prompts is None, "prompts", "only zero_shot takes prompts")
        many = fields.task == "retrieve" and (len(images) + len(fields.texts)) * fields.k > _MATCHES
        _expect(not many, "k", f"k: at most {_MATCHES} matches in all are expected")
        is_there = fields.task != "retrieve" or self.index is not None
        _expect(is_there, "task", "there is no index to search: the server was started without index=WHERE")

    async def _zero_shot(
        self, images: Sequence[Prepared], embedded: np.ndarray, prompts: Mapping[str, list[str]], ask: Ask
    ) -> ClipResult:
        texts, truncated = await self._sentences([text for several in prompts.values() for text in several], ask)
        ends = np.cumsum([len(several) for several in prompts.values()])
        classes = class_embeddings(np.split(texts, ends[:-1]))
        found = class_probabilities(embedded, classes, self.embedder.temperature)
        names = list(prompts)
        return ClipResult(
            task="zero_shot",
            reasons=["zero-shot probabilities have no threshold that was validated: nothing is decided"],
            images=[
                ImageAnswer(file=image.upload.file, frame=image.upload.frame, **_classes(names, row))
                for image, row in zip(images, found, strict=True)
            ],
            texts=[],
            truncated=truncated,
            **_classes(names, found.mean(axis=0)),
        )

    def _tell_embeddings(self, told: ClipResult, images: np.ndarray, texts: np.ndarray) -> None:
        """Embeddings and, with both kinds, how well they go together."""
        for image, embedding in zip(told.images, images, strict=True):
            image.embedding = embedding.tolist()
            if len(texts):
                cosines = texts @ embedding
                probabilities = self.embedder.pair_probability(cosines)
                image.similarity = cosines.tolist()
                image.pair_probability = None if probabilities is None else probabilities.tolist()
        for text, embedding in zip(told.texts, texts, strict=True):
            text.embedding = embedding.tolist()

    async def _tell_matches(self, told: ClipResult, queries: Sequence[np.ndarray], k: int) -> None:
        assert self.index is not None
        found = await asyncio.to_thread(self.index.matches, np.array(queries), k)
        for query, matches in zip([*told.images, *told.texts], found, strict=True):
            query.matches = [Match.model_validate(match) for match in matches]

    async def _sentences(self, texts: Sequence[str], ask: Ask) -> tuple[np.ndarray, bool]:
        """(N, D) embeddings of prompts, and whether one was truncated. Those of late are kept."""
        found = {text: self._kept[text] for text in texts if text in self._kept}  # before others push them out
        new = [text for text in dict.fromkeys(texts) if text not in found]
        embedded, truncated = await self._embedded(new, ask)
        found |= dict(zip(new, zip(embedded, truncated, strict=True), strict=True))
        for text, value in found.items():
            self._kept[text] = value
            self._kept.move_to_end(text)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return np.array([found[text][0] for text in texts]), any(cut for _, cut in found.values())

    async def _embedded(self, texts: Sequence[str], ask: Ask) -> tuple[np.ndarray, list[bool]]:
        """(N, D) embeddings, and which texts were truncated."""
        items, truncated = await asyncio.to_thread(self._tokens, texts)
        found = await ask_all(ask, "text", items)
        return np.array(found, np.float32).reshape(-1, self.embedder.dimension), truncated

    def _tokens(self, texts: Sequence[str]) -> tuple[list[Tensor], list[bool]]:
        """Items of the network "text", and which texts were truncated."""
        tokens, lengths = self.embedder.tokenizer(texts)
        longest, pad = self.embedder.tokenizer.context_length, self.embedder.tokenizer.pad_id
        widths = [min(longest, -(-length // _BUCKET) * _BUCKET) for length in lengths.tolist()]
        filled = F.pad(tokens, (0, max([0, *widths]) - tokens.shape[1]), value=pad)  # cuts where it is negative
        items = [row[:width] for row, width in zip(filled, widths, strict=True)]
        return items, (lengths > longest).tolist()

    def examples(self) -> dict[str, Tensor]:
        """A picture of a gradient, and a short text."""
        image = example_image(int(self.bundle.preprocess["size"]))
        return {"image": self.prepare(image), "text": self._tokens([_EXAMPLE])[0][0]}

    def golden(self) -> list[float]:
        """Cosines of patterns and texts."""
        return golden_values(self.embedder)

    def about(self) -> dict[str, Any]:
        """What it can be asked, and with how much."""
        tasks = ["embed", "zero_shot"] + ["retrieve"] * (self.index is not None)
        return {
            "tasks": tasks,
            "dimension": self.embedder.dimension,
            "context_length": self.embedder.tokenizer.context_length,
            "temperature": self.embedder.temperature,
            "calibrated": bool(self.bundle.calibration),
            "index": None if self.index is None else {"of": self.index.of, "entries": len(self.index)},
        }


def _expect(is_so: bool, field: str, detail: str) -> None:
    if not is_so:
        raise Problem(422, detail, field=field)


def _classes(names: Sequence[str], probabilities: np.ndarray) -> dict[str, Any]:
    return {
        "probabilities": dict(zip(names, probabilities.tolist(), strict=True)),
        "label": names[int(probabilities.argmax())],
    }


def _unit(features: Tensor) -> np.ndarray:
    return F.normalize(features.float(), dim=-1).cpu().numpy()
