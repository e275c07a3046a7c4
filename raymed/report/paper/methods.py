"""The methods section, in English and Korean, from what a record holds.

Both languages are templates (methods.en.md.j2, methods.ko.md.j2). Every number and name in them is a fact of the
record; where there is none, the text has a blank that says what belongs there: "[TO FILL: number of seeds]".
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from raymed.report.paper.korean import korean, korean_metric, korean_reason
from raymed.report.paper.record import SPLITS, PaperRecord
from raymed.report.paper.tables import label, metrics_of

Language = Literal["en", "ko"]


def methods(record: PaperRecord, language: Language) -> str:
    """The section as Markdown: "# ", "## ", "- " and paragraphs of one line."""
    from jinja2 import Environment, StrictUndefined

    template = importlib.resources.files("raymed.report.paper").joinpath(f"methods.{language}.md.j2")
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, extensions=["jinja2.ext.do"]
    )
    environment.filters |= {"fact": fact, "sentence": sentence, "percent": percent, "listed": _LISTED[language]}
    environment.filters |= {"settings": settings, "korean": korean, "korean_reason": korean_reason}
    parts = {name: record.cohort[name] for name in SPLITS if name in record.cohort and name != "all"}
    text = environment.from_string(template.read_text(encoding="utf-8")).render(
        r=record,
        study=record.study,
        whole=record.cohort.get("all"),
        parts=parts,
        split_names=SPLITS,
        measures=_measures(record, language),
    )
    return _tidy(text)


def sections(markdown: str) -> dict[str, str]:
    """Heading -> the text below it."""
    pieces = re.split(r"^## (.*)$", markdown, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], map(str.strip, pieces[2::2]), strict=True))


def fact(value: Any, what: str) -> str:
    """The value as text, or the blank for what is missing."""
    if value is None or value == "" or value == () or value == {}:
        return f"[TO FILL: {what}]"
    if isinstance(value, bool):
        raise TypeError(f"{what}: a yes or no is no number")
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def sentence(text: str) -> str:
    """Text that ends with a full stop, whether or not its author wrote one."""
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else f"{text}."


def percent(value: float | None) -> str | None:
    """0.95 -> "95 %"; None stays None."""
    return None if value is None else f"{100 * value:g} %"


def settings(values: Mapping[str, Any]) -> str:
    """ " (gamma_neg 4, clip 0.05)", or nothing of nothing."""
    return f" ({', '.join(f'{name} {_plain(value)}' for name, value in values.items())})" if values else ""


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _listed_english(items: Iterable[str]) -> str:
    *most, last = items
    return f"{', '.join(most)} and {last}" if most else last


def _measures(record: PaperRecord, language: Language) -> list[str]:
    """What the headline figures are called, in the order of their table."""
    headline = list(record.performance)[:1]
    metrics = metrics_of({name: record.performance[name] for name in headline})
    return [korean_metric(metric) if language == "ko" else _lowered(label(metric)) for metric in metrics]


def _lowered(name: str) -> str:
    """ "Specificity" within a sentence; "AUROC" and "F1" stay."""
    is_name = name[1:2].isupper() or name[1:2].isdigit() or name.startswith("Brier")
    return name if is_name else name[0].lower() + name[1:]


_LISTED = {"en": _listed_english, "ko": ", ".join}


def _tidy(text: str) -> str:
    """Templates break lines for their own reading: a paragraph becomes one line."""
    blocks = [" ".join(block.split()) if not block.startswith("- ") else block for block in _blocks(text)]
    return "\n\n".join(blocks) + "\n"


def _blocks(text: str) -> list[str]:
    return [block.strip() for block in re.split(r"\n\s*\n", text) if block.strip()]
