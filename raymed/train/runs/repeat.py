"""Repeating a run: its config again, on the same images wherever they lie, and a verdict at the end.

    --from-run RUN                            a name in the storage or an MLflow run id
    --from-run FILE --data-root DIR           a run of elsewhere (`record.export`) on the images in DIR

Elsewhere images are told by their content. A manifest is derived from the one found there: the exported run's images at
its row numbers with its split, so that sampling, augmentation and order are those of the original.

The verdict is

    equal              the same images, labels, splits and config, and every figure the same within 1e-6
    within seed noise  the same again (other seeds allowed), and no test AUROC or AUPRC differs by more than other seeds
                       would make it differ: |difference| <= t * s * sqrt(1/n + 1/m), with s the standard deviation over
                       the original's n seeds, m the seeds of the repeat, and t the two-sided 95 % quantile of Student's
                       t with n - 1 degrees of freedom, Bonferroni-corrected for the number of such figures
    different          anything else

Patients are no part of that noise: both runs are scored on the same ones. With one seed s is unknown, and a difference,
however small, cannot be told from noise.
"""

import argparse
import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pandas as pd

from raymed.config import UserError, flatten, from_dict, replace
from raymed.data.cache import decode
from raymed.data.captions import CaptionConfig, raw_captions
from raymed.data.dataset import DataSet
from raymed.data.locations import Location, as_location, below, ending, folder_of
from raymed.data.manifest import DataConfig, read_manifest, read_table
from raymed.data.problems import rows_text
from raymed.storage import exists, local_folder, push_file, write_atomic
from raymed.train.runs.record import Record, data_record, fetch, images

TOLERANCE = 1e-6
LEVEL = 0.95
DECISIVE = ("test/auroc", "test/auprc")
ALLOWED = ("seeds", "finals.seeds")  # may be other ones where seed noise is judged
_SHOWN = 8
C = TypeVar("C")


def with_defaults(default: C, arguments: Sequence[str]) -> C:
    """The config that the command line starts from: that of the run to repeat, if it names one, else `default`.

    Raises UserError as `fetch`, and for a run of another job.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("from-run", "storage", "tracking"):
        parser.add_argument(f"--{option}", f"--{option.replace('-', '_')}")
    given = parser.parse_known_args(list(arguments))[0]
    if given.from_run is None:
        return default
    record = fetch(given.from_run, given.storage, given.tracking)
    values = {name: value for name, value in record.config.items() if name != "run"}
    try:
        config = from_dict(type(default), values)
    except (UserError, TypeError) as error:
        raise UserError(f"{_whose(record)}; its config does not fit here: {error}") from error
    return dataclasses.replace(config, run=default.run)  # type: ignore[type-var, attr-defined]


def _whose(record: Record) -> str:
    return f"run {record.name!r} was made by jobs/{record.job}.py: repeat it with that"


@dataclass
class Repeat:
    """A run that repeats another."""

    record: Record
    left_out: list[int] = field(default_factory=list)
    """Rows of the manifest found here whose images the original does not have."""

    def check_data(self, data: DataSet) -> list[str]:
        """What to say of the data, a line each. Raises UserError if an exported run has no image in common with it."""
        found = data_differences(self.record.data, data_record(data))
        num = len(self.record.data["row"])
        if self.record.exported and len(found.get("missing", ())) == num:
            raise UserError(_nothing_in_common(self.record, len(data)))
        lines = [f"repeats {self.record.name}: {num} images", *(f"  {line}" for line in _data_lines(found))]
        if self.left_out:
            lines.append(f"  not in the original, left out: {rows_text(self.left_out)} of the manifest here")
        return lines

    def verdict(self, mine: Record) -> dict[str, Any]:
        """What stands in summary.json under "repeat": of, verdict, because, figures, differences."""
        differences = differing(self.record, mine)
        word, because, figures = judge(self.record, mine, differences)
        found = {"of": self.record.name, "verdict": word, "because": because, "figures": figures}
        return found | {"differences": differences, "left_out": self.left_out}


def begin(kind: str, config: C, storage: Path) -> tuple[C, Repeat | None]:
    """The config with its data found on this machine, and the repeat that it is, if `run.from_run` says so.

    Raises UserError for a run of another job, and where the data are not found.
    """
    run = config.run  # type: ignore[attr-defined]
    if run.from_run is None:
        if run.data_root is not None:
            raise UserError("--data-root says where the images of --from-run lie; the flag of any run is --data.root")
        return config, None
    record = fetch(run.from_run, str(storage), run.tracking)
    if record.job != kind:
        raise UserError(f"{_whose(record)}, not jobs/{kind}.py")
    if not (record.exported or run.data_root):
        return config, Repeat(record)
    for name in record.paths:
        if not name.startswith("recipe.data.") and flatten(config)[name] == flatten(record.config)[name]:
            flag = "--" + name.removeprefix("recipe.").replace("_", "-")
            raise UserError(f"{run.from_run} holds no folders: say where {flatten(config)[name]} is ({flag})")
    data, left_out = _found(config.recipe.data, run.data_root, record, storage)  # type: ignore[attr-defined]
    return replace(config, {"recipe.data": data}), Repeat(record, left_out)


def _found(data: DataConfig, folder: str | None, record: Record, storage: Path) -> tuple[DataConfig, list[int]]:
    """The data of a record as they lie here, and the rows that are none of its."""
    if data.manifest == "phantoms":
        return data, []
    manifest = as_location(data.manifest)
    if folder is not None and data.manifest == record.config["recipe"]["data"]["manifest"]:
        manifest = below(as_location(folder), PurePosixPath(str(manifest)).name)
    manifest = _absolute(manifest)
    if not exists(manifest):
        name = PurePosixPath(str(manifest)).name
        raise UserError(
            f"there is no manifest {manifest}: state the folder that holds {name} and its images "
            "(--data-root DIR), or the manifest itself (--data.manifest FILE)"
        )
    root = _absolute(as_location(folder or data.root or str(folder_of(manifest))))
    data = dataclasses.replace(data, manifest=str(manifest), root=str(root))
    return (data, []) if ending(manifest) == ".npz" else _derive(data, record, storage)


def _absolute(location: Location) -> Location:
    return location.absolute() if isinstance(location, Path) else location


def _derive(data: DataConfig, record: Record, storage: Path) -> tuple[DataConfig, list[int]]:
    """A manifest of the record's images, at its row numbers and with its split, from the one here.

    It has the columns of the manifest here, patients among them. Rows without an image keep the others' numbers.
    """
    table = read_manifest(dataclasses.replace(data, split="")).table
    hashes = decode(list(table["source"]), data.preprocess, local_folder(storage, "cache")).hashes
    here = pd.DataFrame({"row": table["row"], "label": table["label"], "content": [(h or "")[:16] for h in hashes]})
    theirs = images(record.data)
    wanted, found = match(theirs, here)
    if not wanted:
        raise UserError(_nothing_in_common(record, len(table)))
    raw = raw_captions(data)[0] if isinstance(data, CaptionConfig) else read_table(as_location(data.manifest))
    taken = raw.iloc[here.loc[found, "row"].to_numpy() - 1].set_axis(theirs.loc[wanted, "row"], axis=0)
    taken["split"] = theirs.loc[wanted, "split"].tolist()
    derived = taken.reindex(range(1, max(record.data["row"]) + 1), fill_value="")
    text = derived.to_csv(index=False)
    path = storage / "manifests" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.csv"
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, text)
    push_file(path)
    problem = "skip" if len(taken) < len(derived) else data.on_problem
    data = dataclasses.replace(data, manifest=str(path), split="split", on_problem=problem)
    if isinstance(data, CaptionConfig):  # whatever it was, it is a table now
        data = dataclasses.replace(data, layout="table")
    return data, here["row"].drop(found).tolist()


def _nothing_in_common(record: Record, num: int) -> str:
    return (
        f"none of the {len(record.data['row'])} images of run {record.name!r} is among the {num} here: images are told "
        "by the content of their pixels, so converted or resized ones are others"
    )


def match(theirs: pd.DataFrame, ours: pd.DataFrame) -> tuple[list[int], list[int]]:
    """Index labels of the rows of both that belong together, pair by pair: by content, of copies first those with one
    label."""
    alike = _pairs(theirs, ours, ["content", "label"])
    rest = _pairs(theirs.drop(alike[0]), ours.drop(alike[1]), ["content"])
    return alike[0] + rest[0], alike[1] + rest[1]


def _pairs(theirs: pd.DataFrame, ours: pd.DataFrame, on: list[str]) -> tuple[list[int], list[int]]:
    left = theirs.assign(copy=theirs.groupby(on).cumcount(), theirs=theirs.index)
    right = ours.assign(copy=ours.groupby(on).cumcount(), ours=ours.index)
    merged = left.merge(right, on=[*on, "copy"])
    return merged["theirs"].tolist(), merged["ours"].tolist()


# What differs


def differing(was: Record, now: Record) -> dict[str, Any]:
    """What two runs do not have in common, by kind: config, data, compute, packages, code, machine.

    Kinds without an entry are left out; except in data, an entry is [was, is].
    """
    old, new = _fields(was.config), _fields(now.config)
    found = {
        "config": _changed(*({f: v for f, v in c.items() if _is_identity(f)} for c in (old, new))),
        "data": data_differences(was.data, now.data),
        "compute": _changed(*({f: v for f, v in c.items() if f.startswith("compute.")} for c in (old, new))),
        "packages": _changed(*(dict(line.split("==", 1) for line in r.packages) for r in (was, now))),
        "code": _changed(*({k: v for k, v in r.git.items() if k != "branch"} for r in (was, now))),
        "machine": _changed(*({k: v for k, v in r.environment.items() if k != "versions"} for r in (was, now))),
    }
    return {kind: entries for kind, entries in found.items() if entries}


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    return flatten({name: value for name, value in config.items() if name != "run"})


def _is_identity(field: str) -> bool:
    """Of the data config only the preprocessing counts: the rest says where things lie, and images are compared."""
    return not field.startswith("compute.") and (
        not field.startswith("recipe.data.") or field.startswith("recipe.data.preprocess.")
    )


def _changed(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: [was.get(name), now.get(name)] for name in sorted({*was, *now}) if was.get(name) != now.get(name)}


def data_differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What two data sets (`data_record`) do not have in common.

    missing, labels, splits: rows of the first whose image is not in the second, or has another label or split there.
    extra: rows of the second. moved: how many images have another row number. positive: [was, is]. patients: True
    where images are grouped into patients otherwise.
    """
    theirs, ours = images(was), images(now)
    both = match(theirs, ours)
    a, b = (table.loc[rows].reset_index(drop=True) for table, rows in zip((theirs, ours), both, strict=True))
    found = {
        "missing": theirs["row"].drop(both[0]).tolist(),
        "extra": ours["row"].drop(both[1]).tolist(),
        "labels": sorted(a["row"][a["label"] != b["label"]].tolist()),
        "splits": sorted(a["row"][a["split"] != b["split"]].tolist()),
        "moved": int((a["row"] != b["row"]).sum()),
        "positive": [was["positive"], now["positive"]] if was["positive"] != now["positive"] else None,
        "patients": was["has_patients"] != now["has_patients"] or not _same_groups(a["patient"], b["patient"]),
    }
    return {kind: value for kind, value in found.items() if value}


def _same_groups(a: pd.Series, b: pd.Series) -> bool:
    return len(set(zip(a, b, strict=True))) == a.nunique() == b.nunique()


# How much


def judge(was: Record, now: Record, differences: Mapping[str, Any]) -> tuple[str, str, list[dict[str, Any]]]:
    """(verdict, why, figures that differ); see the top of the file.

    A figure: {figure, was, is, difference, noise (what seeds explain; None where unknown), in_interval (whether the new
    mean lies in the original's 95 % interval over seeds and patients)}. The largest difference comes first.
    """
    old, new = dict(_figures(was.figures)), dict(_figures(now.figures))
    if not old:
        return "no comparison", f"run {was.name} has not finished: it has no figures", []
    rows = _rows(old, new)
    cause = _cause(differences) or _unpaired(old, new)
    if cause:
        return "different", cause, rows
    if was.data["fingerprint"] == now.data["fingerprint"] and not any(_deviates(old[name], new[name]) for name in old):
        return "equal", "to the bit" if old == new else f"every figure within {TOLERANCE:g}", rows
    if any(figure["n"] < 2 for figure in old.values()):
        return "different", "the original has one seed, so that this cannot be told from seed noise", rows
    decisive = [row for row in rows if _is_decisive(row["figure"])]
    above = [row for row in decisive if row["noise"] is None or abs(row["difference"]) > row["noise"]]
    if above:
        names = ", ".join(row["figure"] for row in above)
        return "different", f"{names}: by more than other seeds would explain", rows
    return "within seed noise", "no test AUROC or AUPRC differs by more than other seeds would explain", rows


def _cause(differences: Mapping[str, Any]) -> str | None:
    """Why two runs are not the same experiment, or None."""
    config = [name for name in differences.get("config", {}) if name not in ALLOWED]
    data = [kind for kind in differences.get("data", {}) if kind != "moved"]
    kinds = [("the config", config), ("the data", data)]
    shown = [f"{kind} ({', '.join(names[:_SHOWN])})" for kind, names in kinds if names]
    return f"{' and '.join(shown)} differ" if shown else None


def _unpaired(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    only = sorted({name.rsplit("/", 2)[0] for name in {*old} ^ {*new}})
    return f"not in both: {', '.join(only)}" if only else None


def _figures(figures: Any, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """("asl/test/auroc", {mean, std, ...}) of every figure, however deep."""
    if isinstance(figures, Mapping) and "mean" in figures:
        yield name, dict(figures)
    elif isinstance(figures, Mapping):
        for key, inner in figures.items():
            yield from _figures(inner, f"{name}/{key}" if name else key)


def _is_decisive(figure: str) -> bool:
    return figure.endswith(DECISIVE)


def _deviates(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether any number of two figures differs by more than the tolerance; where one is undefined, so must the other
    be."""
    return any(
        abs(a[k] - b[k]) > TOLERANCE if _is_number(a[k]) and _is_number(b.get(k)) else a[k] != b.get(k) for k in a
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _rows(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[dict[str, Any]]:
    num = sum(_is_decisive(name) for name in old)
    rows = []
    for name in sorted({*old} & {*new}):
        a, b = old[name], new[name]
        if a["mean"] is None or b["mean"] is None or a["mean"] == b["mean"]:
            continue
        row = {"figure": name, "was": a["mean"], "is": b["mean"], "difference": b["mean"] - a["mean"]}
        inside = a["ci_low"] is not None and a["ci_low"] <= b["mean"] <= a["ci_high"]
        rows.append(row | {"noise": seed_noise(a["std"], a["n"], b["n"], num), "in_interval": inside})
    return sorted(rows, key=lambda row: -abs(row["difference"]))


def seed_noise(std: float | None, n: int, m: int, num: int = 1) -> float | None:
    """How far the mean over m seeds lies from that over n, in 95 % of cases, when nothing but the seeds differs; `num`
    such figures together, by Bonferroni. None for n = 1."""
    if n < 2 or std is None:
        return None
    from scipy import stats

    return float(stats.t.ppf(1 - (1 - LEVEL) / 2 / max(num, 1), n - 1) * std * math.sqrt(1 / n + 1 / m))


# For people


def verdict_lines(verdict: Mapping[str, Any]) -> list[str]:
    """A verdict as text: the word and why, then what differs."""
    lines = [f"repeat of {verdict['of']}: {verdict['verdict']} ({verdict['because']})"]
    for row in [row for row in verdict["figures"] if _is_decisive(row["figure"])][:_SHOWN]:
        noise = "unknown with one seed" if row["noise"] is None else f"{row['noise']:.2g}"
        lines.append(f"  {row['figure']} was {row['was']:.6f}, is {row['is']:.6f}; seed noise {noise}")
    for kind, entries in verdict["differences"].items():
        lines += [f"  {kind}: {line}" for line in (_data_lines(entries) if kind == "data" else _entry_lines(entries))]
    return lines


def _entry_lines(entries: Mapping[str, Sequence[Any]]) -> list[str]:
    lines = [f"{name.removeprefix('recipe.')} was {was}, is {now}" for name, (was, now) in entries.items()]
    return lines[:_SHOWN] + [f"... and {len(lines) - _SHOWN} more"] * (len(lines) > _SHOWN)


def _data_lines(found: Mapping[str, Any]) -> list[str]:
    texts = {
        "missing": lambda rows: f"missing here: {rows_text(rows)} of the original",
        "extra": lambda rows: f"not in the original: {rows_text(rows)}",
        "labels": lambda rows: f"another label: {rows_text(rows)}",
        "splits": lambda rows: f"another split: {rows_text(rows)}",
        "moved": lambda num: f"{num} images have another row number, so that batches and augmentation differ",
        "positive": lambda names: f"the positive class was {names[0]!r}, is {names[1]!r}",
        "patients": lambda _: "images are grouped into patients otherwise",
    }
    return [texts[kind](value) for kind, value in found.items()]
