"""Train, val, test: whole patients on one side, classes in proportion, exact duplicates together."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from raymed.config import UserError
from raymed.data.manifest import SPLITS
from raymed.data.problems import Problem, rows_text


def crossing(table: pd.DataFrame, column: str, kind: str) -> list[Problem]:
    """Rows whose value in `column` also stands in a later split.

    The training side loses: train to val and test, val to test; test never.

    Args:
        table: with the columns row, split and `column`; an empty value belongs to nobody.
    """
    records = list(zip(table["row"].tolist(), table["split"].tolist(), table[column].tolist(), strict=True))
    last: dict[str, tuple[int, int]] = {}  # value -> (position of its last split, a row there)
    for row, split, value in records:
        if value and SPLITS.index(split) > last.get(value, (-1, 0))[0]:
            last[value] = SPLITS.index(split), row
    return [
        Problem(row, kind, f"({split}) the same {column} as row {last[value][1]} ({SPLITS[last[value][0]]})")
        for row, split, value in records
        if value and SPLITS.index(split) < last[value][0]
    ]


def linked(patients: Sequence[str] | None, hashes: Sequence[str]) -> list[str]:
    """What must stay on one side, as one name an image: the images of a patient, and exact duplicates of any of them.

    The name is a patient's identifier, or the hash of the pixels where there is none: so a split depends neither on the
    order of rows nor on file names.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    keys = [patient or pixels for patient, pixels in zip(patients or hashes, hashes, strict=True)]
    owners, contents = pd.factorize(np.array(keys))[0], pd.factorize(np.array(hashes))[0]
    num_owners, num_nodes = owners.max() + 1, owners.max() + contents.max() + 2
    edges = coo_matrix((np.ones(len(keys)), (owners, contents + num_owners)), shape=(num_nodes, num_nodes))
    component = connected_components(edges, directed=False)[1][owners]
    name: dict[int, str] = {}
    for c, key in zip(component, keys, strict=True):
        name[c] = min(key, name.get(c, key))
    return [name[c] for c in component]


def assign(
    groups: Sequence[str],
    labels: Sequence[str],
    positive: str,
    fractions: tuple[float, float, float],
    seed: int,
    kept: Mapping[str, str] | None = None,
) -> list[str]:
    """A split for every image: train, val or test, with the given fractions of the images of each class (see `deal`).

    Args:
        fractions: of train, val and test; 0 = no such split.
        kept: group -> the split where it stays.
    """
    stay = {group: SPLITS.index(split) for group, split in (kept or {}).items()}
    return [SPLITS[part] for part in deal(groups, labels, positive, fractions, seed, stay)]


def deal(
    groups: Sequence[str],
    labels: Sequence[str],
    positive: str,
    fractions: Sequence[float],
    seed: int | str,
    kept: Mapping[str, int] | None = None,
) -> list[int]:
    """A part for every image, 0 to P - 1, with the given fractions of the images of each class; groups stay whole.

    Greedy, like scikit-learn's StratifiedGroupKFold but for unequal fractions: groups go, large ones first, where they
    raise sum_sc (share of class c in part s)^2 / fraction_s least; it is smallest when each share is its fraction.
    Ties are broken by a draw from (seed, group). A group that holds the positive class counts as positive, any other
    as the rarest class it holds, and the first of each kind go to different parts, so that a rare class is in all.

    Args:
        fractions: (P,) of the parts; 0 = nothing goes there.
        kept: group -> the part where it stays. These go first, so that the others make up for what a part lacks.
    """
    kept = kept or {}
    counts = pd.crosstab(np.array(groups), np.array(labels))
    rarest_first = sorted(counts.columns, key=lambda label: (label != positive, counts[label].sum(), label))
    part = (counts[rarest_first] / counts[rarest_first].sum()).to_numpy()  # (G, classes), columns sum to 1
    kind = (part > 0).argmax(axis=1)
    names = counts.index.tolist()
    draw = [hashlib.sha256(f"{seed}/{group}".encode()).hexdigest() for group in names]
    shares = np.zeros((len(fractions), part.shape[1]))
    started = np.zeros(shares.shape, bool)
    side: dict[str, int] = {}
    for g in sorted(range(len(part)), key=lambda g: (names[g] not in kept, kind[g], -part[g].sum(), draw[g])):
        rise = (shares + part[g] / 2) @ part[g] / part[g].sum()
        # Rounded: the last bits differ between machines, and would break ties there.
        cost = [(started[s, kind[g]], round(rise[s] / f, 9), s) for s, f in enumerate(fractions) if f]
        s = kept.get(names[g], min(cost)[2])
        shares[s] += part[g]
        started[s, kind[g]] = True
        side[names[g]] = s
    return [side[group] for group in groups]


def check_enough(groups: Sequence[str], labels: Sequence[str], positive: str, splits: Sequence[str], what: str) -> None:
    """Raise UserError when the positive class, or all others together, have fewer groups than there are splits.

    Args:
        positive: "" = there are no classes; then all groups together.
        what: the groups are, "patient" or "image".
    """
    sides = {f"the positive class {positive!r} has": [True], "the other classes have": [False]}
    for who, side in (sides if positive else {"the data set has": [True, False]}).items():
        num = len({group for group, label in zip(groups, labels, strict=True) if (label == positive) in side})
        if num < len(splits):
            raise UserError(
                f"{who} {num} {what}{'s' * (num != 1)}, too few to divide into {', '.join(splits)}: "
                "each of them needs at least one"
            )


def check_filled(table: pd.DataFrame, positive: str, advice: str = "--data.split '' splits afresh") -> None:
    """Raise UserError unless each split has images of the positive class and of others.

    Args:
        positive: "" = there are no classes; then images at all.
        advice: what to do, for the message.
    """
    for split in SPLITS:
        labels = set(table.loc[table["split"] == split, "label"].tolist())
        missing = f"no image of the positive class {positive!r}" if positive and positive not in labels else None
        missing = f"no image but those of the positive class {positive!r}" if labels == {positive} else missing
        missing = "no image" if not labels else missing
        if missing:
            raise UserError(f"the split {split} has {missing} ({advice})")


def duplicate_notes(table: pd.DataFrame) -> list[str]:
    """What to say of exact duplicates that stay: those within a split, and those with two labels."""
    again: dict[str, list[int]] = {split: [] for split in SPLITS}
    rows: dict[str, list[int]] = {}
    labels: dict[str, set[str]] = {}
    columns = (table[name].tolist() for name in ("row", "split", "pixels", "label"))
    for row, split, pixels, label in zip(*columns, strict=True):
        if pixels in rows:
            again[split].append(row)
        rows.setdefault(pixels, []).append(row)
        labels.setdefault(pixels, set()).add(label)
    notes = [f"exact duplicates within {split}, kept: {rows_text(found)}" for split, found in again.items() if found]
    disputed = sorted(row for pixels, names in labels.items() if len(names) > 1 for row in rows[pixels])
    return notes + [f"the same image under two labels, kept: {rows_text(disputed)}"] * bool(disputed)
