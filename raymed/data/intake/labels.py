"""From what people write into a column of labels to classes: synonyms, what is excluded, what stays unlabelled."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from raymed.config import UserError
from raymed.data.intake.sheet import clean

Kind = Literal["class", "excluded", "unlabelled", "unknown"]


@dataclass(frozen=True)
class Label:
    """What a text means. name: of the class, or else what it is counted under; "" where it is unknown."""

    kind: Kind
    name: str


class LabelMap:
    """Tells the class of a text. Capitals and spaces around it do not count."""

    def __init__(
        self,
        classes: Mapping[str, Sequence[str]] | None = None,
        excluded: Sequence[str] = (),
        unlabelled: Sequence[str] = ("equivocal",),
    ):
        """
        Args:
            classes: name of a class -> texts that mean it, besides the name itself; none = every text is a class.
            excluded: texts whose rows are left out.
            unlabelled: texts whose images have no label: they are kept apart. An empty cell is one of them.

        Raises:
            UserError: a text with two meanings.
        """
        self._open = not classes
        self._known: dict[str, Label] = {}
        for name, texts in (classes or {}).items():
            for text in dict.fromkeys(map(_folded, [name, *texts])):
                self._add(text, Label("class", clean(name)))
        for text in dict.fromkeys(map(_folded, excluded)):
            self._add(text, Label("excluded", text))
        for text in dict.fromkeys(map(_folded, unlabelled)):
            self._add(text, Label("unlabelled", text))

    def __call__(self, text: str) -> Label:
        """What the text of a cell means."""
        folded = _folded(text)
        if not folded:
            return Label("unlabelled", "empty cell")
        if folded in self._known:
            return self._known[folded]
        return Label("class", clean(text)) if self._open else Label("unknown", "")

    def nearest(self, text: str) -> str:
        """The known text that is most like it, or ""."""
        return next(iter(difflib.get_close_matches(_folded(text), self._known, n=1)), "")

    def _add(self, text: str, label: Label) -> None:
        if text in self._known:
            raise UserError(f"the label text {text!r} has two meanings in --map, --excluded, --unlabelled")
        self._known[text] = label


def parse_map(texts: Sequence[str]) -> dict[str, list[str]]:
    """["occluded=occ,blocked", "patent=open"] -> {"occluded": ["occ", "blocked"], "patent": ["open"]}.

    Raises UserError for a text without "=", or a class named twice.
    """
    classes: dict[str, list[str]] = {}
    for text in texts:
        name, equals, synonyms = text.partition("=")
        if not equals or not name.strip():
            raise UserError(f"--map {text!r}: expected CLASS=text,text, such as occluded=occ,blocked")
        if name.strip() in classes:
            raise UserError(f"--map names the class {name.strip()!r} twice: give all its texts at once")
        classes[name.strip()] = [part.strip() for part in synonyms.split(",") if part.strip()]
    return classes


def _folded(text: str) -> str:
    return clean(text).casefold()
