"""A clinical evaluation that never ran, with the numbers of one: 120 cases of two images, three readers, two sites."""

import numpy as np

from raymed.metrics import binary_statistic, bootstrap_ci
from raymed.metrics.agreement import agreement_figures, reader_points
from raymed.metrics.decision_curve import decision_curve
from raymed.metrics.operating import decision_figures, fixed_rate_statistic
from raymed.metrics.reliability import calibration_curve, recalibration_statistic
from raymed.metrics.subgroups import subgroup_figures
from raymed.report.clinical_figures import CalibrationCurve, Level
from raymed.report.clinical_page import ClinicalRecord
from raymed.report.gallery import Case, View, choose_cases
from raymed.report.read_again import Doubt

THRESHOLD = 0.4
SITES = ("서울", "Busan", "Jeju")


def level(name, scores, targets, patients, n_boot):
    statistics = [binary_statistic(scores, targets, THRESHOLD), fixed_rate_statistic(scores, targets)]
    figures = {k: f for s in statistics for k, f in bootstrap_ci([s], [patients], n_boot=n_boot).items()}
    decisions = decision_figures(scores >= THRESHOLD, targets, patients, prevalences=(0.05, 0.3), n_boot=n_boot)
    return Level(name, scores, targets, THRESHOLD, figures | decisions, len(np.unique(patients)))


def picture(random, size=96):
    """A grey image with a bright triangle and two strands, and heat maps of it."""
    y, x = np.mgrid[:size, :size] / size
    image = 0.5 * (np.abs(x - 0.5) < 0.25 * (0.75 - y)) + 0.3 * (np.abs(y - 0.35 - 0.3 * (x - 0.5) ** 2) < 0.02)
    image = 200 * image + 15 * random.normal(size=image.shape)
    spot = np.exp(-((x - random.choice([0.2, 0.8])) ** 2 + (y - 0.4) ** 2) / 0.03)
    return View("early", image, spot, np.clip(0.5 + 0.3 * np.sin(9 * x + 4 * random.random()) * y, 0, 1))


def curve(scores, targets, patients, n_boot):
    bins = calibration_curve(scores, targets, patients, num_bins=8, n_boot=n_boot)
    return CalibrationCurve(bins, bootstrap_ci([recalibration_statistic(scores, targets)], [patients], n_boot=n_boot))


def record(n=120, n_boot=60, num_cards=6, **changes):
    random = np.random.default_rng(0)
    targets = (random.random(n) < 0.3).astype(int)
    patients = np.arange(n) - (np.arange(n) % 10 == 9)
    scores = 1 / (1 + np.exp(-random.normal(3 * targets - 1.8, 1.2)))
    image_scores = np.clip(np.repeat(scores, 2) + 0.12 * random.normal(size=2 * n), 0, 1)
    site = random.choice(len(SITES), n, p=[0.6, 0.3, 0.1])
    cases, images = (
        level("case", scores, targets, patients, n_boot),
        level("image", image_scores, np.repeat(targets, 2), np.repeat(patients, 2), n_boot),
    )
    wrong = random.random((n, 3)) < [0.08, 0.15, 0.2]
    readings, names = np.where(wrong, 1 - targets[:, None], targets[:, None]), ["판독의 A", "Reader B", "Reader C"]
    attributes = {"site": [SITES[s] for s in site], "year": [str(2020 + i % 2) for i in range(n)]}
    shown = [i for positions in choose_cases(scores, targets, THRESHOLD, num_cards).values() for i in positions]
    fields = dict(
        title="Evaluation of hsg-supcon-asl-5c1f",
        data=f"External test set: {n} cases of {len(np.unique(patients))} patients.",
        sentence="The model finds 0.89 of the occluded cases and clears 0.88 of the patent ones.",
        levels=[cases, images],
        classes=("patent", "폐쇄"),
        operating={"rule": "sensitivity=0.95", "chosen on": "out-of-fold case scores", "threshold": THRESHOLD},
        calibration={
            "before": curve(scores**2, targets, patients, n_boot),
            "after": curve(scores, targets, patients, n_boot),
        },
        decision=vars(decision_curve(scores, targets, patients, np.arange(2, 81, 2) / 100, n_boot=n_boot)),
        readers=reader_points(readings, names, patients, targets, n_boot=n_boot),
        agreement=agreement_figures(readings, names, patients, n_boot=n_boot),
        subgroups=[
            vars(group) for group in subgroup_figures(scores, targets, patients, THRESHOLD, attributes, n_boot=n_boot)
        ],
        cases=[
            Case(
                f"C-{i:04d}",
                bool(targets[i]),
                float(scores[i]),
                [picture(random), View("late", picture(random).image, picture(random).heat_map)],
                {name: values[i] for name, values in attributes.items()},
            )
            for i in shown
        ],
        read_again=[Doubt("C-0009", "patent", 0.93, 3, 3, 2), Doubt("C-0004", "폐쇄", 0.11, 2, 3, 2)],
        more=["Not above the readers: their intervals overlap."],
        model={"name": "hsg", "version": "3", "training cases": 331},
        command="python jobs/evaluate_classifier.py --model hsg --manifest external.csv",
        config={"aggregate": "mean"},
        environment={"torch": "2.13"},
        notes=["The threshold was fixed before this test set was opened."],
    )
    return ClinicalRecord(**(fields | changes))
