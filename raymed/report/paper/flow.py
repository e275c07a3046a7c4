"""The flow of participants as STARD 2015 draws it (Bossuyt et al., BMJ 2015;351:h5527): assessed, excluded, included,
divided, and in the test set what the model said and what the reference standard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raymed.report.paper.canvas import POINT, TWO_COLUMNS, journal_figure
from raymed.report.paper.record import SPLITS, Group, PaperRecord
from raymed.report.style import font_families

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEXT = 7  # points
LINE = 1.3 * TEXT * POINT  # mm
PADDING, GAP = 2.0, 6.0  # mm
_EXCLUDED_WIDTH, _STEM_WIDTH = 62.0, 72.0


def draw_flow(stem: Path, record: PaperRecord) -> None:
    """Draw what is known of the flow, two columns wide."""
    drawing = arrange(record)
    with journal_figure(stem, TWO_COLUMNS, drawing.height, layout=None) as drawn:
        drawing.draw(drawn.add_axes((0, 0, 1, 1)))


def arrange(record: PaperRecord) -> Drawing:
    """The boxes and arrows of a record's flow."""
    drawing = Drawing()
    _divided(drawing, record, _assessed(drawing, record))
    return drawing


class Box:
    """Text in a frame; x is its middle, y its top, in mm."""

    def __init__(self, x: float, y: float, width: float, lines: Sequence[str]):
        self.x, self.y, self.width = x, y, width
        self.lines = [part for line in lines for part in _wrapped(line, width - 2 * PADDING)]
        self.height = LINE * len(self.lines) + 2 * PADDING
        self.bottom = y + self.height

    def draw(self, axes: Axes) -> None:
        from matplotlib.patches import Rectangle

        frame = Rectangle((self.x - self.width / 2, self.y), self.width, self.height, fill=False, linewidth=0.7)
        axes.add_patch(frame)
        for position, line in enumerate(self.lines):
            y = self.y + PADDING + LINE * (position + 0.5)
            axes.text(self.x - self.width / 2 + PADDING, y, line, fontsize=TEXT, va="center")


class Drawing:
    """Boxes and the arrows between them."""

    def __init__(self) -> None:
        self.boxes: list[Box] = []
        self.paths: list[list[tuple[float, float]]] = []

    @property
    def height(self) -> float:
        """Of the page in mm."""
        return max(box.bottom for box in self.boxes) + 2

    def box(self, x: float, y: float, width: float, lines: Sequence[str]) -> Box:
        self.boxes.append(Box(x, y, width, lines))
        return self.boxes[-1]

    def down(self, upper: Box, lower: Box) -> None:
        """From the foot of one box to the head of another, around a corner where they do not stand in line."""
        bend = (upper.bottom + lower.y) / 2
        self.paths.append([(upper.x, upper.bottom), (upper.x, bend), (lower.x, bend), (lower.x, lower.y)])

    def draw(self, axes: Axes) -> None:
        """Fill axes that cover a page of two columns and `height`."""
        axes.set(xlim=(0, TWO_COLUMNS), ylim=(self.height - 1, -1))
        axes.axis("off")
        arrow = {
            "arrowstyle": "-|>",
            "linewidth": 0.7,
            "color": "black",
            "shrinkA": 0,
            "shrinkB": 0,
            "mutation_scale": 6,
        }
        for *bends, before, end in self.paths:
            axes.plot(*zip(*bends, before, strict=True), color="black", linewidth=0.7, solid_joinstyle="miter")
            axes.annotate("", end, before, arrowprops=arrow)
        for box in self.boxes:
            box.draw(axes)


def _assessed(drawing: Drawing, record: PaperRecord) -> Box | None:
    """Assessed, excluded to the right, and included; the last of them, from which the rest hangs."""
    flow, whole = record.flow, record.cohort.get("all")
    x = TWO_COLUMNS / 2
    if flow is None:
        return drawing.box(x, 0, _STEM_WIDTH, ["Included", *_counts(whole)]) if whole else None
    unit = f"{flow.unit}s"
    assessed = drawing.box(x, 0, _STEM_WIDTH, [f"{unit.capitalize()} assessed for eligibility {_n(flow.assessed)}"])
    below = assessed.bottom + 2 * GAP
    if flow.excluded:
        reasons = [f"{reason} {_n(count)}" for reason, count in flow.excluded.items()]
        left = x + 12
        width = min(_EXCLUDED_WIDTH, TWO_COLUMNS - left - 1)
        lines = [f"Excluded {_n(flow.assessed - flow.included)}", *(f"• {reason}" for reason in reasons)]
        box = drawing.box(left + width / 2, assessed.bottom + GAP, width, lines)
        middle = (box.y + box.bottom) / 2
        drawing.paths.append([(x, middle), (left, middle)])
        below = box.bottom + GAP
    counted = _counts(whole, without=unit) if whole else []
    included = drawing.box(x, below, _STEM_WIDTH, [f"{unit.capitalize()} included {_n(flow.included)}", *counted])
    drawing.down(assessed, included)
    return included


def _divided(drawing: Drawing, record: PaperRecord, above: Box | None) -> None:
    """The parts side by side; below the test set, its decisions."""
    parts = {name: record.cohort[name] for name in SPLITS if name in record.cohort and name != "all"}
    if not parts:
        return
    width = (TWO_COLUMNS - 1 - GAP * (len(parts) - 1)) / len(parts)
    y = above.bottom + 2 * GAP if above else 0
    for position, (name, group) in enumerate(parts.items()):
        x = 0.5 + width / 2 + position * (width + GAP)
        box = drawing.box(x, y, width, [f"{SPLITS[name]} set", *_counts(group), *_classes(group, record)])
        if above and name != "external":  # other patients than those assessed here
            drawing.down(above, box)
        if name == "test" and record.confusion:
            _decided(drawing, record, box)


def _decided(drawing: Drawing, record: PaperRecord, above: Box) -> None:
    """What the model said of the test set, and of each answer what the reference standard says."""
    c = record.confusion
    assert c is not None
    named = record.study.target or record.positive or "condition"
    width = 56.0
    middle = min(above.x, TWO_COLUMNS - width - GAP / 2 - 0.5)
    for side, (answer, present, absent) in ((-1, ("positive", c.tp, c.fp)), (1, ("negative", c.fn, c.tn))):
        x = middle + side * (width + GAP) / 2
        said = drawing.box(x, above.bottom + 2 * GAP, width, [f"Model {answer} {_n(present + absent)}"])
        drawing.down(above, said)
        truth = [f"{named} present {_n(present)}", f"{named} absent {_n(absent)}"]
        drawing.down(said, drawing.box(x, said.bottom + GAP, width, ["Reference standard:", *truth]))


def _n(count: int) -> str:
    """ "(n = 1,234)", which stays on one line."""
    return f"(n\u00a0=\u00a0{count:,})"


def _counts(group: Group, without: str = "") -> list[str]:
    """ "350 patients, 820 images" as one line; without: a kind that has been said."""
    said = [f"{count:,}\u00a0{name}" for name, count in group.counts.items() if name != without]
    return [", ".join(said)] if said else []


def _classes(group: Group, record: PaperRecord) -> list[str]:
    first = sorted(group.classes, key=lambda name: name != record.positive)
    return [f"{name} {_n(group.classes[name])}" for name in first]


def _wrapped(text: str, width: float) -> list[str]:
    """Lines no wider than `width` mm, broken at spaces."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if _width(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _width(text: str) -> float:
    """How wide text is, in mm."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    properties = FontProperties(family=list(font_families()), size=TEXT)
    return text_to_path.get_text_width_height_descent(text, properties, ismath=False)[0] * POINT
