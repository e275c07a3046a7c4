"""What names a patient in a text: parts of a name, and identifiers, with or without their leading zeros."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

_LEAST = 4  # characters; a shorter identifier is part of too many texts


class Telling:
    """Finds the names and identifiers of patients in texts, whatever their capitals and width.

    Of a name every part counts: one in Latin letters (three or more) as a word of its own, one in other letters (two or
    more) anywhere. An identifier of four characters or more counts anywhere; a number not as part of a longer one, but
    with any zeros before it. The time it takes does not grow with the number of patients.
    """

    def __init__(self, identifiers: Iterable[str], names: Iterable[str]):
        """names: as DICOM has them (PatientName, with all its scripts)."""
        parts = {part for name in names for part in re.split(r"[\^=\s]+", _folded(name))}
        known = {identifier for identifier in map(_folded, identifiers) if len(identifier) >= _LEAST}
        self._numbers = {_short(one) for one in known if one.isdecimal()}
        self._words = _by_length(part for part in parts if part.isascii() and len(part) >= 3)
        foreign = {part for part in parts if not part.isascii() and len(part) >= 2}
        self._anywhere = _by_length({one for one in known if not one.isdecimal()} | foreign)

    def within(self, text: str) -> bool:
        """Whether the text holds one of them."""
        text = _folded(text)
        numbers = {_short(number) for number in re.findall(r"\d+", text)}
        return not self._numbers.isdisjoint(numbers) or self._has_piece(text) or self._has_word(text)

    def _has_piece(self, text: str) -> bool:
        pieces = self._anywhere.items()
        return any(text[at : at + num] in same for num, same in pieces for at in range(len(text) - num + 1))

    def _has_word(self, text: str) -> bool:
        return any(
            text[at : at + num] in same and not _is_latin(text[max(at - 1, 0) : at] + text[at + num : at + num + 1])
            for num, same in self._words.items()
            for at in range(len(text) - num + 1)
        )


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold().strip()


def _short(number: str) -> str:
    """Without its leading zeros, where enough is left to tell it."""
    short = number.lstrip("0")
    return short if len(short) >= _LEAST else number


def _by_length(words: Iterable[str]) -> dict[int, set[str]]:
    groups: dict[int, set[str]] = defaultdict(set)
    for word in words:
        groups[len(word)].add(word)
    return dict(groups)


def _is_latin(neighbours: str) -> bool:
    """Whether a letter or digit stands among them. One of another script, such as a Hangul particle, ends a word."""
    return any(sign.isascii() and sign.isalnum() for sign in neighbours)
