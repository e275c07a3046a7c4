"""The report of a contest: report.html, table.csv and figures/*.png in one folder, and a folder a contender below it.

Several losses were searched alike, and the best of each was trained again on fresh seeds and judged against the first.
`ContestRecord` holds all that is told, as plain data; nothing is computed here but counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raymed.report import clip_figures, sweep_search
from raymed.report.axis import option_text
from raymed.report.page import Block, Bullets, Cell, Lead, Picture, Section, Table, Text, repeat_blocks, write_page
from raymed.report.surface import surface_block
from raymed.report.sweep import trials_csv
from raymed.report.sweep_record import SearchRecord, count, finished, listed, short_names, were
from raymed.report.sweep_verdict import SPLITS, Verdicts, tone, verdict_blocks
from raymed.report.tables import comparison_page, label, split_csv
from raymed.storage import write_atomic

ACROSS = ("beta1", "temperature")
"""Last names of the hyper-parameters whose surface is shown, where a loss has them."""


@dataclass(frozen=True)
class ContestRecord:
    """What a contest found. Methods are those of the finals: the contenders, each with the best of its search, and what
    else was trained beside them."""

    title: str
    command: str  # repeats the contest
    metric: str
    searches: Mapping[str, SearchRecord]  # contender -> its search; the first is the baseline
    figures: Mapping[str, Mapping[str, Mapping[str, Any]]]  # method -> "val" or "test" -> metric -> Figure
    params: Mapping[str, Mapping[str, Any]]  # method -> hyper-parameter -> value
    origin: Mapping[str, str]  # method -> where these come from
    chosen: str
    verdicts: Mapping[str, Verdicts]  # "val" or "test" -> method -> Verdict
    sentence: str  # which differences exceed noise
    num_test_openings: int  # this one included
    search_seeds: Sequence[int]
    final_seeds: Sequence[int]
    num_pairs: Mapping[str, int]  # "val" or "test" -> images in it
    data: str  # summary of the data set, in words
    config: Any = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    pictures: Sequence[tuple[Path, str]] = ()  # others, such as training curves
    notes: Sequence[str] = ()

    @property
    def baseline(self) -> str:
        """What all others are judged against."""
        return next(iter(self.searches))


def write_contest_report(folder: Path, record: ContestRecord) -> Path:
    """Write report.html, table.csv, figures/*.png and CONTENDER/trials.csv into the folder; return the page's path."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "table.csv", split_csv(record.figures, _metrics(record)))
    for name, of_contender in record.searches.items():
        (folder / name / "figures").mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name / "trials.csv", trials_csv(of_contender))
    sections = [
        Section("Verdict", _verdict(folder, record)),
        Section("Results", _results(folder, record)),
        Section("Configurations", _configurations(record)),
        Section("Further figures", [Picture(path, caption) for path, caption in record.pictures]),
        *(Section(f"The search of {name}", _search(folder / name, of)) for name, of in record.searches.items()),
        Section("Repeat", repeat_blocks(record.command, record.environment, record.config)),
        Section("Notes", [Bullets(record.notes)] if record.notes else []),
    ]
    return write_page(folder / "report.html", record.title, record.data, _lead(record), sections)


def _lead(record: ContestRecord) -> Lead:
    first, _, rest = record.sentence.partition(". ")
    numbers = {
        "losses compared": str(len(record.searches)),
        "configurations of each": listed(sorted({of.num_configurations for of in record.searches.values()})),
        "seeds in the search": str(len(record.search_seeds)),
        "fresh seeds in the final": str(len(record.final_seeds)) if record.figures else "0",
        "times this test split has been opened": str(record.num_test_openings),
    }
    above = [str(v["verdict"]) for v in record.verdicts.get("test", {}).values() if v["verdict"].startswith("above")]
    first = first[:1].upper() + first[1:].removesuffix(".") + "."
    return Lead(first, [rest] if rest else [], tone((above or [record.sentence])[0]), numbers)


def _verdict(folder: Path, record: ContestRecord) -> list[Block]:
    if not any(record.verdicts.values()):
        return [Text("There were no finals: nothing was trained on fresh seeds.", quiet=True)]
    about = Text(
        f"Every loss had a search of its own with as many trials, and the best of each was chosen on validation. All "
        f"were trained again on {count(len(record.final_seeds), 'fresh seed')} ({listed(record.final_seeds)}) that no "
        f"search saw, with the same first weights and the same batches under a seed, and are compared with "
        f"{record.baseline} seed by seed. Best on validation: {record.chosen}."
    )
    return [about, *verdict_blocks(folder, record.verdicts, record.metric, record.baseline, record.chosen)]


def _metrics(record: ContestRecord) -> list[str]:
    """The metric that was optimised first, then those that every method has."""
    have = [split for of_method in record.figures.values() for split in of_method.values()]
    ordered = dict.fromkeys((record.metric, *(have[0] if have else ())))
    return [metric for metric in ordered if all(metric in of_split for of_split in have)]


def _results(folder: Path, record: ContestRecord) -> list[Block]:
    if not record.figures:
        return []
    seeds = len(record.final_seeds)
    what = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed, so without a deviation"
    tables = [
        comparison_page(
            {method: of_method[split] for method, of_method in record.figures.items()},
            _metrics(record),
            f"Retrieval among all {record.num_pairs[split]} pairs of the {name} split: {what}; 95 % interval below. "
            "Best in bold, second underlined.",
            {record.chosen: "best on validation"},
        )
        for split, name in SPLITS.items()
    ]
    path = folder / "figures" / "retrieval.png"
    of_test = {method: of_method["test"] for method, of_method in record.figures.items()}
    clip_figures.retrieval_curves(path, of_test, record.num_pairs["test"])
    caption = "R@k against k on the test split with 95 % bands. Dotted: drawn at random, one item a query."
    return [*tables, Picture(path, caption)]


def _configurations(record: ContestRecord) -> list[Block]:
    names = list(dict.fromkeys(name for params in record.params.values() for name in params))
    rows = [
        [
            Cell(method, record.origin.get(method, "")),
            *(option_text(params[name]) if name in params else "" for name in names),
        ]
        for method, params in record.params.items()
    ]
    if not rows:
        return []
    searched = [
        f"{contender}: "
        + "; ".join(
            f"{name} {sweep_search.describe(search.space[full])}"
            for full, name in short_names(list(search.space)).items()
        )
        for contender, search in record.searches.items()
    ]
    return [
        Table(["", *names], rows, "What the finals trained."),
        Text("What was searched; trial 0 is the recipe as it stands:"),
        Bullets(searched),
    ]


def _search(folder: Path, record: SearchRecord) -> list[Block]:
    """Told in full where enough has finished."""
    blocks = sweep_search.search(folder, record)
    if len(finished(record.trials)) < 2:
        return blocks
    across = [name for last in ACROSS for name in record.space if name.rsplit(".", 1)[-1] == last]
    path = folder / "figures" / "surface.png"
    shown = surface_block(path, record.trials, record.space, across, record.objective, record.mode)
    return [*blocks, shown, *sweep_search.hyper_parameters(folder, record)]


def contest_sentence(
    verdicts: Mapping[str, Verdicts], metric: str, baseline: str, *, num_configurations: int, num_openings: int
) -> str:
    """Which differences from the baseline exceed what seeds and patients scatter, on test first, in plain sentences.

    verdicts: {"val": {method: Verdict}, "test": ...} of `raymed.metrics.verdict`. A difference counts, for better or
    worse, where p after Holm's correction is at most 0.05.
    """
    tried = f"{count(num_configurations, 'configuration')} of each {were(num_configurations)} tried"
    opened = "once" if num_openings == 1 else f"{num_openings} times"
    test, val = (_differences(verdicts[split], metric, baseline) for split in ("test", "val"))
    return (
        f"On test, {test}. On validation, which chose the configurations and flatters them, {val}. "
        f"{tried}; this test split has been opened {opened}."
    )


def _differences(verdicts: Verdicts, metric: str, baseline: str) -> str:
    what = f"of {count(len(verdicts), 'difference')} in {label(metric)} from {baseline}"
    if any(v["verdict"] == "cannot tell" for v in verdicts.values()):
        return f"{what}, it cannot be told which exceed noise: there are too few seeds"
    beyond = {name: v for name, v in verdicts.items() if v["p_holm"] <= _LEVEL}
    within = [f"{name} ({v['difference']['mean']:+.4f})" for name, v in verdicts.items() if name not in beyond]
    if not beyond:
        return f"{what}, none exceeds noise: {', '.join(within)}"
    told = [
        f"{name} is {abs(v['difference']['mean']):.4f} {'higher' if v['difference']['mean'] > 0 else 'lower'} "
        f"({_chance(v['p_holm'])})"
        for name, v in beyond.items()
    ]
    exceed = f"{len(beyond)} exceed{'s' if len(beyond) == 1 else ''} noise"
    return f"{what}, {exceed}: {', '.join(told)}" + (f"; not so {', '.join(within)}" if within else "")


_LEVEL = 0.05


def _chance(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
