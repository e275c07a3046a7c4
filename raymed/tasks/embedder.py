"""A finished CLIP in use: images and texts become embeddings, and embeddings are compared.

    Embedder      a "clip" bundle in use; the only way from pixels or words to an embedding, in a job or a server
    index_data    the embeddings of a data set's images or captions, to search in (`raymed.tasks.index`)

An image goes through the same `Preprocess` as in training, a text through the tokenizer that travels in the bundle:
nothing asks the network for anything. Embeddings are of unit norm, so that a product is a cosine.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from raymed.bundle import Bundle
from raymed.config import UserError, from_dict, to_json
from raymed.data.captions import CaptionSet
from raymed.data.preprocess import Preprocess
from raymed.metrics.calibration import Calibration
from raymed.metrics.similarity import SimilarityCalibration
from raymed.metrics.zero_shot import class_embeddings, class_probabilities
from raymed.models.clip import Clip, from_architecture
from raymed.models.tokens import Tokenizer
from raymed.tasks.images import unit_image
from raymed.tasks.index import Index, Of

_BATCH = 128
Prompts = Mapping[str, str | Sequence[str]]


class Embedder:
    """A "clip" bundle in use.

    Attributes: bundle; preprocess; tokenizer; device; clip (`raymed.models.clip.Clip`, in eval mode); dimension:
    D of every embedding; temperature, by which cosines are divided for zero-shot probabilities.
    """

    def __init__(
        self, bundle: Bundle, clip: Clip, tokenizer: Tokenizer, preprocess: Preprocess, device: str | torch.device
    ):
        self.bundle = bundle
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.clip = clip.to(self.device).eval()
        self.dimension: int = bundle.model["architecture"]["clip"]["embed_dim"]
        self.temperature = float(bundle.model["temperature"])

    @classmethod
    def from_bundle(cls, bundle: Bundle, device: str | torch.device = "cpu") -> "Embedder":
        """Rebuild both towers and the tokenizer, without any network. Raises UserError for a bundle of another kind."""
        if bundle.kind != "clip":
            raise UserError(f"the bundle holds a {bundle.kind}, not a CLIP: it has no embeddings of texts")
        preprocess = from_dict(Preprocess, bundle.preprocess)
        clip = from_architecture(bundle.model["architecture"], preprocess)
        clip.load_state_dict(bundle.weights)
        return cls(bundle, clip, Tokenizer.from_json(bundle.model["tokenizer"]), preprocess, device)

    @cached_property
    def identity(self) -> str:
        """sha256 of all that decides an embedding: weights, architecture, tokenizer, preprocessing. What an index of
        this model bears."""
        deciding = [self.bundle.model["architecture"], self.bundle.model["tokenizer"], self.bundle.preprocess]
        digest = hashlib.sha256(json.dumps(json.loads(to_json(deciding)), sort_keys=True).encode())
        for name, tensor in sorted(self.bundle.weights.items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def embed_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Decoded images, each (H, W) or (H, W, 3) uint8 or uint16 of any size -> (N, D) float32 of unit norm.

        They are to come from `raymed.data.readers.read(path, frame, window=embedder.preprocess.window)`. Raises
        UserError, by its place, for an image that is no such array, is empty, or has one value everywhere.
        """
        starts = range(0, len(images), _BATCH)
        return self._embed_images(unit_image(self.preprocess, images[i : i + _BATCH], i) for i in starts)

    def embed_data(self, data: CaptionSet, indices: np.ndarray) -> np.ndarray:
        """Images of a data set with this preprocessing -> (N, D) float32 of unit norm."""
        starts = range(0, len(indices), _BATCH)
        return self._embed_images(data.batch(indices[i : i + _BATCH]).unit_image() for i in starts)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """(N, D) float32 of unit norm. A text that is longer than the context counts by its beginning (`truncated`).

        Texts of like length share a batch, which is as long as its longest text. Raises UserError, by its place, for
        what is no text or holds nothing.
        """
        if not len(texts):
            return np.empty((0, self.dimension), np.float32)
        tokens, lengths = self.tokenizer(_checked(texts))
        used = lengths.clamp(max=tokens.shape[1])
        order = used.argsort(stable=True)
        parts = [
            _unit(self.clip.encode_text(tokens[part, : int(used[part].max())].to(self.device)))
            for part in order.split(_BATCH)
        ]
        return torch.cat(parts)[order.argsort()].numpy()

    def truncated(self, texts: Sequence[str]) -> np.ndarray:
        """(N,) bool: whether a text is longer than the context, so that its end does not count."""
        if not len(texts):
            return np.empty(0, bool)
        return self.tokenizer(_checked(texts))[1].numpy() > self.tokenizer.context_length

    def similarity(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> np.ndarray:
        """Cosine of every image with every text: (N, M) float32."""
        return self.embed_images(images) @ self.embed_texts(texts).T

    def pair_probability(self, cosines: np.ndarray) -> np.ndarray | None:
        """Cosines of any shape -> float64 probabilities that image and text belong together, of pairs that are as
        likely matched as random (`raymed.metrics.similarity`); None where the bundle knows no calibration."""
        found = self.bundle.calibration
        if not found:
            return None
        line = Calibration(found["temperature"], found["shift"])
        return SimilarityCalibration(found["scale"], found["bias"], line)(cosines)

    def zero_shot(self, images: Sequence[np.ndarray], prompts: Prompts) -> np.ndarray:
        """Probabilities of classes that sentences describe: (N, K) float64, the classes in the order of `prompts`
        (`raymed.metrics.zero_shot`). Raises UserError as `embed_classes` and `embed_images` do."""
        return class_probabilities(self.embed_images(images), self.embed_classes(prompts), self.temperature)

    def embed_classes(self, prompts: Prompts) -> np.ndarray:
        """{class: sentence, or several} -> (K, D) float32 of unit norm. Raises UserError for fewer than two classes, or
        a class without a sentence."""
        sentences = class_sentences(prompts)
        embedded = self.embed_texts([sentence for several in sentences.values() for sentence in several])
        ends = np.cumsum([len(several) for several in sentences.values()])
        return class_embeddings(np.split(embedded, ends[:-1]))

    @torch.inference_mode()
    def _embed_images(self, parts: Iterable[Tensor]) -> np.ndarray:
        found = [_unit(self.clip.encode_image(self.preprocess.normalise(part.to(self.device)))) for part in parts]
        return torch.cat(found).numpy() if found else np.empty((0, self.dimension), np.float32)


def index_data(embedder: Embedder, data: CaptionSet, indices: np.ndarray, of: Of = "image") -> Index:
    """An index of a data set's images, each with its first caption, or of all their captions, each with its image.

    indices: (N,) of the data set, such as those of a split.
    """
    captions = [data.captions[i] if of == "text" else data.captions[i][:1] for i in indices]
    repeats = [len(several) for several in captions]
    texts = [text for several in captions for text in several]
    return Index(
        embeddings=embedder.embed_data(data, indices) if of == "image" else embedder.embed_texts(texts),
        rows=data.rows[indices].repeat(repeats),
        captions=texts,
        images=[f"{content:016x}" for content in data.content[indices].repeat(repeats)],
        model=embedder.identity,
        of=of,
        run=embedder.bundle.provenance.get("run_key"),
    )


def class_sentences(prompts: Prompts) -> dict[str, list[str]]:
    """{class: its sentences}, one sentence or several being given. Raises UserError for fewer than two classes, or a
    class without a sentence."""
    if not isinstance(prompts, Mapping) or len(prompts) < 2:
        raise UserError(
            f'prompts must name two classes or more, {{"class": ["a sentence", ...], ...}}, got {prompts!r}'
        )
    sentences = {name: [given] if isinstance(given, str) else given for name, given in prompts.items()}
    for name, several in sentences.items():
        is_list = isinstance(several, list | tuple) and len(several) > 0
        if not is_list or not all(isinstance(text, str) and text.strip() for text in several):
            raise UserError(f"prompts: class {name!r} needs one sentence or more, got {several!r}")
    return {name: list(several) for name, several in sentences.items()}


def _checked(texts: Sequence[str]) -> list[str]:
    for place, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"text {place}: {'is empty' if isinstance(text, str) else f'must be text, got {text!r}'}")
    return list(texts)


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()
