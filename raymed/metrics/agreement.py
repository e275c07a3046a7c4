"""How far readers agree: kappa, a consensus of them, and where each stands beside a model.

kappa = (p_o - p_e) / (1 - p_e): the agreement p_o beyond p_e, what readers who guess with their own frequencies would
have. It falls as one class becomes rare, however well they agree (Feinstein and Cicchetti, J Clin Epidemiol 43, 1990),
so p_o stands beside it.

A reader who helped make the reference standard looks better against it than he is; against the consensus of the others
he does not.

Sources: Cohen, Educ Psychol Meas 20, 1960; Fleiss, Psychol Bull 76, 1971.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raymed.config import UserError
from raymed.metrics.bootstrap import Figure, bootstrap_ci
from raymed.metrics.classification import Statistic
from raymed.metrics.operating import DecisionFigure, decision_figures

UNREAD = -1
"""What stands for a missing reading in a table of readings; otherwise 0, ..., C - 1."""


def readings_of(columns: Mapping[str, Sequence[str]], classes: Sequence[str]) -> np.ndarray:
    """(N, R) int64 readings of N units by R readers, from the texts of each reader.

    Args:
        columns: {"reader1": N texts, ...}; an empty text is a missing reading. classes: names, by number.

    Raises UserError for readers with different numbers of rows, and for a text that is no class, by its row from 1.
    """
    numbers = {"": UNREAD} | {name: k for k, name in enumerate(classes)}
    for reader, texts in columns.items():
        for row, text in enumerate(texts, 1):
            if text not in numbers:
                known = ", ".join(map(repr, classes))
                raise UserError(f"{reader}, row {row}: a reading must be one of {known} or empty, got {text!r}")
    if len({len(texts) for texts in columns.values()}) > 1:
        lengths = ", ".join(f"{len(texts)} of {reader}" for reader, texts in columns.items())
        raise UserError(f"every reader must have a reading or an empty text a row, got {lengths}")
    return np.array([[numbers[text] for text in texts] for texts in columns.values()], np.int64).T


def cohen_statistic(first: np.ndarray, second: np.ndarray) -> Statistic:
    """Two readers, on the rows that both have read, for `bootstrap_ci`.

    kappa: Cohen's, with p_o = sum_k n_kk / n and p_e = sum_k n_k. n_.k / n^2; nan where both always give one class.
    agreement: p_o.

    Args:
        first, second: (N,) int readings, `UNREAD` where there is none.
    """
    first, second = np.asarray(first), np.asarray(second)
    both = (first != UNREAD) & (second != UNREAD)
    classes = np.unique(np.concatenate([first, second])[np.tile(both, 2)])
    of_first = (first[:, None] == classes) & both[:, None]
    of_second = (second[:, None] == classes) & both[:, None]
    columns = np.column_stack([both, (first == second) & both, of_first, of_second]).astype(np.float64)

    def statistic(counts: np.ndarray) -> dict[str, np.ndarray]:
        sums = np.einsum("rn,nk->rk", counts, columns)
        num, same = sums[:, 0], sums[:, 1]
        marginal, other = np.split(sums[:, 2:], 2, axis=1)
        return _kappa(_ratio(same, num), _ratio((marginal * other).sum(axis=1), num**2))

    return statistic


def fleiss_statistic(readings: np.ndarray) -> Statistic:
    """Any number of readers, who need not be the same for every row, for `bootstrap_ci`.

    kappa: with n_ik readings of row i as class k and n_i in all, p_o is the mean over rows of sum_k n_ik (n_ik - 1) /
    (n_i (n_i - 1)), and p_e = sum_k p_k^2, p_k being the share of class k of all readings. With as many readings of
    every row that is Fleiss' kappa. Rows with fewer than two readings are left out. nan where all readings are of one
    class. agreement: p_o.

    Args:
        readings: (N, R) int, `UNREAD` where there is none.
    """
    readings = np.asarray(readings)
    classes = np.unique(readings[readings != UNREAD])
    votes = (readings[:, :, None] == classes).sum(axis=1).astype(np.float64)  # (N, C)
    num = votes.sum(axis=1)
    votes[num < 2] = 0
    pairs = _ratio((votes * (votes - 1)).sum(axis=1), num * (num - 1), empty=0.0)
    columns = np.column_stack([num >= 2, pairs, votes])

    def statistic(counts: np.ndarray) -> dict[str, np.ndarray]:
        sums = np.einsum("rn,nk->rk", counts, columns)
        share = _ratio(sums[:, 2:].T, sums[:, 2:].sum(axis=1)[None])
        return _kappa(_ratio(sums[:, 1], sums[:, 0]), (share**2).sum(axis=0))

    return statistic


def agreement_figures(
    readings: np.ndarray, readers: Sequence[str], patients: np.ndarray, **options: Any
) -> dict[str, dict[str, Figure]]:
    """Kappa and agreement, with intervals by patient: of all readers together, and of every two.

    Args:
        readings: (N, R) int, `UNREAD` where there is none. readers: names of the R. patients: (N,).
        options: n_boot, seed, level, unit of `bootstrap_ci`.

    Returns:
        {"all readers": Fleiss', "reader1, reader2": Cohen's, ...}, each {"kappa": Figure, "agreement": Figure}.

    Raises:
        UserError: fewer than two readers, or names that do not fit the readings.
    """
    _check_readers(readings, readers)
    statistics = {"all readers": fleiss_statistic(readings)} | {
        f"{readers[a]}, {readers[b]}": cohen_statistic(readings[:, a], readings[:, b])
        for a, b in itertools.combinations(range(len(readers)), 2)
    }
    return {name: bootstrap_ci([statistic], [patients], **options) for name, statistic in statistics.items()}


@dataclass(frozen=True)
class Consensus:
    """labels: (N,) int64, `UNREAD` where there is none. How many rows were unanimous, by majority, tied (they
    have no label), and unread by all: they add up to N."""

    labels: np.ndarray
    unanimous: int
    majority: int
    tied: int
    unread: int


def consensus(readings: np.ndarray) -> Consensus:
    """The class that more readers gave than any other.

    Args:
        readings: (N, R) int, `UNREAD` where there is none; a row read by one reader has his reading.
    """
    readings = np.asarray(readings)
    classes = np.unique(readings[readings != UNREAD])
    if not len(classes):
        return Consensus(np.full(len(readings), UNREAD), 0, 0, 0, len(readings))
    votes = (readings[:, :, None] == classes).sum(axis=1)
    most = votes.max(axis=1)
    read = most > 0
    tied = read & ((votes == most[:, None]).sum(axis=1) > 1)
    labels = np.where(read & ~tied, classes[votes.argmax(axis=1)], UNREAD)
    unanimous = read & (most == votes.sum(axis=1))
    return Consensus(
        labels=labels.astype(np.int64),
        unanimous=int(unanimous.sum()),
        majority=int((read & ~tied & ~unanimous).sum()),
        tied=int(tied.sum()),
        unread=int((~read).sum()),
    )


def reader_points(
    readings: np.ndarray,
    readers: Sequence[str],
    patients: np.ndarray,
    reference: np.ndarray | None = None,
    **options: Any,
) -> dict[str, dict[str, dict[str, DecisionFigure]]]:
    """Each reader's operating point: `decision_figures` of his readings, 1 being positive and any other class not.

    Args:
        readings: (N, R) int, `UNREAD` where there is none. readers: names of the R. patients: (N,).
        reference: (N,) int, the reference standard; `UNREAD` where there is none. None = there is no such standard.
        options: as `decision_figures`.

    Returns:
        {reader: {"others": against the consensus (without ties) of the other readers, "reference": against the
        reference standard}}, each over the rows that both have.

    Raises:
        UserError: fewer than two readers, or names that do not fit the readings.
    """
    _check_readers(readings, readers)
    readings = np.asarray(readings)
    points = {}
    for r, reader in enumerate(readers):
        standards = {"others": consensus(np.delete(readings, r, axis=1)).labels}
        if reference is not None:
            standards["reference"] = np.asarray(reference)
        points[reader] = {}
        for name, standard in standards.items():
            rows = (readings[:, r] != UNREAD) & (standard != UNREAD)
            if not rows.any():  # readers may share the work
                continue
            points[reader][name] = decision_figures(
                readings[rows, r] == 1, (standard[rows] == 1).astype(int), patients[rows], **options
            )
    return points


def _check_readers(readings: np.ndarray, readers: Sequence[str]) -> None:
    if np.ndim(readings) != 2 or np.shape(readings)[1] != len(readers) or len(readers) < 2:
        shape = np.shape(readings)
        raise UserError(f"readings must be (N, R) of R >= 2 readers, got {shape} of {len(readers)} readers")


def _kappa(agreement: np.ndarray, by_chance: np.ndarray) -> dict[str, np.ndarray]:
    return {"kappa": _ratio(agreement - by_chance, 1 - by_chance), "agreement": agreement}


def _ratio(numerator: np.ndarray, denominator: np.ndarray, empty: float = np.nan) -> np.ndarray:
    out = np.full(np.broadcast_shapes(np.shape(numerator), np.shape(denominator)), empty)
    return np.divide(numerator, denominator, out=out, where=denominator > 0)
