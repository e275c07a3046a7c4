"""Tokenizers of CLIP's text towers, in one form: the Rust `tokenizers` library behind open_clip's cleaning of texts.

open_clip has two: its own byte pair encoding (`SimpleTokenizer`) and those of the transformers library (`HFTokenizer`).
Both become a `Tokenizer` with the same ids that says how long a text was, and travels in a bundle as JSON.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raymed.config import UserError

BYTES = 512
"""First entries of open_clip's vocabulary: every byte, within a word and at its end, with which all can be spelt."""
_START, _END = "<start_of_text>", "<end_of_text>"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Texts -> token ids, as open_clip's tokenizer of the same model gives them.

    Attributes:
        context_length: of the text tower. Longer texts are cut; their end token stays the last one.
        pad_id: fills the shorter texts of a batch.
    """

    def __init__(self, backend: Any, clean: str, context_length: int, pad_id: int, blank_id: int | None = None):
        """
        Args:
            backend: a `tokenizers.Tokenizer`.
            clean: "lower", "whitespace" or "canonicalize": open_clip's names for what is done to a text before.
            blank_id: a token that is replaced by 0 (open_clip's `strip_sep_token`).
        """
        from open_clip.tokenizer import get_clean_fn

        self.context_length = context_length
        self.pad_id = pad_id
        self._clean_name, self._clean = clean, get_clean_fn(clean)
        self._blank_id = blank_id
        self._backend = backend
        backend.no_padding()
        backend.enable_truncation(context_length)
        self._added = backend.num_special_tokens_to_add(False)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """N texts -> (tokens (N, L) int64, L the longest of them; lengths (N,) int64 before they were cut, so that a
        text with a length above `context_length` has lost its end)."""
        found = self._backend.encode_batch([self._clean(text) for text in texts])
        lengths = [self._length(encoding) for encoding in found]
        width = max((len(encoding) for encoding in found), default=0)
        tokens = [encoding.ids + [self.pad_id] * (width - len(encoding)) for encoding in found]
        ids = torch.tensor(tokens, dtype=torch.int64).view(len(found), width)
        if self._blank_id is not None:
            ids = ids.masked_fill(ids == self._blank_id, 0)
        return ids, torch.tensor(lengths, dtype=torch.int64)

    def _length(self, encoding: Any) -> int:
        """Before the cut: the parts cut off stand in `overflowing`, each with start and end tokens of its own."""
        return len(encoding) + sum(len(part) - self._added for part in encoding.overflowing)

    def to_json(self) -> str:
        """Everything, the vocabulary too."""
        state = {
            "clean": self._clean_name,
            "context_length": self.context_length,
            "pad_id": self.pad_id,
            "blank_id": self._blank_id,
            "tokenizer": json.loads(self._backend.to_str()),
        }
        return json.dumps(state, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """The inverse of `to_json`."""
        import tokenizers

        state = json.loads(text)
        return cls(tokenizers.Tokenizer.from_str(json.dumps(state.pop("tokenizer"))), **state)


def open_clip_tokenizer(context_length: int, clean: str = "lower", vocabulary: int | None = None) -> Tokenizer:
    """open_clip's own byte pair encoding (the one of OpenAI's CLIP).

    Args:
        vocabulary: keep this many tokens: merges stand in the order of how frequent they were, and the first ones are
            an encoding of their own, in which rare words take more tokens. None = all 49,408.
    """
    from open_clip.tokenizer import SimpleTokenizer
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    full = SimpleTokenizer()
    merges: Any = list(full.bpe_ranks)[: None if vocabulary is None else vocabulary - BYTES - 2]
    kept = BYTES + len(merges)
    tokens = {token: number for token, number in full.encoder.items() if number < kept}
    tokens |= {_START: kept, _END: kept + 1}
    backend = Backend(models.BPE(vocab=tokens, merges=merges, end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in (_START, _END)])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A {_END}", special_tokens=[(_START, kept), (_END, kept + 1)]
    )
    return Tokenizer(backend, clean, context_length, pad_id=0)


def transformers_tokenizer(
    place: str, context_length: int, clean: str = "whitespace", strip_sep_token: bool = False
) -> Tokenizer:
    """The tokenizer in a folder (tokenizer.json, or a vocabulary that transformers converts), or of a hub repository.

    Raises UserError where it has no fast form; transformers' own errors where files are missing or damaged.
    """
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(place)
    backend = getattr(found, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{place}: its tokenizer ({type(found).__name__}) has no fast form; save it as tokenizer.json")
    if found.pad_token_id is None:
        raise UserError(f"{place}: its tokenizer names no pad_token, which shorter texts of a batch are filled with")
    blank_id = found.sep_token_id if strip_sep_token else None
    return Tokenizer(backend, clean, context_length, found.pad_token_id, blank_id)
