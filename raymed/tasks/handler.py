"""What a server needs of a bundle, and nothing else: rows of a request in, rows of an answer out, all plain values.

    handler = load_handler(Bundle.load(folder), index="s3://bucket/index.parquet")
    handler.handle({"rows": [{"image": PNG}]})                                          of a classifier
    handler.handle({"rows": [{"image": PNG, "text": "a nodule"}]})                      of a CLIP: embeddings
    handler.handle({"rows": [{"image": PNG}], "task": "zero_shot", "prompts": {"nodule": ["..."], "clear": ["..."]}})
    handler.handle({"rows": [{"text": "a nodule"}], "task": "retrieve", "k": 5})

An image is the content of a file (PNG, JPEG, TIFF, DICOM, NIfTI) as bytes, of any size. The answer has one row a row of
the request, in its order, of values that JSON holds. Which index is searched is decided by whoever starts the server,
never by a request. The model in MLflow (`raymed.registry.pyfunc`) is this behind a table.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from raymed.bundle import Bundle
from raymed.config import UserError, check_choice
from raymed.storage.locations import Location
from raymed.tasks.embedder import Embedder, class_sentences
from raymed.tasks.images import read_content
from raymed.tasks.index import Index, load_index
from raymed.tasks.predictor import Predictor

TASKS = ("embed", "zero_shot", "retrieve")
DEFAULT_K = 10
KINDS = {"image": bytes, "text": str}
Row = dict[str, Any]
Request = Mapping[str, Any]


class Handler(Protocol):
    """A bundle of some kind, answering."""

    def handle(self, request: Request) -> list[Row]:
        """Answer a request: {"rows": [{"image": bytes, "text": str}, ...], ...}. Raises UserError, by its row from 0,
        for what cannot be used."""
        ...


def load_handler(bundle: Bundle, *, index: Location | None = None, device: str = "cpu") -> Handler:
    """What answers for a bundle of this kind.

    index: of a CLIP, the file that `retrieve` searches (`raymed.tasks.index`); it is read at once. Raises UserError for
    an unknown kind, and for an index of another model.
    """
    if bundle.kind == "classifier":
        return ClassifierHandler(Predictor.from_bundle(bundle, device))
    if bundle.kind == "clip":
        embedder = Embedder.from_bundle(bundle, device)
        return ClipHandler(embedder, load_index(index, embedder.identity) if index else None)
    raise UserError(f"the bundle holds a {bundle.kind}: nothing here answers for it")


class ClassifierHandler:
    """Every row has an image; the answer is `raymed.tasks.predictor.Prediction.row`."""

    def __init__(self, predictor: Predictor):
        self.predictor = predictor

    def handle(self, request: Request) -> list[Row]:
        """As the module says."""
        _check_names(request, ())
        images = _images(request["rows"], self.predictor.preprocess.window)
        return [prediction.row() for prediction in self.predictor(images)]


class ClipHandler:
    """Answers by the request's `task`, which is "embed" where none is named. Every row also has

        truncated   a text of it (or a prompt) is longer than the context, so that its end does not count

    embed: a row has an image, a text or both. image_embedding, text_embedding: D numbers of unit norm, None where there
    is no such input; similarity: their cosine, and probability: that they belong together, None unless there are both
    (of the probability also where the bundle knows no calibration).
    zero_shot: a row has an image; the request `prompts` {class: sentences}, as JSON text or plain. probabilities
    {class: number}; decision: the class of the largest.
    retrieve: a row has an image or a text; the request `k` (10). matches: the k nearest in the index, the nearest
    first, each {"rank", "row", "cosine", "caption", "image"}.
    """

    def __init__(self, embedder: Embedder, index: Index | None = None):
        self.embedder = embedder
        self.index = index

    def handle(self, request: Request) -> list[Row]:
        """As the class says."""
        _check_names(request, ("task", "prompts", "k"))
        task = request.get("task") or TASKS[0]
        check_choice("task", task, TASKS)
        return getattr(self, f"_{task}")(request)

    def _embed(self, request: Request) -> list[Row]:
        rows = request["rows"]
        with_image, with_text = _places(rows, "image"), _places(rows, "text")
        if missing := set(range(len(rows))) - {*with_image, *with_text}:
            raise UserError(f"row {min(missing)} has neither an image nor a text")
        images, texts, truncated = self._embeddings(rows, with_image, with_text)
        return [
            {"image_embedding": _plain(images.get(place)), "text_embedding": _plain(texts.get(place))}
            | self._pair(images.get(place), texts.get(place))
            | {"truncated": place in truncated}
            for place in range(len(rows))
        ]

    def _pair(self, image: np.ndarray | None, text: np.ndarray | None) -> Row:
        if image is None or text is None:
            return {"similarity": None, "probability": None}
        cosine = image @ text
        probability = self.embedder.pair_probability(cosine)
        return {"similarity": float(cosine), "probability": None if probability is None else float(probability)}

    def _zero_shot(self, request: Request) -> list[Row]:
        sentences = class_sentences(_parsed(request.get("prompts")))
        images = _images(request["rows"], self.embedder.preprocess.window)
        found = self.embedder.zero_shot(images, sentences)
        truncated = bool(self.embedder.truncated([text for several in sentences.values() for text in several]).any())
        names = list(sentences)
        return [
            {
                "probabilities": dict(zip(names, row.tolist(), strict=True)),
                "decision": names[int(row.argmax())],
                "truncated": truncated,
            }
            for row in found
        ]

    def _retrieve(self, request: Request) -> list[Row]:
        if self.index is None:
            raise UserError(
                'there is no index to search: load the model with one, model_config={"index": "s3://.../index.parquet"}'
            )
        rows = request["rows"]
        with_image, with_text = _places(rows, "image"), _places(rows, "text")
        if sorted([*with_image, *with_text]) != list(range(len(rows))):
            wrong = next(i for i in range(len(rows)) if (i in with_image) == (i in with_text))
            raise UserError(f"row {wrong} must have either an image or a text: one of them is what is searched for")
        images, texts, truncated = self._embeddings(rows, with_image, with_text)
        queries = np.array([(images | texts)[place] for place in range(len(rows))], np.float32)
        k = request.get("k")
        found = self.index.matches(queries.reshape(-1, self.embedder.dimension), DEFAULT_K if k is None else k)
        return [{"matches": matches, "truncated": place in truncated} for place, matches in enumerate(found)]

    def _embeddings(
        self, rows: Sequence[Row], with_image: list[int], with_text: list[int]
    ) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray], set[int]]:
        """Embeddings of the images and of the texts, by row, and the rows whose text was truncated."""
        window, embedder = self.embedder.preprocess.window, self.embedder
        texts = [rows[place]["text"] for place in with_text]
        images = embedder.embed_images([read_content(rows[place]["image"], place, window) for place in with_image])
        truncated = {place for place, cut in zip(with_text, embedder.truncated(texts), strict=True) if cut}
        return (
            dict(zip(with_image, images, strict=True)),
            dict(zip(with_text, embedder.embed_texts(texts), strict=True)),
            truncated,
        )


def _check_names(request: Request, known: tuple[str, ...]) -> None:
    for name in request:
        check_choice("field of the request", name, ("rows", *known))


def _images(rows: Sequence[Row], window: tuple[float, float] | None) -> list[np.ndarray]:
    """The decoded image of every row."""
    if missing := set(range(len(rows))) - set(_places(rows, "image")):
        raise UserError(f"row {min(missing)} has no image")
    return [read_content(row["image"], place, window) for place, row in enumerate(rows)]


def _places(rows: Sequence[Row], name: str) -> list[int]:
    """The rows that have such an input; None and nothing at all are none."""
    places = []
    for place, row in enumerate(rows):
        value = row.get(name)
        if value is None or (isinstance(value, str | bytes) and not value.strip()):
            continue
        if not isinstance(value, KINDS[name]):
            wanted = {"image": "the content of a file, as bytes", "text": "text"}[name]
            raise UserError(f"row {place}: {name} must be {wanted}, got {type(value).__name__}")
        places.append(place)
    return places


def _parsed(prompts: Any) -> Any:
    if not isinstance(prompts, str):
        return prompts
    try:
        return json.loads(prompts) if prompts else {}
    except ValueError as error:
        raise UserError(f'prompts must be JSON, {{"class": ["a sentence", ...], ...}}: {error}') from None


def _plain(embedding: np.ndarray | None) -> list[float] | None:
    return None if embedding is None else embedding.tolist()
