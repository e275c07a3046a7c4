"""Every head of a bank is the head that would have been trained alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import expit
from small import make_unit, recipe

from raymed.config import UserError
from raymed.config import replace as change
from raymed.data.sampling import BalancedSampler, RandomSampler
from raymed.metrics.classification import binary_metrics
from raymed.metrics.columns import COLUMN_METRICS
from raymed.random import derive
from raymed.train.checkpoints.checkpoint import load_weights
from raymed.train.compute import Compute
from raymed.train.engines.optim import schedule
from raymed.train.heads.bank import HeadBank, Replica, group
from raymed.train.heads.features import encoder_features
from raymed.train.nets import Networks
from raymed.train.unit import UnitRun, train_unit

CPU = torch.device("cpu")
SEEDS = (3, 8)
ASL = [
    {},
    {"losses.asl.gamma_neg": 1.3, "losses.asl.clip": 0.0, "head.optim.lr": 3e-2},
    {"losses.asl.gamma_pos": 1.0, "losses.asl.clip": 0.2, "head.optim.weight_decay": 0.3},
    {"losses.asl.gamma_neg": 0.0, "head.optim.clip": 3e-3, "head.optim.lr": 5e-3},
    {"losses.asl.gamma_pos": 0.5, "head.optim.momentum": 0.7, "head.optim.warmup": 0.6},
]
"""Configurations that differ in all that a column has of its own; the default clips at 0.05, which is active."""


@pytest.fixture(scope="module")
def encoder(manifest, tmp_path_factory):
    """Where the encoder that all heads share was left."""
    unit = make_unit(recipe(manifest), tmp_path_factory.mktemp("encoder"), part="encoder")
    train_unit(unit)
    return str(unit.encoder_checkpoint)


@pytest.fixture(scope="module")
def base(manifest, encoder):
    """The recipe of a head on that encoder."""
    return recipe(manifest, supcon__encoder_from=encoder)


@pytest.fixture(scope="module")
def features(base, data, tmp_path_factory):
    """What the encoder makes of every image."""
    return encoder_features(base.phases(data)[-1], data, 0, Compute(), tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def replicas(data, features):
    """The encoder's features under two seeds."""
    return [Replica(data, features, seed) for seed in SEEDS]


def recipes_of(base, configurations=ASL, **changes):
    """Recipes of the configurations; changes of all by dotted name, with "__" for the dot."""
    base = change(base, {name.replace("__", "."): value for name, value in changes.items()})
    return [change(base, configuration) for configuration in configurations]


def train(bank):
    """Train a bank to its end; what it reached."""
    reached = []
    while not bank.finished:
        reached.append(bank.advance())
    return reached


def alone(recipe, data, features, seed):
    """The head by torch.optim.AdamW and nothing of the bank: [(weights, metrics) at every evaluation]."""
    phase, head, loss = recipe.phases(data)[-1], recipe.head, getattr(recipe.losses, recipe.loss_name)
    module = Networks(phase, seed, Compute()).module("head").linear
    rows, order = data.splits["train"], derive(seed, "order", "head")
    sampler = RandomSampler(rows, head.batch_size, order)
    if head.balanced:
        sampler = BalancedSampler(rows, data.labels[rows], head.batch_size, order)
    groups = [
        {"params": [module.weight], "weight_decay": head.optim.weight_decay},
        {"params": [module.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=head.optim.lr)
    average, found = [p.detach().clone() for p in module.parameters()], []
    for step in range(head.steps):
        drawn = sampler.indices(step)
        targets = torch.from_numpy(data.labels[drawn]).float()
        loss(module(torch.from_numpy(features[drawn])).squeeze(1), targets).backward()
        if head.optim.clip is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), head.optim.clip)
        lr, momentum = schedule(head.optim, step, head.steps)
        for group_ in optimizer.param_groups:
            group_.update(lr=lr, betas=(momentum, 0.999))
        optimizer.step()
        optimizer.zero_grad()
        decay = 0.0 if head.ema_decay is None else min(head.ema_decay, (1 + step) / (10 + step))
        for shadow, own in zip(average, module.parameters(), strict=True):
            shadow.mul_(decay).add_(own.detach(), alpha=1 - decay)
        if phase.evaluates_after(step):
            weights = torch.cat([shadow.flatten() for shadow in average]).numpy()
            val = data.splits["val"]
            scores = expit((features[val] @ weights[:-1] + weights[-1]).astype(np.float64))
            found.append((weights, binary_metrics(scores, data.labels[val], 0.5)))
    return found


def check(bank, reached, recipes, data, features):
    """Rung metrics, and weights at the best evaluation, of every head against those of the head alone."""
    best = bank.best()
    assert sorted(best) == list(range(len(recipes)))
    for k, recipe_ in enumerate(recipes):
        for s, seed in enumerate(SEEDS):
            rungs = alone(recipe_, data, features, seed)
            assert len(rungs) == len(reached)
            for (_, expected), now in zip(rungs, reached, strict=True):
                for name in COLUMN_METRICS:
                    assert now.metrics[name][s, k] == pytest.approx(expected[name], abs=2e-6), (k, s, name)
            number = best[k].evaluation[s]
            assert number == 1 + int(np.argmax([metrics["auprc"] for _, metrics in rungs]))
            weights = np.append(best[k].weight[s], best[k].bias[s])
            np.testing.assert_allclose(weights, rungs[number - 1][0], rtol=1e-5, atol=1e-6)
            assert best[k].metrics["auprc"][s] == reached[number - 1].metrics["auprc"][s, k]


SETTINGS = {
    "minibatch": {},
    "balanced": {"head__balanced": True, "head__batch_size": 16},
    "full batch": {"head__batch_size": -1},
    "no average": {"head__ema_decay": None},
    "no clipping": {"head__optim__clip": None},
    "cosine": {"head__optim__schedule": "cosine", "head__steps": 90, "head__evaluations": 3},
    "sum": {"losses__asl__reduction": "sum"},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_head_is_the_one_that_adamw_trains_alone(setting, base, data, features, replicas):
    changes = SETTINGS[setting] | {"head__accumulate": 1}
    if changes.get("head__batch_size") == -1:
        changes["head__batch_size"] = len(data.splits["train"])
    configurations = [
        {name: value for name, value in configuration.items() if name.replace(".", "__") not in changes}
        for configuration in ASL
    ]
    recipes = recipes_of(base, configurations, **changes)
    bank = HeadBank(recipes, replicas, CPU)
    check(bank, train(bank), recipes, data, features)


@pytest.mark.parametrize(
    ("method", "configurations"),
    [
        ("supcon_ce", [{"losses.ce.pos_weight": 2.0}, {"losses.ce.pos_weight": 3.5}]),
        ("supcon_focal", [{"losses.focal.alpha": 0.3}, {"losses.focal.alpha": 0.7, "losses.focal.gamma": 0.5}]),
        ("supcon_asl", [{"head.ema_decay": 0.5}, {"head.ema_decay": 0.0}, {"head.ema_decay": 0.95}]),
        ("supcon_asl", [{"losses.asl.detach_weight": True}, {"losses.asl.detach_weight": True, "losses.asl.clip": 0}]),
    ],
)
def test_other_losses_and_averages(method, configurations, base, data, features, replicas):
    recipes = recipes_of(base, [{"method": method} | c for c in configurations], head__accumulate=1)
    if method == "supcon_focal":
        recipes = [change(r, {"losses.focal.alpha": r.losses.focal.alpha}) for r in recipes]
    assert group(recipes) == [list(range(len(recipes)))]
    bank = HeadBank(recipes, replicas, CPU)
    check(bank, train(bank), recipes, data, features)


def test_the_rows_in_several_chunks(base, data, features, replicas, monkeypatch):
    monkeypatch.setattr("raymed.train.heads.bank._CHUNK", 16 * 10 * 2)  # 32 rows of 2 x 5 heads at a time
    recipes = recipes_of(base, head__batch_size=len(data.splits["train"]), head__accumulate=1)
    bank = HeadBank(recipes, replicas, CPU)
    check(bank, train(bank), recipes, data, features)


@pytest.mark.parametrize("balanced", [True, False])
def test_every_head_is_a_unit(balanced, base, data, features, tmp_path):
    """Accumulation, the encoder's features, evaluations and best checkpoint as in any other training."""
    recipes = recipes_of(base, ASL[:3], head__balanced=balanced, head__evaluations=6)
    bank = HeadBank(recipes, [Replica(data, features, 3)], CPU)
    reached = train(bank)
    for k, recipe_ in enumerate(recipes):
        unit, seen = make_unit(recipe_, tmp_path / str(k)), []
        result = train_unit(unit, report=seen.append)
        assert [(e.number, e.step) for e in seen] == [(r.number, r.step) for r in reached]
        for evaluation, now in zip(seen, reached, strict=True):
            assert now.loss[0, k] == pytest.approx(evaluation.loss, rel=1e-5)
            for name in COLUMN_METRICS:
                assert now.metrics[name][0, k] == pytest.approx(evaluation.metrics[name], abs=1e-6), name
        weights = load_weights(UnitRun(unit).fit.checkpoints("head").find("best"))
        best = bank.best()[k]
        np.testing.assert_allclose(best.weight[0], weights["head.linear.weight"][0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(best.bias[0], weights["head.linear.bias"][0], rtol=1e-5, atol=1e-6)
        assert best.metrics["auprc"][0] == pytest.approx(result["val"]["auprc"], abs=1e-6)


def test_the_first_weights_are_those_of_a_unit_to_the_bit(base, data, replicas):
    state = torch.random.get_rng_state()
    bank = HeadBank(recipes_of(base), replicas, CPU)
    assert torch.equal(torch.random.get_rng_state(), state)
    for s, seed in enumerate(SEEDS):
        linear = Networks(base.phases(data)[-1], seed, Compute()).module("head").linear
        for k in range(len(ASL)):
            assert torch.equal(bank.optimizer.weights[s, k, :-1], linear.weight[0])
            assert torch.equal(bank.optimizer.weights[s, k, -1:], linear.bias)


def test_replicas_may_be_folds(base, data, features):
    """Training sets of different sizes; each head is that of its fold alone."""
    train_rows, val = data.splits["train"], data.splits["val"]
    other = replace(data, splits={**data.splits, "train": np.sort(np.append(train_rows[5:], val[:2])), "val": val[2:]})
    recipes = recipes_of(base, ASL[:2], head__accumulate=1)
    both = HeadBank(recipes, [Replica(data, features, 3), Replica(other, features, 3)], CPU)
    train(both)
    for s, fold in enumerate((data, other)):
        for k, recipe_ in enumerate(recipes):
            best = both.best()[k]
            expected = alone(recipe_, fold, features, 3)[best.evaluation[s] - 1][0]
            np.testing.assert_allclose(np.append(best.weight[s], best.bias[s]), expected, rtol=1e-5, atol=1e-6)


def state_of(bank):
    """Every tensor of a bank that has a column for each configuration, with the place of that axis."""
    optimizer = bank.optimizer
    tensors = [(optimizer.weights, 1), (optimizer.mean, 1), (optimizer.square, 1), (optimizer.table, 2)]
    tensors += [(optimizer.scratch, 1), (optimizer.clip, 0), (bank.average.shadow, 1), (bank.average.decay, 0)]
    tensors += [(bank.trace, 1), (bank.watch.weights, 1)]
    return tensors + [(value, 0) for value in bank.losses.fields.values()]


def test_columns_are_removed_and_the_others_keep_every_bit(base, replicas):
    recipes = recipes_of(base, ASL + [{"losses.asl.clip": 0.11}])
    whole, cut = HeadBank(recipes, replicas, CPU), HeadBank(recipes, replicas, CPU)
    before, after = whole.advance(), cut.advance()
    assert all(np.array_equal(before.metrics[name], after.metrics[name]) for name in COLUMN_METRICS)
    kept = [0, 1, 3, 5]
    cut.keep(kept[::-1])
    assert cut.alive == kept and sorted(cut.best()) == kept
    untouched = {id(cut.optimizer.scratch)}  # overwritten before it is read
    for (tensor, axis), (smaller, _) in zip(state_of(whole), state_of(cut), strict=True):
        assert smaller.shape[axis] == 4 and tensor.shape[axis] == 6
        assert smaller.untyped_storage().nbytes() == smaller.numel() * smaller.element_size()
        assert id(smaller) in untouched or torch.equal(tensor.index_select(axis, torch.tensor(kept)), smaller)
    for expected, now in zip(train(whole), train(cut), strict=True):
        assert now.alive == tuple(kept)
        for name in COLUMN_METRICS:
            np.testing.assert_allclose(now.metrics[name], expected.metrics[name][:, kept], rtol=0, atol=1e-6)
    for i in kept:
        np.testing.assert_allclose(cut.best()[i].weight, whole.best()[i].weight, rtol=1e-5, atol=1e-6)


def test_one_head_may_be_left(base, replicas):
    bank, whole = (HeadBank(recipes_of(base), replicas, CPU) for _ in range(2))
    bank.advance()
    bank.keep([2])
    expected = train(whole)[-1]
    np.testing.assert_allclose(train(bank)[-1].metrics["brier"], expected.metrics["brier"][:, [2]], atol=1e-6)


def test_an_empty_bank_is_finished(base, replicas):
    bank = HeadBank(recipes_of(base), replicas, CPU)
    bank.advance()
    bank.keep([])
    assert bank.finished and bank.best() == {}


def stop_and_best(curve, patience):
    """Indices of the evaluation at which a head's patience is used up (or the last) and of the best until then."""
    best = 0
    for now in range(1, len(curve)):
        if curve[now] > curve[best]:
            best = now
        if now - best == patience:
            return now, best
    return len(curve) - 1, best


def test_patience_stops_a_head_alone(base, replicas, tmp_path):
    """A learning rate of zero never gets better: those heads end at evaluation 1 + patience, as their units do."""
    recipes = recipes_of(
        base, [{"head.optim.lr": 0.0}, *ASL], head__steps=24, head__evaluations=8, head__accumulate=1, head__patience=2
    )
    bank, forever = (HeadBank([change(r, {"head.patience": p}) for r in recipes], replicas, CPU) for p in (2, None))
    reached, unstopped = train(bank), train(forever)
    stops = np.zeros((len(SEEDS), len(recipes)), int)
    for s, k in np.ndindex(stops.shape):
        curve = [r.metrics["auprc"][s, k] for r in unstopped]
        stops[s, k], best = stop_and_best(curve, 2)
        found = [r.metrics["auprc"][s, r.alive.index(k)] for r in reached if k in r.alive]
        expected = [curve[min(n, stops[s, k])] for n in range(len(found))]  # one that has stopped keeps its last value
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert bank.best()[k].evaluation[s] == best + 1
        assert bank.best()[k].metrics["auprc"][s] == pytest.approx(curve[best], abs=1e-6)
    last = stops.max(axis=0)  # a configuration ends with the last of its replicas
    assert [n for k in range(len(recipes)) for n, r in enumerate(reached) if k in r.ended] == last[last < 7].tolist()
    assert (stops[:, 0] == 2).all() and last.max() > 3 and (stops[0] != stops[1]).any()
    seen = []
    train_unit(make_unit(recipes[0], tmp_path), report=seen.append)
    assert len(seen) == 3


def test_a_head_that_diverges_is_alone(base, replicas):
    """A weight of infinity in one head: that configuration fails, and the others do not change by a bit."""
    recipes = recipes_of(base)
    healthy, bank = HeadBank(recipes, replicas, CPU), HeadBank(recipes, replicas, CPU)
    healthy.advance()
    bank.advance()
    bank.optimizer.weights[1, 2, 0] = torch.inf
    expected, reached = healthy.advance(), bank.advance()
    assert reached.failed == (2,) and bank.failed == {2} and bank.alive == [0, 1, 3, 4]
    for name in COLUMN_METRICS:
        assert np.isnan(reached.metrics[name][:, 2]).all()
        others = [0, 1, 3, 4]
        assert np.array_equal(reached.metrics[name][:, others], expected.metrics[name][:, others])
    train(bank)
    assert sorted(bank.best()) == [0, 1, 3, 4]


def test_a_huge_learning_rate_fails_where_its_unit_does(base, data, features, tmp_path):
    recipes = recipes_of(base, [{}, {"head.optim.lr": 1e38, "head.optim.clip": 1e30}, {"losses.asl.clip": 0.1}])
    bank = HeadBank(recipes, [Replica(data, features, 3)], CPU)
    reached = train(bank)
    assert bank.failed == {1} and all(np.isfinite(reached[-1].metrics["brier"][0]))
    with pytest.raises(UserError, match="not finite"):
        train_unit(make_unit(recipes[1], tmp_path))


def test_recipes_are_grouped_by_what_a_bank_cannot_stack(base):
    configurations = [
        *ASL,
        {"head.batch_size": 8},
        {"losses.asl.clamp": 1e-8},
        {"head.optim.lr": 0.5, "losses.asl.gamma_neg": 4},
        {"head.ema_decay": None},
        {"head.ema_decay": 0.2},
        {"head.optim.clip": None},
        {"losses.asl.detach_weight": True},
        {"head.optim.schedule": "constant"},
        {"head.batch_size": 8, "losses.asl.clip": 0.01},
    ]
    recipes = [change(base, configuration) for configuration in configurations]
    assert group(recipes) == [[0, 1, 2, 3, 4, 7, 9], [5, 13], [6], [8], [10], [11], [12]]
    alphas = [change(base, {"method": "supcon_focal", "losses.focal.alpha": a}) for a in (None, 0.25, None, 0.75)]
    assert group(alphas) == [[0, 2], [1, 3]]


def test_another_optimiser_is_refused(base, replicas):
    with pytest.raises(UserError, match="--sweep.no-batched"):
        HeadBank(recipes_of(base, head__optim__name="sgd"), replicas, CPU)
