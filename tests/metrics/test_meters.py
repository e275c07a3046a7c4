"""A meter gives the same bits however rows are spread over workers and batches, and with padding."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from raymed.metrics import BinaryMeter, binary_metrics

N = 101


def data():
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(N, generator=generator) < 0.3).long()
    return 2 * torch.randn(N, generator=generator) + labels, labels


def seen(meter, rows, batch_size=8):
    """Show the meter these rows in batches; returns it."""
    logits, labels = data()
    for index in torch.as_tensor(rows).split(batch_size):
        meter.update({"logit": logits[index]}, SimpleNamespace(label=labels[index]), index)
    return meter


def test_scores_targets_and_index_are_in_row_order():
    logits, labels = data()
    meter = seen(BinaryMeter(), torch.randperm(N, generator=torch.Generator().manual_seed(1)))
    assert meter.index.tolist() == list(range(N))
    np.testing.assert_allclose(meter.scores, logits.double().sigmoid().numpy(), rtol=1e-15)
    np.testing.assert_array_equal(meter.targets, labels.numpy())
    assert meter.scores.dtype == np.float64 and meter.targets.dtype == meter.index.dtype == np.int64


@pytest.mark.parametrize("num_workers", [1, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [5, 8])
def test_bit_equal_for_any_number_of_workers(num_workers, batch_size):
    alone = seen(BinaryMeter(), range(N), batch_size=N)
    padded = [row % N for row in range(-(-N // num_workers) * num_workers)]
    meters = [seen(BinaryMeter(), padded[rank::num_workers], batch_size) for rank in range(num_workers)]
    first, *others = pickle.loads(pickle.dumps(meters[::-1]))
    for other in others:
        first.merge(other)
    assert first.compute() == alone.compute()
    assert first.scores.tobytes() == alone.scores.tobytes()


def test_metrics_are_those_of_the_scores():
    meter = seen(BinaryMeter(), range(N))
    expected = binary_metrics(meter.scores, meter.targets, threshold=0.5)
    assert meter.compute() == {name: expected[name] for name in ("auroc", "auprc", "accuracy_at_0.5", "brier", "ece")}
    assert 0.5 < meter.compute()["auroc"] < 1


def test_logits_of_half_precision_keep_their_order():
    """In bfloat16 the sigmoids of 8 and 10 are both 1."""
    meter, index = BinaryMeter(), torch.arange(3)
    logits = torch.tensor([8.0, 10.0, -90.0], dtype=torch.bfloat16, requires_grad=True)
    meter.update({"logit": logits}, SimpleNamespace(label=torch.tensor([0, 1, 0])), index)
    assert meter.compute()["auroc"] == 1
    assert meter.scores[2] == pytest.approx(8.19401262e-40, rel=1e-8)


def test_scores_may_be_given():
    meter = BinaryMeter()
    scores = torch.tensor([0.25, 0.75], dtype=torch.float64)
    meter.update({"score": scores}, SimpleNamespace(label=torch.tensor([0, 1])), torch.tensor([4, 2]))
    assert meter.scores.tolist() == [0.75, 0.25] and meter.index.tolist() == [2, 4]
    assert meter.compute()["accuracy_at_0.5"] == 1


def test_copies_that_differ_do_not_depend_on_the_order_of_merging():
    def of(score):
        meter = BinaryMeter()
        meter.update({"score": torch.tensor([score])}, SimpleNamespace(label=torch.tensor([1])), torch.tensor([0]))
        return meter

    for first, second in ((0.5, 0.6), (0.6, 0.5)):
        meter = of(first)
        meter.merge(of(second))
        assert meter.scores.tolist() == [0.5]


def test_a_worker_without_rows():
    meter = BinaryMeter()
    assert np.isnan(meter.compute()["auroc"])
    meter.merge(seen(BinaryMeter(), range(N)))
    assert meter.compute() == seen(BinaryMeter(), range(N)).compute()
