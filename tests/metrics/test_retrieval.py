"""Ranks against a naive loop and scikit-learn, ties and shared groups, bits for any number of workers, and the time."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score

from raymed.config import UserError
from raymed.metrics import bootstrap_ci, retrieval
from raymed.metrics.retrieval import (
    RetrievalMeter,
    batch_protocol,
    nearest,
    recall_statistic,
    retrieval_ranks,
    retrieval_statistic,
)

NAMES = [f"{way}_recall_{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]


def pairs(n=80, noise=1.0, dim=8, seed=0):
    """Texts near their images."""
    random = np.random.default_rng(seed)
    image = random.normal(size=(n, dim)).astype(np.float32)
    return image, (image + noise * random.normal(size=image.shape)).astype(np.float32), np.arange(n)


def observed(statistic, n):
    return {name: float(value[0]) for name, value in statistic(np.ones((1, n))).items()}


def naive_ranks(queries, items, groups):
    groups = groups.reshape(len(groups), -1)
    ranks = []
    for i, query in enumerate(queries):
        cosines = [float(query @ item / np.linalg.norm(query) / np.linalg.norm(item)) for item in items]
        own = [bool(set(groups[i]) & set(groups[j])) for j in range(len(items))]
        best = max(cosine for cosine, mine in zip(cosines, own, strict=True) if mine)
        ranks.append(1 + sum(cosine >= best for cosine, mine in zip(cosines, own, strict=True) if not mine))
    return ranks


@pytest.mark.parametrize("entries", [2**22, 100])  # all rows at once, and one at a time
@pytest.mark.parametrize("kind", ["pairs", "cases", "two ids"])
def test_ranks_are_those_of_a_naive_loop(kind, entries, monkeypatch):
    monkeypatch.setattr(retrieval, "_ENTRIES", entries)
    image, text, groups = pairs()
    if kind == "cases":
        groups = groups // 3
    if kind == "two ids":
        groups = np.stack([groups // 2, 1000 + (groups + 1) // 2], axis=1)
    found = retrieval_ranks(image, text, groups)
    assert found["i2t"].tolist() == naive_ranks(image, text, groups)
    assert found["t2i"].tolist() == naive_ranks(text, image, groups)
    assert 1 < np.mean(found["i2t"]) < 20


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recall_is_the_top_k_accuracy_of_scikit_learn(k):
    image, text, groups = pairs(60)
    cosine = (image / np.linalg.norm(image, axis=1, keepdims=True)) @ (
        text / np.linalg.norm(text, axis=1, keepdims=True)
    ).T
    found = observed(retrieval_statistic(image, text, groups), 60)
    assert found[f"i2t_recall_{k}"] == pytest.approx(top_k_accuracy_score(groups, cosine, k=k))
    assert found[f"t2i_recall_{k}"] == pytest.approx(top_k_accuracy_score(groups, cosine.T, k=k))


def test_values_are_the_six_recalls_and_their_mean():
    found = observed(retrieval_statistic(*pairs()), 80)
    assert list(found) == [*NAMES, "mean_recall"]
    assert found["mean_recall"] == pytest.approx(np.mean([found[name] for name in NAMES]))
    assert found["i2t_recall_1"] < found["i2t_recall_5"] < found["i2t_recall_10"] < 1
    assert observed(retrieval_statistic(*pairs(noise=0)), 80) == dict.fromkeys(found, 1.0)


def test_ties_count_against():
    same = np.ones((20, 4), np.float32)
    assert retrieval_ranks(same, same, np.arange(20))["i2t"].tolist() == [20] * 20
    image, text, groups = pairs(20, noise=0)
    text[1] = 3 * text[0]  # the caption of another case, word for word
    ranks = retrieval_ranks(image, text, groups)
    assert ranks["i2t"][0] == 2
    assert retrieval_ranks(image, text, np.where(groups == 1, 0, groups))["i2t"][0] == 1
    text[1] += 1e-7  # the same caption, computed in another batch
    assert retrieval_ranks(image, text, groups)["i2t"][0] == 2


def test_neither_length_nor_order_matters():
    image, text, groups = pairs()
    expected = retrieval_ranks(image, text, groups)["t2i"]
    order = np.random.default_rng(1).permutation(80)
    lengths = np.random.default_rng(2).uniform(0.1, 9, (80, 1))
    found = retrieval_ranks((lengths * image)[order], text[order], groups[order])["t2i"]
    assert found.tolist() == expected[order].tolist()


def test_interval_is_by_patient_over_queries():
    """Images of a patient are as hard as each other: by patient the interval is wider than by image."""
    image, text, groups = pairs(300, dim=16)
    hard = np.repeat(np.random.default_rng(3).random(60) < 0.5, 5)
    text = np.where(hard[:, None], np.random.default_rng(4).normal(size=text.shape), image).astype(np.float32)
    statistic = retrieval_statistic(image, text, groups)
    widths = []
    for who in (np.repeat(np.arange(60), 5), np.arange(300)):
        figures = bootstrap_ci([statistic], [who], n_boot=500)
        assert set(figures) == {*NAMES, "mean_recall"}
        of_first = figures["i2t_recall_1"]
        assert of_first["ci_low"] < 1 - hard.mean() < of_first["ci_high"]
        widths.append(of_first["ci_high"] - of_first["ci_low"])
    assert widths[0] == pytest.approx(np.sqrt(5) * widths[1], rel=0.15)


def test_recall_at_any_k_counts_rows():
    ranks = {"i2t": np.array([1, 2, 9]), "t2i": np.array([3, 1, 1])}
    found = recall_statistic(ranks, (1, 3))(np.array([[1.0, 1, 1], [0, 0, 3], [2, 1, 0]]))
    assert found["i2t_recall_1"].tolist() == pytest.approx([1 / 3, 0, 2 / 3])
    assert found["i2t_recall_3"].tolist() == pytest.approx([2 / 3, 0, 1])
    assert found["t2i_recall_1"].tolist() == pytest.approx([2 / 3, 1, 1 / 3])


def test_protocol_in_batches():
    image, text, groups = pairs(520, noise=1.5)
    found = batch_protocol(image, text, groups)
    assert (found["batch"], found["batches"], found["repeats"]) == (50, 10, 5)
    assert found == batch_protocol(image, text, groups) != batch_protocol(image, text, groups, seed=1)
    whole = observed(retrieval_statistic(image, text, groups), 520)
    for way in ("i2t", "t2i"):
        top = found[f"{way}_top_1"]
        assert whole[f"{way}_recall_1"] < top["mean"] < found[f"{way}_top_2"]["mean"] < 1
        assert 0 < top["std"] < 0.05
    alone = batch_protocol(image[:50], text[:50], groups[:50])
    expected = np.mean(np.array(naive_ranks(image[:50], text[:50], groups[:50])) <= 1)
    assert alone["i2t_top_1"] == {"mean": pytest.approx(expected), "std": pytest.approx(0, abs=1e-12)}
    assert batch_protocol(image[:7], text[:7], groups[:7], repeats=1)["batch"] == 7


def test_nearest_are_the_highest_cosines():
    image, text, _ = pairs(30)
    rows, cosines = nearest(image, text, 4)
    expected = torch.nn.functional.normalize(torch.tensor(image)) @ torch.nn.functional.normalize(torch.tensor(text)).T
    best = expected.topk(4)
    assert rows.tolist() == best.indices.tolist()
    np.testing.assert_allclose(cosines, best.values.numpy(), atol=1e-6)
    assert nearest(image, text[:2], 4)[0].shape == (30, 2)


def seen(rows, num_ids=2):
    """A meter that was shown these rows in batches."""
    image, text, groups = (torch.tensor(array) for array in pairs())
    groups = groups // 2 if num_ids == 1 else torch.stack([groups // 2, 500 + groups], dim=1)
    meter = RetrievalMeter()
    for index in torch.as_tensor(rows).split(8):
        prediction = {"image": image[index].bfloat16(), "text": text[index].requires_grad_(), "groups": groups[index]}
        meter.update(prediction, SimpleNamespace(), index)
    return meter


@pytest.mark.parametrize("num_workers", [1, 3])
def test_meter_is_bit_equal_for_any_number_of_workers(num_workers):
    alone = seen(torch.randperm(80))
    padded = [row % 80 for row in range(-(-80 // num_workers) * num_workers)]
    first, *others = pickle.loads(pickle.dumps([seen(padded[rank::num_workers]) for rank in range(num_workers)][::-1]))
    for other in others:
        first.merge(other)
    assert first.index.tolist() == list(range(80)) and first.image.dtype == first.text.dtype == np.float32
    assert first.text.tobytes() == alone.text.tobytes() and first.groups.tolist() == alone.groups.tolist()
    assert first.compute() == alone.compute()
    assert alone.compute() == observed(retrieval_statistic(alone.image, alone.text, alone.groups), 80)


def test_meter_takes_groups_of_one_id_and_no_rows():
    meter = seen(range(80), num_ids=1)
    assert meter.groups.shape == (80, 1) and meter.compute()["i2t_recall_1"] < 1
    assert all(np.isnan(list(RetrievalMeter().compute().values())))
    assert list(RetrievalMeter().compute()) == [*NAMES, "mean_recall"]
    empty = RetrievalMeter()
    empty.merge(meter)
    assert empty.compute() == meter.compute()


def test_what_cannot_be_ranked_is_refused():
    image, text, groups = pairs()
    broken = image.copy()
    broken[3:5] = np.nan
    with pytest.raises(UserError, match="^2 of 80 embeddings are not finite: the model diverged"):
        retrieval_ranks(broken, text, groups)
    with pytest.raises(UserError, match="1 of 80 embeddings are zero"):
        retrieval_ranks(image, text * (groups != 7)[:, None], groups)
    with pytest.raises(UserError, match=r"got \(80, 8\), \(79, 8\) and \(80, 1\)"):
        retrieval_ranks(image, text[1:], groups)
    with pytest.raises(UserError, match="got none"):
        batch_protocol(image[:0], text[:0], groups[:0])
