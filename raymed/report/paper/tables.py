"""Which tables a record gives: cohort, flow, performance, comparison, subgroups, readers, agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raymed.report.paper.record import SPLITS, Figures, Group, PaperRecord
from raymed.report.paper.table import Cell, Estimate, Mean, PaperTable, Row, Share

METRICS = {
    "auroc": "AUROC",
    "auprc": "AUPRC (average precision)",
    "sensitivity": "Sensitivity",
    "recall": "Sensitivity",
    "specificity": "Specificity",
    "ppv": "PPV",
    "precision": "PPV",
    "npv": "NPV",
    "lr_positive": "Positive likelihood ratio",
    "lr_negative": "Negative likelihood ratio",
    "accuracy": "Accuracy",
    "accuracy_at_0.5": "Accuracy at a threshold of 0.5",
    "f1": "F1",
    "brier": "Brier score",
    "ece": "Expected calibration error",
    "calibration_slope": "Calibration slope",
    "calibration_intercept": "Calibration intercept",
    "calibration_in_the_large": "Calibration in the large",
}
NAMES = {
    "sex": "Sex",
    "site": "Site",
    "scanner": "Scanner",
    "modality": "Modality",
    "age": "Age (years)",
    "year": "Year of examination",
}
TOO_FEW = "too few"


def tables_of(record: PaperRecord) -> list[PaperTable]:
    """Those for which there are facts, in the order of a paper."""
    made = [
        _cohort(record),
        _flow(record),
        _performance(record),
        _comparison(record),
        _confusion(record),
        _subgroups(record),
        _readers(record),
        _agreement(record),
    ]
    return [table for table in made if table is not None and table.rows]


def label(metric: str) -> str:
    """A metric as a paper prints it: "PPV at a prevalence of 0.05" of ppv_at_0.05, "Sensitivity at a specificity of
    0.9" of sensitivity_at_specificity_0.9."""
    name, _, at = metric.partition("_at_")
    if metric in METRICS or not at:
        return METRICS.get(metric) or metric.replace("_", " ").capitalize()
    held, _, value = at.rpartition("_")
    return f"{label(name)} at a {held or 'prevalence'} of {value}"


def named(attribute: str) -> str:
    """An attribute as a paper prints it."""
    return NAMES.get(attribute) or attribute.capitalize()


def intervals(record: PaperRecord) -> str:
    """What is said of the intervals below a table."""
    s = record.statistics
    level = "" if s.level is None else f"{100 * s.level:g} % "
    how = "" if s.resamples is None else f" by a bootstrap over {s.unit or 'unit'}s ({s.resamples} resamples)"
    return f"Estimate ({level}confidence interval){how}."


def intervals_of_decisions(record: PaperRecord) -> str:
    """The same below a table with sensitivity and its like."""
    other = " Of decisions on a test set it is Wilson's (likelihood ratios: log method), or the wider of that and this."
    return intervals(record) + other * record.statistics.analytic


def _cohort(record: PaperRecord) -> PaperTable | None:
    parts = [name for name in SPLITS if name in record.cohort]
    if not parts:
        return None
    groups = [record.cohort[name] for name in parts]
    rows = [Row(name.capitalize(), [g.counts.get(name) for g in groups]) for name in ("patients", "cases", "images")]
    rows = [row for row in rows if any(cell is not None for cell in row.cells)]
    if any(g.years for g in groups):
        rows.append(Row("Years of examination", ["" if g.years is None else _span(g.years) for g in groups]))
    rows += _shares("Reference standard", groups, [g.classes for g in groups], first=record.positive)
    for quantity in dict.fromkeys(name for g in groups for name in g.quantities):
        rows.append(Row(named(quantity), [_mean(g, quantity) for g in groups]))
        rows += _missing(named(quantity), groups, quantity)
    for category in dict.fromkeys(name for g in groups for name in g.categories):
        counts = [g.categories.get(category, {}) for g in groups]
        rows += _shares(named(category), groups, counts)
    units = {"case": "cases", "patient": "patients", "image": "images", "side": "sides of cases"}
    notes = (
        f"Characteristics are counted over {units.get(record.unit, record.unit)}: number (%), or mean ± standard "
        "deviation (range)."
    )
    return PaperTable("table_cohort", "Characteristics of the cohort", ["", *(SPLITS[p] for p in parts)], rows, notes)


def _shares(
    name: str, groups: Sequence[Group], counts: Sequence[Mapping[str, int]], first: str | None = None
) -> list[Row]:
    """A row for every value, the one named first above, what is not recorded below."""
    values = sorted(dict.fromkeys(v for of_group in counts for v in of_group), key=lambda v: (v != first, v == ""))
    if values in ([], [""]):
        return []
    return [
        Row(v or "not recorded", [Share(of.get(v, 0), g.units) for of, g in zip(counts, groups, strict=True)], name)
        for v in values
    ]


def _mean(group: Group, quantity: str) -> Mean | None:
    return Mean(group.quantities[quantity]) if quantity in group.quantities else None


def _missing(name: str, groups: Sequence[Group], quantity: str) -> list[Row]:
    """How many units lack the quantity, where some do."""
    known = [g.quantities[quantity].num if quantity in g.quantities else 0 for g in groups]
    missing = [g.units - num for g, num in zip(groups, known, strict=True)]
    cells = [Share(num, g.units) for num, g in zip(missing, groups, strict=True)]
    return [Row(f"{name}: not recorded", cells)] if any(missing) else []


def _span(years: tuple[int, int]) -> str:
    return str(years[0]) if years[0] == years[1] else f"{years[0]}–{years[1]}"


def _flow(record: PaperRecord) -> PaperTable | None:
    flow = record.flow
    if flow is None:
        return None
    rows = [Row("Assessed for eligibility", [flow.assessed])]
    rows += [Row(reason, [count], "Excluded") for reason, count in flow.excluded.items()]
    rows.append(Row("Included", [flow.included]))
    rows += [
        Row(SPLITS[name], [group.units], "Divided into")
        for name, group in record.cohort.items()
        if name != "all" and flow.unit == record.unit
    ]
    return PaperTable("table_flow", "Flow of participants", ["", f"{flow.unit.capitalize()}s"], rows)


def _performance(record: PaperRecord) -> PaperTable | None:
    metrics = metrics_of(record.performance)
    rows = [Row(label(m), [_estimate(of, m) for of in record.performance.values()]) for m in metrics]
    title = "Performance on the test set"
    return PaperTable("table_performance", title, ["", *record.performance], rows, intervals_of_decisions(record))


def _comparison(record: PaperRecord) -> PaperTable | None:
    metrics = metrics_of(record.comparison)
    rows = [Row(method, [_estimate(of, m) for m in metrics]) for method, of in record.comparison.items()]
    title = "Methods compared on the test set"
    return PaperTable("table_comparison", title, ["Method", *map(label, metrics)], rows, intervals(record))


def _confusion(record: PaperRecord) -> PaperTable | None:
    c = record.confusion
    if c is None:
        return None
    present, absent = _present_absent(record)
    rows = [Row("Model: positive", [c.tp, c.fp]), Row("Model: negative", [c.fn, c.tn])]
    title = "Decisions at the operating point against the reference standard"
    return PaperTable("table_confusion", title, ["", present, absent], rows, f"Counted over {record.unit}s.")


def _present_absent(record: PaperRecord) -> tuple[str, str]:
    """What the reference standard says, in words."""
    named = record.study.target or record.positive
    return (f"{named}: present", f"{named}: absent") if named else ("Condition present", "Condition absent")


def _subgroups(record: PaperRecord) -> PaperTable | None:
    metrics = metrics_of({str(i): s.figures for i, s in enumerate(record.subgroups)})
    rows = [
        Row(
            s.value or "not recorded",
            [s.num, s.num_positive, *(_estimate(s.figures, m) if s.figures else TOO_FEW for m in metrics)],
            named(s.attribute),
        )
        for s in record.subgroups
    ]
    columns = ["Subgroup", f"{record.unit.capitalize()}s", "Positive", *map(label, metrics)]
    notes = f'{intervals_of_decisions(record)} "{TOO_FEW}": too few positive or negative {record.unit}s for a figure.'
    return PaperTable("table_subgroups", "Performance by subgroup of the test set", columns, rows, notes)


def _readers(record: PaperRecord) -> PaperTable | None:
    metrics = metrics_of(record.readers)
    rows = [Row(reader, [_estimate(of, m) for m in metrics]) for reader, of in record.readers.items()]
    title = "Readers against the reference standard"
    header = ["Reader", *map(label, metrics)]
    return PaperTable("table_readers", title, header, rows, intervals_of_decisions(record))


def _agreement(record: PaperRecord) -> PaperTable | None:
    rows = [Row(name, [Estimate(figure)]) for name, figure in record.agreement.items()]
    return PaperTable("table_agreement", "Agreement of readers", ["", "Kappa"], rows, intervals(record))


def metrics_of(figures: Mapping[str, Figures]) -> list[str]:
    """All that occur: those of METRICS first and in its order."""
    found = dict.fromkeys(metric for of in figures.values() for metric in of)
    return [m for m in METRICS if m in found] + [m for m in found if m not in METRICS]


def _estimate(figures: Figures, metric: str) -> Cell:
    return Estimate(figures[metric]) if metric in figures else None
