"""An evaluation of images and texts that never ran, with the numbers of one: 300 pairs, three methods."""

import numpy as np

from raymed.metrics import binary_statistic, bootstrap_ci
from raymed.metrics.retrieval import (
    batch_protocol,
    nearest,
    recall_statistic,
    retrieval_ranks,
    retrieval_statistic,
    share_group,
)
from raymed.metrics.similarity import calibrate_similarity, pair_scores
from raymed.metrics.zero_shot import (
    finding_metric,
    foil_statistic,
    multiclass_statistic,
    shuffled_control,
    told_findings,
    zero_shot_statistic,
)
from raymed.report.clip_figures import ImageQuery, TextQuery
from raymed.report.clip_page import ClipRecord, PairCalibration
from raymed.space import Float

FINDINGS = ("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Nodule", "Pleural_Thickening", "Hernia")
SIDES, ORGANS = ("left", "right"), ("lung", "breast", "brain", "uterus")
SPACE = {
    "losses.dhn_nce.beta1": Float(0.0, 1.0),
    "losses.dhn_nce.temperature": Float(0.02, 1.0, log=True),
    "stage.optim.lr": Float(1e-5, 1e-2, log=True),
}


def picture(side, organ, random):
    """A grey image of 48 x 48 with a spot on one side."""
    y, x = np.mgrid[:48, :48] / 47
    body = 0.35 * ((x - 0.5) ** 2 / (0.1 + 0.03 * organ) + (y - 0.5) ** 2 / 0.2 < 1)
    spot = 0.5 * np.exp(-((x - (0.65, 0.35)[side]) ** 2 + (y - 0.4) ** 2) / 0.01)
    return body + spot + 0.04 * random.normal(size=x.shape)


def trials(num_trials=40, seed=0, space=SPACE):
    """A sweep whose value is best at beta 0.3, temperature 0.2 and lr 1e-3."""
    random = np.random.default_rng(seed)
    made = []
    for n in range(num_trials):
        at = random.random(3)
        low_high = [(d.low, d.high, d.log) for d in SPACE.values()]
        values = [
            low * (high / low) ** u if log else low + u * (high - low)
            for u, (low, high, log) in zip(at, low_high, strict=True)
        ]
        value = 0.7 - 0.2 * (at[0] - 0.3) ** 2 - 0.3 * (at[1] - 0.6) ** 2 - 0.4 * (at[2] - 0.66) ** 2
        value += 0.006 * random.normal()
        params = {name: v for name, v in zip(SPACE, values, strict=True) if name in space}
        status = "stopped" if n % 9 == 4 else "finished"
        made.append({"number": n, "params": params, "value": value, "status": status, "rungs": {}, "per_seed": []})
    return made


def record(n=300, n_boot=100, **changes):
    random = np.random.default_rng(0)
    patients = np.arange(n) // 2
    groups = patients[:, None]
    base = random.normal(size=(n, 24))
    texts = {
        name: base + noise * random.normal(size=base.shape) for name, noise in (("fine-tuned", 1.1), ("start", 2.0))
    }
    texts["shuffled texts"] = shuffled_control(texts["fine-tuned"])
    fine = texts["fine-tuned"]

    def noise():
        return random.normal(size=base.shape)

    def figures(statistic):
        return bootstrap_ci([statistic], [patients], n_boot=n_boot)

    at = (1, 2, 3, 5, 10, 20, 50, 100)
    present = random.random((n, len(FINDINGS))) < np.linspace(0.4, 0.02, len(FINDINGS))
    scores = random.normal(size=present.shape) + np.linspace(0.4, 1.6, len(FINDINGS)) * present
    organ, side = random.integers(4, size=n), random.integers(2, size=n)
    pixels = [picture(side[i], organ[i], random) for i in range(n)]
    captions = [
        f"Axial image of the {ORGANS[o]} that shows one small nodule of mild density on the {SIDES[s]}, and no finding "
        "besides."
        for o, s in zip(organ, side, strict=True)
    ]
    rows = random.choice(n, 32, replace=False)
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (base, fine)]
    related = share_group(groups, groups)
    found_images, cosines = nearest(fine[rows[:4]], base, 5)
    found_texts, text_cosines = nearest(base[rows[4:8]], fine, 5)
    val, test = (pair_scores(base[part], fine[part], groups[part]) for part in (slice(0, n, 2), slice(1, n, 2)))
    calibration, _ = calibrate_similarity(val, test, 14.3)
    before = 1 / (1 + np.exp(-14.3 * test.cosines))
    probabilities = {"before": before, "after": calibration(test.cosines)}
    line = np.linspace(-1, 1, 101)
    foils = {
        name: {kind: figures(foil_statistic(kind, base, fine, base - m + noise()))[kind] for kind, m in margins.items()}
        for name, margins in (("fine-tuned", {"side": 0.5, "count": -0.4, "organ": 1.2}), ("start", {"side": 0.1}))
    }
    fields = dict(
        title="Evaluation of clip-phantoms-5c1f",
        command="python jobs/evaluate_clip.py --bundle runs/clip-phantoms-5c1f/bundle",
        data=f"{n} pairs of {n // 2} patients (test split of captioned phantoms).",
        sentence="On test, 0.61 of the images find their caption among the five nearest of 300.",
        num_pairs=n,
        retrieval={name: figures(retrieval_statistic(base, text, groups)) for name, text in texts.items()},
        curves={
            name: figures(recall_statistic(retrieval_ranks(base, text, groups), at)) for name, text in texts.items()
        },
        protocol={name: batch_protocol(base, text, groups) for name, text in texts.items()},
        findings={
            "zero-shot": figures(zero_shot_statistic(scores, present, FINDINGS)),
            "linear probe": figures(zero_shot_statistic(scores + 0.5 * present, present, FINDINGS)),
            "shuffled labels": figures(zero_shot_statistic(scores, shuffled_control(present), FINDINGS)),
        },
        num_positive={finding_metric(name): int(present[:, f].sum()) for f, name in enumerate(FINDINGS)},
        averaged=[finding_metric(FINDINGS[f]) for f in told_findings(scores, present)],
        attributes={
            "side": figures(multiclass_statistic(random.random((n, 2)) + np.eye(2)[side], side)),
            "organ": figures(multiclass_statistic(random.random((n, 4)) + 0.5 * np.eye(4)[organ], organ)),
        },
        num_classes={"side": 2, "organ": 4},
        foils=foils,
        similarity=(unit[0][rows] @ unit[1][rows].T, related[np.ix_(rows, rows)]),
        text_queries=[
            TextQuery(captions[i], [pixels[j] for j in of], related[i, of].tolist(), c.tolist())
            for i, of, c in zip(rows[:4], found_images, cosines, strict=True)
        ],
        image_queries=[
            ImageQuery(pixels[i], [captions[j] for j in of], related[i, of].tolist(), c.tolist())
            for i, of, c in zip(rows[4:8], found_texts, text_cosines, strict=True)
        ],
        pairs=PairCalibration(
            test.cosines,
            test.targets,
            probabilities,
            {
                name: bootstrap_ci([binary_statistic(p, test.targets, 0.5)], [test.rows], n_boot=n_boot)
                for name, p in probabilities.items()
            },
            (line, calibration(line)),
        ),
        more=["The start finds 0.31."],
        model={"architecture": "small", "loss": "dhn_nce", "licence of the weights": "Apache-2.0"},
        config={"model.name": "small", "stage.steps": 2000},
        environment={"torch": "2.13"},
        notes=["Captions of one patient are no mistakes of each other."],
    )
    return ClipRecord(**(fields | changes))
