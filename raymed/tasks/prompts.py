"""Sentences that ask an embedding of images and texts for a finding, with and without it."""

from collections.abc import Sequence
from dataclasses import dataclass

from raymed.config import UserError

_NAME = "{finding}"


@dataclass(frozen=True)
class Prompts:
    """Templates of sentences; {finding} stands for the name of a finding, in small letters and without underscores.
    Sentences as they stand in the captions work best; several are averaged."""

    positive: tuple[str, ...] = ("X-ray, findings: {finding}.", "Findings: {finding}.")
    """Said of an image with the finding."""
    negative: tuple[str, ...] = ("X-ray, no acute finding.", "No {finding}.")
    """Said of an image without it."""

    def __post_init__(self) -> None:
        for field, templates in (("positive", self.positive), ("negative", self.negative)):
            if not templates or not all(template.strip() for template in templates):
                raise UserError(f"prompts.{field} must be one sentence or more, got {templates}")
        if not all(_NAME in template for template in self.positive):
            raise UserError(f"prompts.positive: every sentence must hold {_NAME}, got {self.positive}")

    def of(self, findings: Sequence[str]) -> tuple[list[list[str]], list[list[str]]]:
        """For each finding its positive sentences, and its negative ones."""
        return tuple([_filled(templates, name) for name in findings] for templates in (self.positive, self.negative))  # type: ignore[return-value]


def _filled(templates: Sequence[str], finding: str) -> list[str]:
    return [template.replace(_NAME, finding.replace("_", " ").lower()) for template in templates]
