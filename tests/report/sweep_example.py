"""A sweep that never ran, with the numbers of one: 3 search seeds, generations of 32, ASHA, finalists on 5 seeds."""

import numpy as np

from raymed.metrics.bootstrap import summarise_seeds
from raymed.metrics.classification import tune_threshold
from raymed.metrics.verdict import judge, overall
from raymed.report.sweep import SweepRecord
from raymed.space import Choice, Float, Int

SPACE = {
    "losses.asl.gamma_neg": Float(0.0, 5.0),
    "losses.asl.gamma_pos": Choice((0.0, 0.5, 1.0, 2.0)),
    "losses.asl.clip": Float(0.0, 0.2),
    "head.optim.lr": Float(1e-4, 1e-1, log=True),
    "head.ema_decay": Choice((None, 0.99, 0.999)),
    "head.warmup": Int(0, 20),
}
DEFAULT = dict(zip(SPACE, (4.0, 0.0, 0.05, 1e-3, None, 5), strict=True))
EVALUATIONS = (2, 6, 18)
SEARCH_SEEDS, FINAL_SEEDS = (2023, 2024, 2025), (3001, 3002, 3003, 3004, 3005)


NO_FINALIST = "cannot tell: no configuration but the default has finished"


def trials(num_trials=96, num_seeds=3, space=SPACE, seed=0):
    random = np.random.default_rng(seed)
    made, seen = [], {rung: [] for rung in EVALUATIONS}
    for number in range(num_trials):
        params = _suggest(random, number, space, made)
        final = _quality(params) + random.normal(0, 0.006, num_seeds) + 0.004 * np.arange(num_seeds)
        rungs, status = {}, "finished"
        for rung in EVALUATIONS:
            values = final - 0.06 * np.exp(-rung / 3) * random.uniform(0.7, 1.3)
            rungs[rung] = float(values.mean())
            seen[rung].append(rungs[rung])
            if number and rung < EVALUATIONS[-1] and rungs[rung] < np.quantile(seen[rung], 0.55):
                status = "stopped"
                break
        made.append({"number": number, "params": params, "value": rungs[rung], "status": status, "rungs": rungs})
        made[-1]["per_seed"] = values.tolist()
        if number % 41 == 17:
            made[-1] |= {"status": "failed", "value": None, "rungs": {}, "per_seed": []}
    return made


def record(num_trials=96, num_finalists=3, num_seeds=5, num_images=600, n_boot=300, **changes):
    made = trials(num_trials)
    best = sorted((t for t in made if t["status"] == "finished" and t["number"]), key=lambda t: -t["value"])
    trial_of = {"default": 0} | {f"trial {t['number']}": t["number"] for t in best[:num_finalists]}
    predictions, patients = _predictions(trial_of, num_seeds, num_images)
    thresholds = {m: [tune_threshold(*seed) for seed in splits["val"]] for m, splits in predictions.items()}
    complete = {
        method: {
            split: [(*p, patients, at) for p, at in zip(seeds, thresholds[method], strict=True)]
            for split, seeds in splits.items()
        }
        for method, splits in predictions.items()
    }
    verdicts = {}
    for split in ("val", "test"):
        baseline, *finalists = (splits[split] for splits in complete.values())
        named = dict(zip(list(complete)[1:], finalists, strict=True))
        verdicts[split] = judge(named, baseline, "auprc", n_boot=n_boot) if named else {}
    counts = {"num_configurations": num_trials, "num_openings": 2}
    figures = {
        m: {split: summarise_seeds(seeds, n_boot=n_boot) for split, seeds in splits.items()}
        for m, splits in complete.items()
    }
    chosen = max(figures, key=lambda method: figures[method]["val"]["auprc"]["mean"])
    fields = dict(
        title="Sweep of supcon_asl on PneumoniaMNIST",
        command="python jobs/tune_asl.py --data.source pneumoniamnist --data.positive pneumonia --sweep.num-trials 96 "
        "--sweep.space head.optim.lr=1e-4..1e-1:log 'head.ema_decay=none|0.99|0.999' --name tune-asl-5c1f",
        metric="auprc",
        mode="max",
        figures=figures,
        baseline="default",
        chosen=chosen,
        trial_of=trial_of,
        trials=made,
        space=SPACE,
        predictions=predictions,
        thresholds=thresholds,
        verdicts=verdicts,
        sentence=overall(verdicts["val"], verdicts["test"], chosen, **counts) if num_finalists else NO_FINALIST,
        num_configurations=num_trials,
        num_generations=-(-num_trials // 32),
        generation_size=32,
        num_test_openings=2,
        search_seeds=SEARCH_SEEDS,
        final_seeds=FINAL_SEEDS[:num_seeds],
        data="4708 training, 524 validation and 624 test images of 28 x 28 pixels; 74 % of training are positive.",
        positive="pneumonia",
        negative="normal",
        config={"method": "supcon_asl", "seeds": [2023, 2024, 2025], "head": {"steps": 300, "ema_decay": None}},
        environment={"python": "3.11.9", "versions": {"torch": "2.13.0", "ray": "2.60.0"}, "num_cpus": 2, "gpus": []},
        notes=["Two validation images that are also training images were left out of validation."],
    )
    return SweepRecord(**(fields | changes))


def _suggest(random, number, space, made):
    if number == 0:
        return {name: DEFAULT[name] for name in space}
    good = sorted((t for t in made if t["value"]), key=lambda t: -t["value"])[:6]
    params = {}
    for name, dimension in space.items():
        near = good[random.integers(len(good))]["params"][name] if number >= 32 and random.random() < 0.6 else None
        if isinstance(dimension, Choice):
            params[name] = dimension.options[random.integers(len(dimension.options))] if near is None else near
            continue
        back, forward = (np.exp, np.log) if dimension.log else (np.asarray, np.asarray)
        low, high = forward([float(dimension.low), float(dimension.high)])
        drawn = random.uniform(low, high) if near is None else forward(near) + random.normal(0, 0.08 * (high - low))
        value = float(np.clip(back(np.clip(drawn, low, high)), dimension.low, dimension.high))
        params[name] = round(value) if isinstance(dimension, Int) else value
    return params


def _quality(params):
    full = DEFAULT | params
    lr = np.log10(full["head.optim.lr"])
    value = 0.955 - 0.012 * (lr + 2.2) ** 2 - 0.0022 * (full["losses.asl.gamma_neg"] - 2.4) ** 2
    value -= {0.0: 0, 0.5: 0, 1.0: 0.004, 2.0: 0.02}[full["losses.asl.gamma_pos"]]
    return value - 0.25 * (full["losses.asl.clip"] - 0.03) ** 2 - (0.5 if lr > -1.02 else 0)


def _predictions(methods, num_seeds, num_images):
    """{method: {split: [(scores, targets) per seed]}}, and the patients of the images."""
    predictions, patients = {method: {} for method in methods}, np.arange(num_images) // 3
    for split, salt in (("val", 1), ("test", 2)):
        shared = np.random.default_rng(salt)
        targets = (shared.random(num_images) < 0.62).astype(int)
        difficulty = shared.normal(0, 1.0, num_images)
        for position, method in enumerate(methods):
            seeds = []
            for seed in range(num_seeds):
                random = np.random.default_rng([salt, position, seed])
                logit = (2 * targets - 1) * (1.9 + 0.05 * position + random.normal(0, 0.1)) + 1.3 * difficulty
                logit += random.normal(0, 0.5, num_images)
                seeds.append((1 / (1 + np.exp(-1.25 * logit - 0.3)), targets))
            predictions[method][split] = seeds
    return predictions, patients
